"""Estimate a run before it starts: tiles and bytes from the frames' sizes, time from the last run's rate.

Also the memory to reserve for each task.
"""

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from preprocessing.plan import PairJob, PreprocessError, PreprocessOptions
from preprocessing.registration.register import MAX_SCALE_CHANGE
from preprocessing.schema import ARRAYS, RAW_ARRAYS, ShardInfo
from preprocessing.shard_folder.names import RATE, read_stored
from preprocessing.shard_folder.small_json import SmallJsonError, parse_json
from preprocessing.storage import Folder
from preprocessing.tiles import tile_starts

COMPRESSION_RATIO = 0.65
"""zstd-compressed size / raw size of tiles of photographs; used until a run has measured it."""
_MARGIN_PX = 4
"""Packed pixels by which the shared area may exceed its estimate."""
_TASK_BYTES = 350_000_000
_TASK_BYTES_PER_PIXEL = 45
"""Measured peak of a Ray worker and its child, plus a quarter (benchmarks/preprocess.py)."""


@dataclass(frozen=True)
class Rate:
    """Totals of the last run that wrote shards."""

    tiles: int
    bytes: int
    raw_bytes: int
    """Size of the same tiles uncompressed."""
    task_seconds: float
    """Sum over the tasks; each uses one CPU."""

    @classmethod
    def read(cls, target: Folder) -> "Rate | None":
        """The rate stored in SHARDS; None if missing or damaged. Raises OSError if SHARDS cannot be read."""
        stored = read_stored(target, RATE)
        with contextlib.suppress(SmallJsonError):
            found = parse_json(stored, RATE, cls) if stored is not None else None
            return found if found and min(asdict(found).values()) > 0 else None
        return None

    def write(self, target: Folder) -> None:
        target.put(RATE, json.dumps(asdict(self), indent=1).encode())


@dataclass(frozen=True)
class Estimate:
    tiles: int
    bytes: int
    """Compressed size of the shards."""
    seconds: float | None
    """None if SHARDS has no `Rate` yet."""
    cpus: float


def estimate(jobs: Sequence[PairJob], options: PreprocessOptions, rate: Rate | None, cpus: float) -> Estimate:
    """Estimate the total of `jobs` on this many CPUs, assuming that all of them are usable."""
    tiles = sum(num_tiles(job, options) for job in jobs)
    compressed = rate.bytes / rate.raw_bytes if rate else COMPRESSION_RATIO
    raw_bytes = sum(num_tiles(job, options) * tile_bytes(options, truth=job.has_truth) for job in jobs)
    seconds = rate.task_seconds / rate.tiles * tiles / cpus if rate else None
    return Estimate(tiles, round(raw_bytes * compressed), seconds, cpus)


def num_tiles(job: PairJob, options: PreprocessOptions) -> int:
    """Tiles in the area that the two frames share according to their focal lengths."""
    rows, cols = (len(tile_starts(side, options.tile_px, options.stride_px)) for side in shared_px(job))
    return rows * cols


def shared_px(job: PairJob) -> tuple[int, int]:
    """(shorter, longer) side, packed pixels, of the area that the two frames share according to their focal lengths."""
    unknown = (math.sqrt(job.pixels / 1.5), math.sqrt(job.pixels * 1.5))
    lr, hr = (sorted(exif.size or unknown) for exif in (job.lr_exif, job.hr_exif))
    short, long = (int(min(a, b / job.zoom)) // 2 for a, b in zip(lr, hr, strict=True))
    return short, long


def require_room_for_a_tile(jobs: Sequence[PairJob], options: PreprocessOptions) -> None:
    """Raise PreprocessError if, by the sizes in the tags, no pair can hold a tile. Pairs of unknown size could."""
    if not jobs or not all(job.lr_exif.size and job.hr_exif.size for job in jobs):
        return
    sides = [shared_px(job) for job in jobs]
    # Registration may find that the frames share a little more than their focal lengths say.
    slack = 1 + MAX_SCALE_CHANGE if options.align == "ecc" else 1.0
    if max(min(side) for side in sides) * slack + _MARGIN_PX >= options.tile_px:
        return
    height, width = max(sides, key=min)
    raise PreprocessError(
        f"--tile: expected at most the area that a pair's frames share, {width}x{height} packed pixels in the "
        f"largest pair, got {options.tile_px}; use --tile {max(8, min(height, width) // 8 * 8)}"
    )


def tile_bytes(options: PreprocessOptions, *, truth: bool) -> int:
    """Size of one tile's arrays, uncompressed."""
    info = ShardInfo(options.tile_px, options.scale, options.shard_options)
    names = [name for name in ARRAYS if truth or not name.startswith("true_")]
    if options.pictures:
        names = [name for name in names if name not in RAW_ARRAYS]
    return sum(np.dtype(ARRAYS[name][0]).itemsize * math.prod(info.shape(name)) for name in names)


def memory_bytes(job: PairJob) -> int:
    """Memory to reserve for a task. Rounded up in steps, so that pairs of similar size form one Ray Data job."""
    step = 128 * 1024 * 1024
    return -(-(_TASK_BYTES + _TASK_BYTES_PER_PIXEL * job.pixels) // step) * step
