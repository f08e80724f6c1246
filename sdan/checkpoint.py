"""The checkpoint format: a folder from which the model is rebuilt without any flags.

    model.safetensors   weights
    config.json         the description, see below
    trainer.pt          optional, for resuming: tensors and plain values only

config.json holds `format` (FORMAT_VERSION), `architecture` (a key of ARCHITECTURES), `network` (the fields of
SDANConfig), `config` (the configs of the run; `train.crop_px` gives the model's `input_tile_px`), `scores`, `commit`,
`versions` and `weights_sha256` (`weights_digest`; older checkpoints lack it). To add a network class, add it to
ARCHITECTURES. A field added to SDANConfig needs a default or an entry in SDANConfig.from_stored, so that older
checkpoints still load.

Nothing is ever unpickled into code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sdan.baselines import SRResNet
from sdan.network import SDAN, SDANConfig

FORMAT_VERSION = 1
WEIGHTS, DESCRIPTION, TRAINER = "model.safetensors", "config.json", "trainer.pt"
ARCHITECTURES: dict[str, type[SDAN] | type[SRResNet]] = {"SDAN": SDAN, "SRResNet": SRResNet}
PACKAGES = ("torch", "torchvision", "safetensors", "numpy", "ray", "mlflow")
"""Packages whose versions are stored."""
_MOST_DESCRIPTION_BYTES = 16_000_000
_MOST_CROP_PX = 8192
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "architecture": str,
    "network": dict,
    "config": dict,
    "scores": dict,
    "commit": (str, type(None)),
    "versions": dict,
    "weights_sha256": (str, type(None)),
}
_DRAWS = ("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_")
"""Functions that give new layers random values."""
_OPTIONAL = ("commit", "versions", "weights_sha256")


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message is one line that says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    model: SDAN | SRResNet
    """On the CPU, in eval mode."""
    config: dict[str, Any]
    """The run's configs, as passed to `save`."""
    scores: dict[str, Any]
    """Name -> number, or None for one that was not finite."""
    commit: str | None
    """The commit of the code that wrote the checkpoint; None if unknown."""
    versions: dict[str, str]
    """Package name -> version when the checkpoint was written."""


def save(
    folder: str | Path,
    model: nn.Module,
    *,
    config: Mapping[str, Any],
    scores: Mapping[str, Any],
    trainer_state: Mapping[str, Any] | None = None,
    commit: str | None = None,
) -> Path:
    """Write a checkpoint; an existing one in the same folder is replaced as a whole.

    A reader finds the old checkpoint or the new one, never parts of both: files are written to a temporary folder,
    which is then renamed.

    Args:
        folder: e.g. runs/NAME/best; parents are created.
        model: SDAN or SRResNet, on any device, not wrapped (pass `.module` of DistributedDataParallel).
        config: the run's configs, JSON-serialisable.
        scores: name -> number, JSON-serialisable (NaN and infinity are stored as null).
        trainer_state: tensors and plain values for resuming (state_dicts, step, ...), or None.
        commit: the code's commit; None: ask git, if the code is in a repository.

    Returns:
        the absolute path of the folder.

    Raises:
        CheckpointError: the folder cannot be written, or holds files that are no checkpoint.
    """
    folder = Path(folder).absolute()
    name = type(model).__name__
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{folder}: expected a model of type {' or '.join(ARCHITECTURES)}, got {name}")
    if folder.exists() and not _replaceable(folder):
        raise CheckpointError(f"{folder}: expected a checkpoint or an empty folder, got other files; choose another")
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    description = {
        "format": FORMAT_VERSION,
        "architecture": name,
        "network": asdict(model.config),  # type: ignore[call-overload]
        "config": dict(config),
        "scores": {key: _null_unless_finite(value) for key, value in scores.items()},
        "commit": commit or code_commit(),
        "versions": package_versions(),
        "weights_sha256": weights_digest(weights),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"{folder}: expected a writable folder, got {error.strerror}; choose another") from error
    try:
        _write_files(aside, weights, description, trainer_state)
        _replace_folder(aside, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: expected a writable folder, got {error}; free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _write_files(
    folder: Path, weights: dict[str, Tensor], description: dict[str, Any], trainer_state: Mapping[str, Any] | None
) -> None:
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2, allow_nan=False) + "\n")
    if trainer_state is not None:
        torch.save(dict(trainer_state), folder / TRAINER)
    folder.chmod(0o755)  # mkdtemp creates private folders


