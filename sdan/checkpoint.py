"""A model as a folder that describes itself.

    model.safetensors   weights
    config.json         format, architecture, network (SDANConfig), config (the whole run), scores, commit, versions
    trainer.pt          optional: what is needed to resume, plain values and tensors only

Loading needs no flags, and nothing is ever unpickled into code.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sdan.baselines import SRResNet
from sdan.network import SDAN, SDANConfig

FORMAT_VERSION = 1
WEIGHTS, DESCRIPTION, TRAINER = "model.safetensors", "config.json", "trainer.pt"
ARCHITECTURES: dict[str, type[SDAN] | type[SRResNet]] = {"SDAN": SDAN, "SRResNet": SRResNet}
PACKAGES = ("torch", "torchvision", "safetensors", "numpy", "ray", "mlflow")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; one line that says what was expected and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load` returns."""

    model: SDAN | SRResNet
    """On the CPU, in eval mode."""
    config: dict[str, Any]
    """The run's configs, as they were given to `save`."""
    scores: dict[str, Any]
    commit: str | None
    """Of the code that wrote it; None where that was not known."""
    versions: dict[str, str]
    """Package name -> version."""


def save(
    folder: str | Path,
    model: nn.Module,
    *,
    config: Mapping[str, Any],
    scores: Mapping[str, Any],
    trainer_state: Mapping[str, Any] | None = None,
    commit: str | None = None,
) -> Path:
    """Write a checkpoint aside, then put it in place in one step; an older one of the same name is replaced.

    A reader finds the old checkpoint or the new one, never parts of both.

    Args:
        folder: e.g. runs/NAME/best; parents are made.
        model: SDAN or SRResNet, on any device, not wrapped (pass `.module` of DistributedDataParallel).
        config: the run's configs, JSON-ready.
        scores: name -> number, JSON-ready (a NaN or an infinity is stored as null).
        trainer_state: tensors and plain values for resuming (state_dicts, step, ...), or None.
        commit: of the code; None: asked of git, if the code lies in a repository.

    Returns:
        the folder.

    Raises:
        CheckpointError: not writable, or a folder in the way that is no checkpoint.
    """
    folder = Path(folder).absolute()
    name = type(model).__name__
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{folder}: a model of type {' or '.join(ARCHITECTURES)} expected, got {name}")
    if folder.exists() and not _replaceable(folder):
        raise CheckpointError(f"{folder}: a checkpoint or an empty folder expected, got other files; choose another")
    description = {
        "format": FORMAT_VERSION,
        "architecture": name,
        "network": asdict(model.config),  # type: ignore[call-overload]
        "config": dict(config),
        "scores": {key: _finite(value) for key, value in scores.items()},
        "commit": commit or code_commit(),
        "versions": package_versions(),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        save_file(weights, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / DESCRIPTION).write_text(json.dumps(description, indent=2, allow_nan=False) + "\n")
        if trainer_state is not None:
            torch.save(dict(trainer_state), aside / TRAINER)
        aside.chmod(0o755)  # mkdtemp's folders are private
        _put_in_place(aside, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written ({error}); free space or choose another folder") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def load(folder: str | Path) -> Checkpoint:
    """Read a checkpoint back: the model is built from its own description.

    Raises:
        CheckpointError: no such folder, a missing or damaged file, weights of another network, or a newer format.
    """
    folder = _present(Path(folder))
    described = _described(folder)
    try:
        known = {field.name for field in fields(SDANConfig)}
        unknown = set(described["network"]) - known
        if unknown:
            raise ValueError(f"unknown settings {sorted(unknown)}")
        model = ARCHITECTURES[described["architecture"]](SDANConfig(**described["network"]))
        config, scores = dict(described["config"]), dict(described["scores"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / DESCRIPTION}: a description of a network expected, got {error!r}") from error
    _load_weights(model, folder / WEIGHTS)
    model.tile_px = _tile_px(model.config, config)
    return Checkpoint(model.eval(), config, scores, described.get("commit"), dict(described.get("versions", {})))


def load_trainer_state(folder: str | Path) -> dict[str, Any]:
    """What `save` got as trainer_state, on the CPU; read with weights_only=True.

    Raises:
        CheckpointError: there is none, or it is damaged or holds anything but tensors and plain values.
    """
    path = _present(Path(folder)) / TRAINER
    if not path.is_file():
        raise CheckpointError(f"{path}: expected for resuming, not there; start a new run from this model instead")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(f"{path}: tensors and plain values expected, cannot be read ({reason})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: a dictionary expected, got {type(state).__name__}")
    return state


def _tile_px(network: SDANConfig, run: Mapping[str, Any]) -> int | None:
    """Side of the run's training crops, pixels of the network's input; None if the run's config does not say."""
    train = run.get("train")
    crop_px = train.get("crop_px") if isinstance(train, Mapping) else None
    return network.input_px(crop_px) if isinstance(crop_px, int) else None


def _described(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        described = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: expected in a checkpoint, cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: JSON expected, got something else ({error}); was it edited?") from error
    if not isinstance(described, dict) or not isinstance(described.get("format"), int):
        raise CheckpointError(f"{path}: an SDAN checkpoint's description expected, got no format number")
    if described["format"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {FORMAT_VERSION} or older expected, got {described['format']}; "
            "it was written by a newer SDAN: update this one"
        )
    return described


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: expected in a checkpoint, not there; was it copied whole?")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: weights expected, cannot be read ({error}); copy it again") from error
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    got = {key: tuple(value.shape) for key, value in weights.items()}
    if wanted != got:
        differing = sorted(key for key in wanted | got if wanted.get(key) != got.get(key))
        first = differing[0]
        raise CheckpointError(
            f"{path}: the weights of the network in {DESCRIPTION} expected, {len(differing)} differ, first {first}: "
            f"expected {wanted.get(first, 'none')}, got {got.get(first, 'none')}"
        )
    model.load_state_dict(weights)


def _present(folder: Path) -> Path:
    """The folder, or the one that a killed `save` had just moved out of its way."""
    if folder.is_dir():
        return folder
    if _replaced(folder).is_dir():
        return _replaced(folder)
    got = "a file" if folder.exists() else "no such folder"
    raise CheckpointError(f"{folder}: a checkpoint folder expected, got {got}; check the path, or train a model first")


def _replaced(folder: Path) -> Path:
    return folder.absolute().with_name(f".{folder.absolute().name}.replaced")


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / DESCRIPTION).is_file() or not any(folder.iterdir()))


def _put_in_place(aside: Path, folder: Path) -> None:
    replaced = _replaced(folder)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    aside.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def package_versions() -> dict[str, str]:
    """Package name -> version of what a model's numbers depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def code_commit() -> str | None:
    """The commit of this code; None where it does not lie in a repository."""
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
