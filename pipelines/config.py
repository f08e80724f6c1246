"""Named functions that each return a complete, checked config; single values are changed by dotted name.

`srraw_4x()` is the default. `--set model.packing_kernel=4`, the search space of `sdan tune` and MLflow's params all
use the same dotted names: `model.*` (SDANConfig), `loss.*` (LossConfig), `train.*` (TrainConfig).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from sdan.losses import LossConfig
from sdan.network import SDANConfig

Architecture = Literal["SDAN", "SRResNet"]


class ConfigError(ValueError):
    """A config name, key or value that is not allowed; the message says what was expected."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and on what crops."""

    epochs: int = 300
    crops_per_epoch: int | None = None
    """Random crops per epoch; None: one per pair, as in the paper."""
    crop_px: int = 64
    """Side of a training crop in packed RAW pixels (64 is 128x128 mosaic or RGB pixels)."""
    batch_per_worker: int = 8
    learning_rate: float = 1e-4
    restart_epochs: int = 20
    """First period of the cosine warm restarts; each later period is twice the one before."""
    learning_rate_floor: float = 1e-5
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly from zero."""
    betas: tuple[float, float] = (0.9, 0.99)
    grad_clip: float = 0.0
    """Maximum gradient norm; 0: no clipping."""
    max_skipped: int = 20
    """The run ends after this many consecutive skipped steps (loss or gradient not finite)."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights; 0: none."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: what the processor of each worker computes natively (sdan.ops.precision)."""
    layout: Literal["auto", "channels_last", "contiguous"] = "auto"
    """Memory layout of weights and feature maps. auto: channels_last, except for float32 on CUDA without TF32, where
    cuDNN is about ten times slower in it (sdan.ops.precision)."""
    tf32: bool = True
    """Let float32 convolutions and wide attention on GPUs from Ampere on use TF32, in training and its validation.
    deterministic turns it off. The paper's configs set it to False: TF32's effect on their reported numbers was not
    measured."""
    compile: bool = False
    """Compile the network with torch.compile: slower start (minutes), less time and memory per step."""
    cuda_graph: bool = False
    """Record the step as one CUDA graph and replay it: for small networks and batches, whose time on a GPU goes into
    starting kernels. One worker, one GPU, bf16 or fp32 (pipelines/training/graph.py)."""
    accumulate: int = 1
    """Gradient accumulation: process the batch in this many parts, to save GPU memory. Must divide batch_per_worker.
    The gradient is that of the whole batch."""
    augment: bool = True
    """Random flips and transposes (Bayer-phase-correct)."""
    match_exposure: bool = True
    """Scale each target to its input's exposure (a gain in linear light, measured by preprocessing), so that the
    network need not learn a brightness that varies between pairs. Held-out targets are not scaled."""
    look: Literal["rendering", "camera"] = "camera"
    """The tones and colours of the pictures that the network learns from. rendering: those of the input's rendering, so
    that the network adds detail only, for any camera. camera: those of the camera's JPG, which the network then gives
    to every photograph; the paper's, and that of runs before version 0.3."""
    reduced_share: float = 0.0
    """Share of an RGB network's crops whose input is a reduced copy of their own target, as resized pictures are
    (preprocessing/photometry/reduction.py); the input of the others is the camera's JPG. 0 for RAW."""
    truth_blur_px: float = 0.0
    """Standard deviation, in target pixels, of a Gaussian blur of the simulator's ideal picture (self_target=truth).
    That picture is as sharp as its grid allows, and rings beside edges. A network that learns it sharpens more than
    some lenses need, which shows as halos."""
    replay_share: float = 0.5
    """In a fine-tuning: share of the crops that comes from pairs that the model has been trained on before, so that it
    does not forget them. It is raised where few pairs are new (loader.replayed). Other trainings do not use it."""
    validate_every: int = 1
    """Epochs between validations (a checkpoint follows each)."""
    picture_every: int = 5
    """Number of validations per logged picture."""
    val_crops: int = 32
    """Crops of the val split that each validation scores, always the same ones."""
    seed: int = 0
    deterministic: bool = False
    """Use only operators that give bit-identical results, and raise an error for any other. Slower on GPUs; CPUs are
    always deterministic."""

    def __post_init__(self) -> None:
        positive = ("epochs", "crop_px", "batch_per_worker", "restart_epochs", "validate_every", "picture_every")
        for name in (*positive, "val_crops", "max_skipped", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}: expected at least 1, got {getattr(self, name)}")
        if self.batch_per_worker % self.accumulate:
            raise ConfigError(
                f"train.accumulate: expected a divisor of train.batch_per_worker = {self.batch_per_worker}, "
                f"got {self.accumulate}"
            )
        if self.crops_per_epoch is not None and self.crops_per_epoch < 1:
            raise ConfigError(f"train.crops_per_epoch: expected at least 1, or none, got {self.crops_per_epoch}")
        for name in ("grad_clip", "warmup_steps", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"train.{name}: expected 0 or more, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"train.betas: expected two values in [0, 1), got {self.betas}")
        if not 0 < self.learning_rate_floor <= self.learning_rate < math.inf:
            raise ConfigError(
                f"train.learning_rate: expected at least train.learning_rate_floor = {self.learning_rate_floor}, "
                f"got {self.learning_rate}"
            )
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"train.ema_decay: expected a value in [0, 1), got {self.ema_decay}")
        if not 0 <= self.truth_blur_px < 100:
            raise ConfigError(f"train.truth_blur_px: expected 0 to 100 target pixels, got {self.truth_blur_px}")
        if not 0 <= self.reduced_share <= 1:
            raise ConfigError(f"train.reduced_share: expected a value in [0, 1], got {self.reduced_share}")
        if not 0 <= self.replay_share < 1:
            raise ConfigError(f"train.replay_share: expected a value from 0 to below 1, got {self.replay_share}")
        if self.look not in ("rendering", "camera"):
            raise ConfigError(f"train.look: expected rendering or camera, got {self.look!r}")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ConfigError(f"train.precision: expected auto, fp32, bf16 or fp16, got {self.precision!r}")
        if self.layout not in ("auto", "channels_last", "contiguous"):
            raise ConfigError(f"train.layout: expected auto, channels_last or contiguous, got {self.layout!r}")

    @property
    def use_tf32(self) -> bool:
        """Whether training may use TF32."""
        return self.tf32 and not self.deterministic


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything that a run depends on besides its data: network, loss and training."""

    name: str
    model: SDANConfig = field(default_factory=SDANConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    architecture: Architecture = "SDAN"
    """The network's class, a name of sdan.checkpoint.ARCHITECTURES. SRResNet has no alignment module: Table 1's
    baseline."""
    first_schedule: tuple[int, float] | None = None
    """(epochs, learning rate) of the first training; fine-tunings use fixed shares of both. None before the first."""

    def __post_init__(self) -> None:
        try:
            self.model.check_crop(self.input_px)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if self.train.reduced_share and not self.model.is_rgb:
            raise ConfigError(
                f"train.reduced_share: expected 0 for RAW (model.input={self.model.input}), got "
                f"{self.train.reduced_share}; --set train.reduced_share=0"
            )
        if self.architecture not in typing.get_args(Architecture):
            expected = ", ".join(typing.get_args(Architecture))
            raise ConfigError(f"architecture: expected one of {expected}, got {self.architecture!r}")
        if self.architecture == "SRResNet" and self.loss.known_shift_weight > 0:
            got = self.loss.known_shift_weight
            raise ConfigError(f"loss.known_shift_weight: expected 0 for SRResNet, which has no offsets, got {got}")
        if self.loss.adversarial_weight > 0 and self.train.accumulate > 1:
            raise ConfigError(
                "train.accumulate: expected 1 with loss.adversarial_weight above 0, because the discriminator "
                f"normalises over the whole batch, got {self.train.accumulate}"
            )
        target_px = self.target_px
        most_px = (target_px - self.loss.min_px) // 2
        if self.loss.border_px > most_px:
            raise ConfigError(
                f"loss.border_px: expected at most {most_px} (a target crop has {target_px} px, and this loss needs "
                f"{self.loss.min_px} of them), got {self.loss.border_px}; set a smaller one or a larger train.crop_px"
            )

    @property
    def input_px(self) -> int:
        """Side of a training crop in the network's own input pixels."""
        return self.model.input_px(self.train.crop_px)

    @property
    def target_px(self) -> int:
        """Side of a training crop in target pixels."""
        return 2 * self.train.crop_px * self.model.scale

    @property
    def discriminator_px(self) -> int:
        """Side of the pictures that the discriminator of adversarial training sees."""
        return self.target_px - 2 * self.loss.border_px


