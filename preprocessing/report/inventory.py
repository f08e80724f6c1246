"""Reads what a SHARDS folder holds from the shards' footers and measurements: no pictures, a few KB per shard."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from preprocessing.schema import SchemaError, ShardInfo, info_of, list_shards
from preprocessing.shard_folder.names import note_files
from preprocessing.shard_folder.set_aside import parse_note
from preprocessing.shard_folder.small_json import SmallJsonError
from preprocessing.storage import Folder, one_line, open_folder

_READERS = 16
PAIR_COLUMNS = (
    *("sequence", "pair", "camera", "focal_lr_mm", "focal_hr_mm", "iso_lr", "iso_hr", "aligned_by"),
    *("lr_source", "hr_source", "exposure_ratio_exif", "exposure_ratio", "exposure_falloff"),
    *("jpg_scale", "jpg_k1", "jpg_shift_x", "jpg_shift_y", "jpg_falloff"),
)
_NULL_CHUNK_BYTES = 128
"""A column chunk that holds one null is smaller than this; one that holds the smallest true_flow is larger."""


class InspectError(ValueError):
    """A folder without anything to report on; the message is one line."""


@dataclass(frozen=True)
class Pair:
    """One shard."""

    path: str
    split: str
    columns: dict[str, Any]
    """The values of `PAIR_COLUMNS`."""
    residual_px: NDArray[np.float32]
    """Of each tile; NaN if not measurable."""
    simulated: bool
    bytes: int

    @property
    def median_px(self) -> float:
        """Median of the tiles' residuals; infinite, the worst rank, if no tile could be measured."""
        known = self.residual_px[np.isfinite(self.residual_px)]
        return float(np.median(known)) if known.size else float("inf")


@dataclass
class Inventory:
    """The contents of a SHARDS folder."""

    label: str
    info: ShardInfo | None = None
    pairs: list[Pair] = field(default_factory=list)
    quarantine: list[dict[str, str]] = field(default_factory=list)
    unreadable: list[dict[str, str]] = field(default_factory=list)
    """Shard files that are damaged or of another schema version."""


def read_inventory(shards: str, progress: Callable[[int, int], None] | None = None) -> Inventory:
    """The contents of the folder or `s3://` URI `shards`.

    progress: called with (files read, total files), first with 0.
    Raises InspectError, one line, for an unreadable folder, a folder with neither shards nor quarantine, and shards of
    another schema version.
    """
    try:
        folder = open_folder(shards)
        return _read(folder, list_shards(shards), progress)
    except (OSError, pa.ArrowException) as error:
        raise InspectError(
            f"{shards}: expected a SHARDS folder of sdan preprocess, got {one_line(error)}; check the path"
        ) from error


def ranking(pairs: Iterable[Pair]) -> list[Pair]:
    """Worst-aligned first; pairs without a measurable tile lead."""
    return sorted(pairs, key=lambda pair: (-pair.median_px, pair.path))


def _read(folder: Folder, paths: list[str], progress: Callable[[int, int], None] | None) -> Inventory:
    inventory = Inventory(folder.label)
    if progress and paths:
        progress(0, len(paths))
    with ThreadPoolExecutor(_READERS) as readers:
        for done, (path, pair) in enumerate(
            zip(paths, readers.map(lambda path: _read_pair(folder, path), paths), strict=True), 1
        ):
            if isinstance(pair, Pair):
                inventory.pairs.append(pair)
            else:
                inventory.unreadable.append({"file": folder.relative(path), "reason": pair})
            if progress:
                progress(done, len(paths))
    if inventory.unreadable and not inventory.pairs:
        raise InspectError(inventory.unreadable[0]["reason"])
    if inventory.pairs:
        path = inventory.pairs[0].path
        inventory.info = info_of(pq.read_schema(path, filesystem=folder.filesystem), path)
    for _, path in sorted(note_files(folder).items()):
        inventory.quarantine.append(_note(folder, path))
    if not inventory.pairs and not inventory.quarantine:
        raise InspectError(
            f"{folder.label}: expected shards or a quarantine, got neither; make them with sdan preprocess RAW SHARDS"
        )
    return inventory


def _read_pair(folder: Folder, path: str) -> Pair | str:
    """The shard, or the reason why it cannot be read."""
    try:
        with pq.ParquetFile(path, filesystem=folder.filesystem, pre_buffer=True) as file:
            info_of(file.schema_arrow, path)
            flow = file.metadata.row_group(0).column(file.schema_arrow.names.index("true_flow"))
            last = file.metadata.row_group(file.num_row_groups - 1)
            end = last.column(last.num_columns - 1)
            tiles = file.read(columns=["residual_px"])
            return Pair(
                path=path,
                split=folder.relative(path).partition("/")[0].removeprefix("split="),
                columns=file.read_row_group(0, columns=list(PAIR_COLUMNS)).to_pylist()[0],
                residual_px=tiles["residual_px"].to_numpy(),
                simulated=flow.total_uncompressed_size > _NULL_CHUNK_BYTES,
                bytes=end.data_page_offset + end.total_compressed_size,
            )
    except SchemaError as error:
        return str(error)
    except (OSError, ValueError, IndexError, pa.ArrowException) as error:
        return f"{path}: expected a complete shard, got {one_line(error)}; delete it and preprocess again"


def _note(folder: Folder, path: str) -> dict[str, str]:
    try:
        note = parse_note(folder, path)
        return {"sequence": note["sequence"], "pair": note["pair"], "reason": note["reason"]}
    except SmallJsonError:
        return {"sequence": path, "pair": "", "reason": "this quarantine note is damaged; run sdan preprocess again"}
