"""The rows of the paper's Tables 1 and 2 as values: each is a named config, changed by dotted names.

The paper's starred rows are models that others trained, on other data. Here every row is trained on the same shards,
with the same trunk (16 residual blocks of SRResNet without normalisation), crops, seed and number of crops.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from pipelines import config as configs
from pipelines.config import Architecture, ConfigError, ExperimentConfig
from sdan.losses import VGG_WEIGHTS

VALIDATIONS = 10
"""Validations, each with a checkpoint, of a row that is trained with --steps."""
WARMUP_SHARE = 10
"""With --steps the warm-up takes at most one in this many steps."""
BUDGET = ("train.epochs", "train.crops_per_epoch", "train.restart_epochs")
"""The values that --steps sets."""
INPUT = "model.input"


class CompareError(ValueError):
    """A comparison that cannot start or go on; the message says what to do."""


@dataclass(frozen=True)
class Row:
    """One method of a table."""

    name: str
    """In --rows, in the folder of the output, and in the name of the training run."""
    label: str
    input: Literal["RAW", "RGB"]
    base: str = "paper_4x"
    """The named config that it starts from."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Dotted name -> value: what makes it this row. --set cannot change these."""
    architecture: Architecture = "SDAN"
    picture: Literal["camera", "rendering"] | None = None
    """The picture that a row without a network enlarges bicubically; None: a network."""

    @property
    def needs_vgg(self) -> bool:
        """Whether its loss compares features of VGG-19 or VGG16."""
        return any(self.overrides.get(f"loss.{name}", 0) > 0 for name in VGG_WEIGHTS)

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols that differ for it: a network without alignment ignores the reference."""
        return ("self", "oracle") if self.picture is None and self.architecture == "SDAN" else ("self",)


def _srresnet(name: str, label: str, kind: Literal["RAW", "RGB"], **loss: Any) -> Row:
    base = "paper_4x" if kind == "RAW" else "paper_4x_rgb"
    overrides = {f"loss.{term}": value for term, value in loss.items()}
    return Row(name, label, kind, base, overrides, architecture="SRResNet")


OURS: Mapping[str, Any] = {
    "model.offset_learner": "pyramid",
    "loss.known_shift_weight": 0.1,
    "loss.offset_smoothness_weight": 0.01,
    # The other rows learn the camera's look, and all rows are compared with the same targets.
    "train.look": "camera",
}
TABLE_1 = (
    Row("bicubic-camera", "Bicubic (camera JPG)", "RGB", picture="camera"),
    Row("bicubic-rendering", "Bicubic (rendering)", "RAW", picture="rendering"),
    _srresnet("srresnet", "SRResNet (L1)", "RGB"),
    # Weights of the papers: VGG term 0.006 and adversarial 0.001; VGG term 1, adversarial 0.005 and L1 0.01.
    _srresnet("srgan", "SRGAN", "RGB", pixel_weight=0.0, perceptual_weight=0.006, adversarial_weight=0.001),
    _srresnet("perceptual", "Perceptual", "RAW", pixel_weight=0.0, perceptual_weight=1.0),
    _srresnet(
        "esrgan",
        "ESRGAN",
        "RGB",
        pixel_weight=0.01,
        perceptual_weight=1.0,
        adversarial_weight=0.005,
        adversarial_kind="relativistic",
    ),
    _srresnet("srresnet-cx-rgb", "SRResNet+CX", "RGB", pixel_weight=0.0, contextual_weight=1.0),
    _srresnet("srresnet-cx-raw", "SRResNet+CX", "RAW", pixel_weight=0.0, contextual_weight=1.0),
    _srresnet("srresnet-cobi-raw", "SRResNet+CoBi", "RAW", pixel_weight=0.0, cobi_rgb_weight=1.0, cobi_vgg_weight=1.0),
    Row("sdan-rgb", "SDAN (the paper's)", "RGB", "paper_4x_rgb"),
    Row("sdan-raw", "SDAN (the paper's)", "RAW"),
    Row("ours", "SDAN (ours)", "RAW", "srraw_4x", OURS),
)


def _ablation(name: str, label: str, offset: str, attention: str, flips: bool) -> Row:
    values = {"model.offset": offset, "model.attention": attention, "model.flips": flips}
    return Row(name, label, "RAW", overrides=values)


TABLE_2 = (
    Row("bicubic-camera", "Bicubic (camera JPG)", "RGB", picture="camera"),
    _ablation("dcn", "DCN", "per_point", "none", False),
    _ablation("sdcn", "SDCN", "squared", "none", False),
    _ablation("sdcn-cl", "SDCN + CL-Attention", "squared", "channel", False),
    _ablation("sdcn-cp", "SDCN + CP-Attention", "squared", "cross_packing", False),
    _ablation("sdcn-cp-flips", "SDCN + CP-Attention ++ Flip Augment", "squared", "cross_packing", True),
)
TABLES: Mapping[int, tuple[Row, ...]] = MappingProxyType({1: TABLE_1, 2: TABLE_2})


def chosen_rows(table: int, names: Iterable[str] = ()) -> tuple[Row, ...]:
    """The rows of a table, or those of them that are named, in the table's order.

    Raises:
        CompareError: no such table or row.
    """
    if table not in TABLES:
        raise CompareError(f"--table: expected {' or '.join(map(str, TABLES))}, got {table}")
    rows, wanted = TABLES[table], tuple(names)
    known = [row.name for row in rows]
    for name in wanted:
        if name not in known:
            raise CompareError(f"--rows, table {table}: expected names of {', '.join(known)}, got {name!r}")
    return tuple(row for row in rows if not wanted or row.name in wanted)


def row_config(row: Row, changes: Mapping[str, Any], steps: int | None) -> ExperimentConfig:
    """The config that a row is trained with.

    Args:
        changes: dotted name -> value, for every row of the comparison.
        steps: optimizer steps with one worker; None: the epochs of the row's config.

    Raises:
        ConfigError: an unknown name, a value out of range, or one that makes the row what it is.
    """
    for key in changes:
        if key in row.overrides:
            raise ConfigError(f"--set {key}, row {row.name}: expected its own value, got {changes[key]}; leave it out")
    if steps is not None and (set_twice := next((name for name in BUDGET if name in changes), None)):
        raise ConfigError(f"--set {set_twice}: expected none beside --steps {steps}, got one; leave one of them out")
    values = {**changes, **row.overrides}
    if INPUT in values:
        values[INPUT] = _own_input(row, str(values[INPUT]))
    config = configs.override(configs.named(row.base), values)
    config = replace(config, name=row.name, architecture=row.architecture)
    return config if steps is None else _with_budget(config, steps)


def _own_input(row: Row, wanted: str) -> str:
    """The row's form of --set model.input: RAW and RGB rows of one table both take whole pixels or cells of 2x2."""
    forms = {"mosaic": ("mosaic", "rgb"), "packed": ("packed", "packed_rgb")}
    if wanted not in forms:
        raise ConfigError(
            f"--set {INPUT}: expected mosaic (for RGB rows: rgb) or packed (for RGB rows: packed_rgb), got {wanted}"
        )
    return forms[wanted][row.input == "RGB"]


def _with_budget(config: ExperimentConfig, steps: int) -> ExperimentConfig:
    """`config` for this number of steps: one period of the cosine."""
    if steps < 1:
        raise CompareError(f"--steps: expected at least 1, got {steps}")
    epochs = min(VALIDATIONS, steps)
    train = replace(
        config.train,
        epochs=epochs,
        crops_per_epoch=-(-steps * config.train.batch_per_worker // epochs),
        restart_epochs=epochs,
        warmup_steps=min(config.train.warmup_steps, steps // WARMUP_SHARE),
    )
    return replace(config, train=train)