def paper_4x() -> ExperimentConfig:
    """The paper as printed and released: mosaic RAW, no skip, the reference is always Y' (8 GPUs, batch 8 on each)."""
    return ExperimentConfig(name="paper_4x", train=TrainConfig(precision="fp32", tf32=False))


def paper_4x_rgb() -> ExperimentConfig:
    """The paper's RGB row: the camera JPG as input."""
    return replace(paper_4x(), name="paper_4x_rgb", model=SDANConfig(input="rgb"))


def srraw_4x() -> ExperimentConfig:
    """Ours, for deployment: skip through the rendering, self-reference samples, EMA."""
    return ExperimentConfig(
        name="srraw_4x",
        model=SDANConfig(skip="rendering"),
        loss=LossConfig(kind="charbonnier", self_reference_weight=1.0),
        train=TrainConfig(ema_decay=0.999, grad_clip=1.0, learning_rate=4e-4, warmup_steps=100, look="rendering"),
    )


def srraw_8x() -> ExperimentConfig:
    """srraw_4x at 8x."""
    base = srraw_4x()
    return replace(base, name="srraw_8x", model=replace(base.model, scale=8))


def smoke() -> ExperimentConfig:
    """Tiny: takes seconds on a CPU, to check that every stage runs."""
    return ExperimentConfig(
        name="smoke",
        model=SDANConfig(features=8, blocks=1, packing_kernel=4, skip="rendering"),
        loss=LossConfig(kind="charbonnier", self_reference_weight=1.0),
        train=TrainConfig(
            epochs=2,
            crops_per_epoch=4,
            crop_px=16,
            batch_per_worker=2,
            learning_rate=1e-3,
            val_crops=4,
            picture_every=1,
            look="rendering",
        ),
    )