def load(folder: str | Path) -> Checkpoint:
    """Read a checkpoint; the model is built from its description, and the run's config gives its `input_tile_px`.

    The description is compared with the shapes in the weights' header before layers are built.

    Raises:
        CheckpointError: no such folder, a missing or damaged file, weights of another network or other than those that
            were saved, values that are not finite, or a newer format.
    """
    folder = _find(Path(folder))
    described = _read_description(folder)
    architecture = ARCHITECTURES.get(described["architecture"])
    try:
        if architecture is None:
            raise ValueError(f"architecture {described['architecture']!r}")
        network = SDANConfig.from_stored(described["network"])
        input_tile_px = _input_tile_px(network, described["config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / DESCRIPTION}: expected a network's description, got {error}") from error
    weights = _read_weights(folder / WEIGHTS, architecture, network)
    _check_values(folder / WEIGHTS, weights, described.get("weights_sha256"))
    model = architecture(network)
    model.load_state_dict(weights)
    model.input_tile_px = input_tile_px
    versions = dict(described.get("versions", {}))
    return Checkpoint(model.eval(), described["config"], described["scores"], described.get("commit"), versions)


def load_trainer_state(folder: str | Path) -> dict[str, Any]:
    """Read the trainer_state passed to `save`, onto the CPU, with weights_only=True.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but tensors and plain values.
    """
    path = _find(Path(folder)) / TRAINER
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a trainer state, got none; start a new run from this model")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(f"{path}: expected tensors and plain values, got {reason}; start a new run") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a dictionary, got {type(state).__name__}; start a new run")
    return state


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors (on the CPU) by name: names, types, shapes and bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _input_tile_px(network: SDANConfig, run: Mapping[str, Any]) -> int | None:
    """Side of the run's training crops, pixels of the network's input; None if the run's config lacks it.

    Raises ValueError: a side that the network cannot take.
    """
    train = run.get("train")
    crop_px = train.get("crop_px") if isinstance(train, Mapping) else None
    if not isinstance(crop_px, int):
        return None
    if not 1 <= crop_px <= _MOST_CROP_PX:
        raise ValueError(f"train.crop_px: expected 1 to {_MOST_CROP_PX}, got {crop_px}")
    network.check_crop(network.input_px(crop_px))
    return network.input_px(crop_px)


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_DESCRIPTION_BYTES + 1)
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint's file, got {error.strerror}; copy the whole folder again"
        ) from error
    try:
        if len(data) > _MOST_DESCRIPTION_BYTES:
            raise ValueError(f"more than {_MOST_DESCRIPTION_BYTES} bytes")
        described = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}; copy the checkpoint again") from error
    if not isinstance(described, dict) or type(described.get("format")) is not int:
        raise CheckpointError(f"{path}: expected an SDAN checkpoint's description, got no format number")
    if described["format"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected format {FORMAT_VERSION} or older, got {described['format']}; "
            "it was written by a newer SDAN, so update this one"
        )
    for name, kind in _FIELDS.items():
        if name in described or name not in _OPTIONAL:
            value = described.get(name)
            if not isinstance(value, kind):
                raise CheckpointError(
                    f"{path}: expected a network's description, got {name} of type {type(value).__name__}; "
                    "copy the checkpoint again"
                )
    return described


def _read_weights(path: Path, architecture: type[nn.Module], network: SDANConfig) -> dict[str, Tensor]:
    """The tensors of a weights file, after its header has been compared with the network."""
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a checkpoint's file, got none; copy the whole folder again")
    with torch.device("meta"), _WithoutValues():
        expected = {key: tuple(value.shape) for key, value in architecture(network).state_dict().items()}
    try:
        with safe_open(path, "pt") as file:
            got = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        weights = load_file(path) if got == expected else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected weights, got {error}; copy the checkpoint again") from error
    if expected != got:
        differing = sorted(key for key in expected | got if expected.get(key) != got.get(key))
        first = differing[0]
        raise CheckpointError(
            f"{path}: expected the weights of the network in {DESCRIPTION}, got {len(differing)} that differ; "
            f"{first}: expected {expected.get(first, 'none')}, got {got.get(first, 'none')}"
        )
    return weights


class _WithoutValues(TorchFunctionMode):
    """Inside, new layers get no initial values. On the device meta, drawing them would import torch._dynamo: seconds
    and 150 MB."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _check_values(path: Path, weights: Mapping[str, Tensor], digest: str | None) -> None:
    """Raise CheckpointError unless all values are finite and, where the digest is known, those that were saved."""
    infinite = [name for name, value in weights.items() if not value.isfinite().all()]
    if infinite:
        raise CheckpointError(
            f"{path}: expected finite weights, got NaN or infinity in {infinite[0]}; "
            "copy the checkpoint again, or use another model"
        )
    if digest is not None and digest != weights_digest(weights):
        raise CheckpointError(
            f"{path}: expected the weights that {DESCRIPTION} describes, got others (their SHA-256 differs); "
            "copy the checkpoint again"
        )


def _find(folder: Path) -> Path:
    """The folder, or its backup if a `save` was killed between its two renames."""
    if folder.is_dir():
        return folder
    if _backup(folder).is_dir():
        return _backup(folder)
    got = "a file" if folder.exists() else "none"
    raise CheckpointError(f"{folder}: expected a checkpoint folder, got {got}; check the path, or train a model first")


def _backup(folder: Path) -> Path:
    return folder.absolute().with_name(f".{folder.absolute().name}.replaced")


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / DESCRIPTION).is_file() or not any(folder.iterdir()))


def _replace_folder(aside: Path, folder: Path) -> None:
    backup = _backup(folder)
    if folder.exists():
        shutil.rmtree(backup, ignore_errors=True)
        folder.rename(backup)
    aside.rename(folder)
    shutil.rmtree(backup, ignore_errors=True)


def _null_unless_finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def package_versions() -> dict[str, str]:
    """Package name -> version of the installed packages that a model's numbers depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def code_commit() -> str | None:
    """The commit of this code; None if it is not in a git repository."""
    here = Path(__file__).parent
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
