"""How much a run will take: its tiles and bytes from the frames' sizes, its time from what the last run took, and the
memory that a task must be given."""

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from preprocessing.plan import PairJob, PreprocessOptions
from preprocessing.schema import ARRAYS, ShardInfo
from preprocessing.storage import Folder
from preprocessing.tiles import spread

_RATE = "rate.json"
_COMPRESSED = 0.65
"""What zstd leaves of photographs' tiles; used until a run has measured it."""
_TASK_BYTES = 350_000_000
_TASK_BYTES_PER_PIXEL = 45
"""Measured peak of a Ray worker and its child, with a quarter to spare (benchmarks/preprocess.py)."""


@dataclass(frozen=True)
class Rate:
    """What the last run that wrote something took."""

    tiles: int
    bytes: int
    raw_bytes: int
    """Of the same tiles, uncompressed."""
    task_seconds: float
    """Summed over the tasks, each on one CPU."""

    @classmethod
    def read(cls, target: Folder) -> "Rate | None":
        """None where no run has been measured. Raises OSError when SHARDS cannot be read."""
        if not target.exists(_RATE):
            return None
        with contextlib.suppress(json.JSONDecodeError, TypeError):  # a damaged record is none
            return cls(**json.loads(target.read(_RATE)))
        return None

    def write(self, target: Folder) -> None:
        target.put(_RATE, json.dumps(asdict(self), indent=1).encode())


@dataclass(frozen=True)
class Estimate:
    tiles: int
    bytes: int
    """In SHARDS."""
    seconds: float | None
    """None: no run here has been measured."""
    cpus: float


def estimate(jobs: Sequence[PairJob], options: PreprocessOptions, rate: Rate | None, cpus: float) -> Estimate:
    """What `jobs` will come to on so many CPUs, if none of them turns out unusable."""
    tiles = sum(num_tiles(job, options) for job in jobs)
    compressed = rate.bytes / rate.raw_bytes if rate else _COMPRESSED
    raw_bytes = sum(num_tiles(job, options) * tile_bytes(options, truth=job.has_truth) for job in jobs)
    seconds = rate.task_seconds / rate.tiles * tiles / cpus if rate else None
    return Estimate(tiles, round(raw_bytes * compressed), seconds, cpus)


def num_tiles(job: PairJob, options: PreprocessOptions) -> int:
    """Tiles of the area that the pair's frames share by their focal lengths."""
    unknown = (math.sqrt(job.pixels / 1.5), math.sqrt(job.pixels * 1.5))
    lr, hr = (sorted(exif.size or unknown) for exif in (job.lr_exif, job.hr_exif))
    height, width = (int(min(a, b / job.zoom)) // 2 for a, b in zip(lr, hr, strict=True))
    rows, cols = (len(spread(side, options.tile_px, options.stride_px)) for side in (height, width))
    return rows * cols


def tile_bytes(options: PreprocessOptions, *, truth: bool) -> int:
    """One tile's arrays, uncompressed."""
    info = ShardInfo(options.tile_px, options.scale, options.of_shards)
    names = [name for name in ARRAYS if truth or not name.startswith("true_")]
    return sum(np.dtype(ARRAYS[name][0]).itemsize * math.prod(info.shape(name)) for name in names)


def memory_bytes(job: PairJob) -> int:
    """What a task must be given, in steps, so that pairs of about one size share a request."""
    step = 128 * 1024 * 1024
    return -(-(_TASK_BYTES + _TASK_BYTES_PER_PIXEL * job.pixels) // step) * step