def demo() -> ExperimentConfig:
    """A few minutes on two CPU cores."""
    return ExperimentConfig(
        name="demo",
        model=SDANConfig(input="packed", features=32, blocks=4, packing_kernel=4, skip="rendering"),
        loss=LossConfig(kind="charbonnier", self_reference_weight=1.0),
        train=TrainConfig(
            epochs=20, crops_per_epoch=160, crop_px=24, batch_per_worker=4,
            learning_rate=1e-3, restart_epochs=20, warmup_steps=20, grad_clip=1.0, ema_decay=0.98,
            validate_every=2, val_crops=24, picture_every=2, look="rendering",
        ),
    )  # fmt: skip


def starter() -> ExperimentConfig:
    """The starter model of the package: small, trained on simulated sequences towards their ideal pictures."""
    return ExperimentConfig(
        name="starter",
        model=SDANConfig(
            input="packed",
            encoding="sqrt",
            features=48,
            blocks=10,
            packing_kernel=4,
            skip="rendering",
            tones="kept",
            upsampling="direct",
        ),
        loss=LossConfig(
            kind="charbonnier",
            reference_weight=0.0,
            self_reference_weight=1.0,
            self_target="truth",
            align_weight=0.2,
            border_px=16,
            halo_weight=3.0,
        ),
        train=TrainConfig(
            epochs=20,
            crops_per_epoch=8192,
            crop_px=32,
            batch_per_worker=8,
            learning_rate=1e-3,
            learning_rate_floor=1e-5,
            restart_epochs=20,
            warmup_steps=200,
            ema_decay=0.998,
            grad_clip=1.0,
            validate_every=2,
            val_crops=64,
            picture_every=5,
            look="rendering",
            truth_blur_px=0.8,
        ),
    )


def starter_rgb() -> ExperimentConfig:
    """The starter model for JPG, PNG and TIFF.

    Input and target both have the tones of the camera's JPG (look=camera), so that the network keeps the tones of any
    picture. Cells of 2x2 pixels make the network as fast as starter. Half of the inputs are reduced pictures, the
    others cameras' JPGs.
    """
    base = starter()
    return replace(
        base,
        name="starter-rgb",
        model=replace(base.model, input="packed_rgb", encoding="linear"),
        train=replace(base.train, look="camera", reduced_share=0.5),
    )


CONFIGS: dict[str, Callable[[], ExperimentConfig]] = {
    function.__name__.replace("starter_", "starter-"): function
    for function in (paper_4x, paper_4x_rgb, srraw_4x, srraw_8x, smoke, demo, starter, starter_rgb)
}


DEFAULT = srraw_4x.__name__


