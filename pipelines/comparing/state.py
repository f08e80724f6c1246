"""The output folder of a comparison: what it was started with, what is finished, and every file name in it.

compare.json              Comparison: what the same command must ask for to go on
shards.json               the pairs of the splits train and val, listed once, for all rows
rows/NAME/scores.json     RowScores; its presence means that the row is finished
rows/NAME/tiles.parquet   the scores of single tiles: columns method, protocol, tile, held_out.OF_TILE, TARGET_METRIC
crops/TILE/NAME.png       the output of row NAME for a held-out crop (self), and target.png; true.png (simulated)
oracle/TILE/NAME.png      the output with Y' as reference
offsets/TILE/NAME.npy     float16 [2, H, W]: the offsets (dy, dx) of that pass, mosaic pixels
tableN.md, tableN.csv     the table, written again after each row
grid.png                  crops by method
report.html               the tables and crops on one page (pipelines/reporting/)

The trained networks are runs in DATA/runs (run_name).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.comparing.rows import CompareError
from pipelines.loader import ShardIndex, index_split, require_unchanged
from pipelines.training.run_folder import RunShards
from preprocessing.shard_folder.small_json import SmallJsonError, read_json
from preprocessing.storage import write_atomically

STATE, ROWS, CROPS, ORACLE, OFFSETS, GRID = "compare.json", "rows", "crops", "oracle", "offsets", "grid.png"
SCORES, TARGET, TRUE = "scores.json", "target.png", "true.png"

Ends = list[float | None]
"""[mean, low, high] of a bootstrap.Interval; null for NaN."""


@dataclass(frozen=True)
class Comparison:
    """compare.json: what is equal for all rows."""

    table: int
    shards: str
    changes: dict[str, str]
    """--set: dotted name -> value."""
    steps: int | None
    split: str
    """The split that is scored."""
    crops: int
    """The most crops that are scored."""
    scored_pairs: str
    """ShardIndex.digest of that split."""
    id: str = ""
    """Random; in the names of its runs."""
    parent_run: str = ""
    """The MLflow run whose children are the rows."""

    def run_name(self, row: str) -> str:
        """The name of a row's training run."""
        return f"compare-{self.id}-{row}"

    def write(self, out: Path) -> None:
        """Write compare.json."""
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / STATE, json.dumps(asdict(self), indent=2))


@dataclass(frozen=True)
class RowScores:
    """scores.json: one finished row."""

    row: str
    label: str
    input: str
    scores: dict[str, dict[str, float | None]]
    """Protocol -> <target>_<metric>, offset_roughness, alignment_gain, epe_px, ... -> mean; null: there is none."""
    intervals: dict[str, dict[str, Ends]]
    """Protocol -> <target>_<metric> -> mean and confidence interval over sequences."""
    differences: dict[str, dict[str, Ends]]
    """The same of the differences from bicubic of the camera JPG, tile by tile."""
    crops: int
    """Number of crops that were scored."""
    sequences: int
    """Number of sequences that these are of."""
    simulated: bool
    features: str | None = None
    """The feature network of its loss: VGG19, VGG16, or none."""
    parameters: int | None = None
    """Of the network as it zooms and aligns; null without one."""
    ms_per_megapixel: float | None = None
    """Milliseconds a megapixel of the input; null until it is measured, after the last training."""
    run: str | None = None
    """The name of the training run in DATA/runs."""
    config: dict[str, Any] = field(default_factory=dict)
    """config.to_dict of that run."""
    missing: dict[str, str] = field(default_factory=dict)
    """Metric that could not be computed -> why."""
    device: str = ""
    """The processor that ms_per_megapixel was measured on."""

    def write(self, out: Path) -> None:
        """Write scores.json: the row is finished now."""
        folder = row_folder(out, self.row)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / SCORES, json.dumps(asdict(self), indent=2))


def row_folder(out: Path, name: str) -> Path:
    """rows/NAME."""
    return out / ROWS / name


def read_scores(out: Path, name: str) -> RowScores | None:
    """A finished row; None if it is not finished.

    Raises:
        CompareError: a damaged file.
    """
    path = row_folder(out, name) / SCORES
    if not path.exists():
        return None
    try:
        return read_json(path, RowScores, max_bytes=16_000_000)
    except (SmallJsonError, OSError) as error:
        raise CompareError(f"{error}; delete it, and the row is scored again") from error


def open_comparison(out: Path, wanted: Comparison) -> tuple[Comparison, bool]:
    """(the comparison in `out`, whether it was there before): a new one gets an id, and nothing is written.

    Raises:
        CompareError: the folder has one with other options, or a damaged one.
    """
    path = out / STATE
    if not path.exists():
        return replace(wanted, id=uuid.uuid4().hex[:8]), False
    try:
        stored = read_json(path, Comparison)
    except (SmallJsonError, OSError) as error:
        raise CompareError(f"{error}; choose another -o") from error
    same = replace(wanted, id=stored.id, parent_run=stored.parent_run)
    for name, value in asdict(same).items():
        before = getattr(stored, name)
        if before != value:
            raise CompareError(
                f"-o {out}, {name}: expected {before}, as when this comparison was started, got {value}; "
                "choose another -o for a new one"
            )
    return stored, True


def open_shards(out: Path, shards: str, split: str) -> tuple[RunShards, ShardIndex]:
    """(the pairs that every row trains and validates on, those of the scored split), listed once per comparison.

    Raises:
        ShardsError: no pairs, or other ones than when the comparison was started.
    """
    kept = RunShards.read(out)
    if kept is None:
        kept = RunShards(index_split(shards, "train"), index_split(shards, "val"))
    else:
        require_unchanged(kept.train)
        require_unchanged(kept.val)
    scored: Mapping[str, ShardIndex] = {"train": kept.train, "val": kept.val}
    return kept, scored.get(split) or index_split(shards, split)


def tile_name(name: str) -> str:
    """A folder name for a crop, from HeldOut.names: 00005/00006-00002@64,0 becomes 00005_00006-00002_64_0."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("._") or "tile"
