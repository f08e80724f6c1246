"""`sdan export`: a model as one file for other programs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipelines.export import check, darktable
from preprocessing.storage import write_atomically
from sdan import STARTERS, checkpoint, starter_folder
from sdan.export import ExportError, TileZoom, trace, write_onnx, write_pt2

FORMATS = ("onnx", "darktable", "pt2")
_SUFFIXES = {".onnx": "onnx", ".pt2": "pt2"}


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    difference: float
    """Largest difference between the file's output and the model's, where pixels are in [0, 1]."""
    metadata: dict[str, str]

    def summary(self) -> str:
        """Lines for the user."""
        shown = ", ".join(f"{name} {value}" for name, value in self.metadata.items())
        return (
            f"{self.path} ({shown})\nchecked: at most {self.difference:.1e} from the model, where pixels are in [0, 1]"
        )


def chosen_format(out: Path, asked: str | None) -> str:
    """The format that was asked for, or else the one that the file's name ends in. Raises ExportError."""
    if asked is not None and asked not in FORMATS:
        raise ExportError(f"--format: expected onnx, darktable or pt2, got {asked}")
    named = _SUFFIXES.get(out.suffix.lower())
    if asked == "darktable":
        if named is not None:
            raise ExportError(f"-o {out}: expected a folder for darktable, got a {out.suffix} file; name a folder")
        return asked
    if named is None or asked not in (None, named):
        wanted = f".{asked}" if asked else ".onnx or .pt2"
        raise ExportError(
            f"-o {out}: expected a name that ends in {wanted}, got {out.name}; rename it, or use --format darktable"
        )
    return named


def check_request(out: Path, asked: str | None, *, overwrite: bool) -> str:
    """Every check that needs no model; returns the format.

    Raises:
        ExportError: a format or name that cannot be used.
        ModuleNotFoundError: a package of the extra `export` is missing.
    """
    kind = chosen_format(out, asked)
    if out.exists() and not overwrite:
        raise ExportError(f"-o {out}: expected a new name, got an existing one; choose another or add --overwrite")
    wanted, got = ("a folder", "a file") if kind == "darktable" else ("a file", "a folder")
    if out.exists() and out.is_dir() != (kind == "darktable"):
        raise ExportError(f"-o {out}: expected {wanted}, got {got}; choose another name")
    for package in () if kind == "pt2" else ("onnx", "onnxscript", "onnxruntime"):
        import_module(package)
    return kind


def export(folder: Path, out: Path, kind: str) -> Exported:
    """Write a checkpoint folder's model to `out`, and compare the file with the model.

    Args:
        folder: a checkpoint (registry.resolve_model).
        out: a file, or for darktable a folder; it appears complete or not at all.
        kind: one of FORMATS.

    Raises:
        ExportError: a model that this format cannot hold, or a file whose output differs from the model's.
        CheckpointError: no such model.
    """
    module = TileZoom(checkpoint.load(folder).model)
    if kind == "darktable":
        darktable.check(out, module.config)
    metadata = {**module.metadata(), "sdan_version": _own_version(), **_licence(folder)}
    program = trace(module)
    name = darktable.model_name(module.config) if kind == "darktable" else out.name
    target = out / name if kind == "darktable" else out
    with tempfile.TemporaryDirectory(prefix="sdan-export-") as place:
        written = Path(place) / f"model.{'pt2' if kind == 'pt2' else 'onnx'}"
        if kind == "pt2":
            write_pt2(program, written, metadata)
        else:
            write_onnx(program, written, metadata, module.inputs)
        difference = check.largest_difference(module, written)
        if not difference <= check.TOLERANCE:
            raise ExportError(
                f"-o {out}: expected a file that equals the model to {check.TOLERANCE:g}, got {difference:.2g}; "
                "nothing was written; report this with the versions of torch and onnxruntime"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, written.read_bytes())
    if kind == "darktable":
        write_atomically(out / darktable.CONFIG, darktable.config_json(out, module.config, metadata).encode())
    return Exported(target, difference, metadata)


def _own_version() -> str:
    try:
        return version("sdan")
    except PackageNotFoundError:
        return "unknown"


def _licence(folder: Path) -> dict[str, str]:
    """The starters' licence; that of another model is its owner's to say."""
    starters = [starter_folder(name) for name in STARTERS]
    return {"licence": "Apache-2.0"} if folder.resolve() in (each.resolve() for each in starters) else {}