def named(name: str) -> ExperimentConfig:
    """The config that `--config NAME` selects."""
    if name not in CONFIGS:
        raise ConfigError(f"--config: expected one of {', '.join(CONFIGS)}, got {name!r}")
    return CONFIGS[name]()


def chosen(name: str | None, assignments: Iterable[str]) -> ExperimentConfig:
    """The config of `--config NAME` (default srraw_4x) with its `--set KEY=VALUE` applied."""
    return override(named(name or DEFAULT), parse_assignments(assignments))


def flatten(config: ExperimentConfig) -> dict[str, Any]:
    """Every value by its dotted name, e.g. {'model.packing_kernel': 8, ...}."""
    flat: dict[str, Any] = {"name": config.name, "architecture": config.architecture}
    for section in ("model", "loss", "train"):
        part = getattr(config, section)
        flat.update({f"{section}.{item.name}": getattr(part, item.name) for item in fields(part)})
    return flat


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """JSON-ready values; `from_dict` is the inverse."""
    return dataclasses.asdict(config)


def from_dict(stored: Mapping[str, Any]) -> ExperimentConfig:
    """A config written by `to_dict` of this or an older version; values added since then get their defaults."""
    known: dict[str, Any] = {
        "model": _model(stored.get("model", {})),
        "loss": _build(LossConfig, stored.get("loss", {})),
        "train": _build(TrainConfig, stored.get("train", {})),
    }
    first = stored.get("first_schedule")
    return ExperimentConfig(
        name=str(stored.get("name", "stored")),
        **known,
        architecture=stored.get("architecture", "SDAN"),
        first_schedule=(int(first[0]), float(first[1])) if first else None,
    )


def _model(values: Mapping[str, Any]) -> SDANConfig:
    try:
        return SDANConfig.from_stored(values)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _build(cls: type, values: Mapping[str, Any]) -> Any:
    unknown = set(values) - {item.name for item in fields(cls)}
    if unknown:
        raise ConfigError(
            f"{cls.__name__}: expected known values, got {sorted(unknown)}; use the newer SDAN that wrote it"
        )
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """['model.features=32'] -> {'model.features': '32'}."""
    parsed = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set: expected KEY=VALUE, got {assignment!r}; e.g. --set model.packing_kernel=4")
        parsed[key.strip()] = value.strip()
    return parsed


def override(config: ExperimentConfig, overrides: Mapping[str, Any]) -> ExperimentConfig:
    """The config with single values replaced by dotted name.

    Args:
        overrides: dotted name -> value; text is parsed as the field's type, other values must already have it.

    Raises:
        ConfigError: unknown key (with the nearest known one), value of the wrong type or out of range.
    """
    known = [name for name in flatten(config) if "." in name]
    sections: dict[str, dict[str, Any]] = {"model": {}, "loss": {}, "train": {}}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else f"; keys are {', '.join(known)}"
            raise ConfigError(f"--set: expected a known key, got {key!r}{hint}")
        kind = typing.get_type_hints(type(getattr(config, section)))[name]
        sections[section][name] = _read(key, value, kind)
    try:
        changed = {name: replace(getattr(config, name), **values) for name, values in sections.items() if values}
        return replace(config, **changed)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"--set: {error}") from error


def _read(key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`: int, float, bool, str, a Literal, an optional, or a tuple of one type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    text = value if isinstance(value, str) else repr(value)
    if origin in (types.UnionType, typing.Union):
        if value is None or text.lower() == "none":
            return None
        return _read(key, value, next(argument for argument in arguments if argument is not type(None)))
    if origin is typing.Literal:
        for choice in arguments:
            if text == str(choice) or value == choice:
                return choice
        raise ConfigError(f"--set {key}: expected one of {', '.join(map(str, arguments))}, got {text}")
    if origin is tuple:
        parts = value if isinstance(value, (tuple, list)) else text.strip("()[]").split(",")
        if len(parts) != len(arguments):
            raise ConfigError(f"--set {key}: expected {len(arguments)} values separated by commas, got {text}")
        return tuple(_read(key, part, argument) for part, argument in zip(parts, arguments, strict=True))
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ConfigError(f"--set {key}: expected true or false, got {text}")
    try:
        if kind is int and float(text) != int(float(text)):
            raise ValueError
        return kind(float(text)) if kind is int else kind(value)
    except (ValueError, OverflowError):
        raise ConfigError(f"--set {key}: expected {kind.__name__}, got {text}") from None
