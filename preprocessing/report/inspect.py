"""`sdan inspect`: what a SHARDS folder holds, as one self-contained page to look at and to pass on.

The page (inspect.html.j2, inspect.css) has no script, and its Content-Security-Policy lets nothing in from elsewhere.
"""

import base64
import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from preprocessing.registration.shift import luminance
from preprocessing.report.inventory import Found, InspectError, Pair, ranking, read_inventory
from preprocessing.schema import SCHEMA_VERSION, SPLITS, ShardInfo, decode
from preprocessing.storage import Folder, one_line, open_folder

__all__ = ["InspectError", "check_output", "inspect"]

_SHOWN_WORST = _SHOWN_REST = 12
"""Pairs on the contact sheet."""
_LISTED = 300
"""Rows of a list before it is cut off."""
_PICTURE_PX = 360
"""Side of a picture, HR pixels as they are: a shift would drown if they were shrunk."""
_PICTURE_BYTES = 6_000_000
"""What all pictures may take before base64 adds a third."""
_MOST_BINS = 36
_STEPS = [factor * 10.0**power for power in range(-3, 6) for factor in (1, 2, 5)]
_MEASUREMENTS = {
    "exposure_ratio": "light of HR / LR",
    "exposure_ratio_exif": "light of HR / LR by the tags",
    "exposure_falloff": "HR's vignetting: light lost in its corner",
    "jpg_scale": "LR's JPG against its RAW: scale",
    "jpg_k1": "LR's JPG against its RAW: radial coefficient",
    "jpg_falloff": "LR's JPG against its RAW: light lost in the corner",
}


@dataclass(frozen=True)
class Shown:
    """One pair on the contact sheet; pictures are data: URIs."""

    pair: Pair
    lr: str
    hr: str
    difference: str


def inspect(shards: str, *, progress: Callable[[int, int], None] | None = None) -> str:
    """The report on the folder or `s3://` URI `shards`, HTML of at most about 10 MB.

    progress: called with (files read, files in all).
    Raises InspectError, one line, as `read_inventory` does.
    """
    found = read_inventory(shards, progress)
    try:
        worst, rest = _sheet(open_folder(shards), found)
    except (OSError, pa.ArrowException) as error:
        raise InspectError(f"{shards}: cannot be read ({one_line(error)}); is it being written? run again") from error
    return _page(found, worst, rest)


def check_output(path: Path) -> None:
    """Check before the work that the page can be written.

    Raises:
        InspectError: `path` is a folder, or is not inside one that exists.
    """
    if path.is_dir() or not path.parent.is_dir():
        got = "a folder" if path.is_dir() else f"no such folder {path.parent}"
        raise InspectError(f"-o {path}: expected a file in an existing folder, got {got}; e.g. -o report.html")


def _sheet(folder: Folder, found: Found) -> tuple[list[Shown], list[Shown]]:
    """(the worst-aligned pairs, some spread evenly over the rest), worst first, as many as the page may weigh."""
    ranked = ranking(found.pairs)
    rest = ranked[_SHOWN_WORST:]
    places = np.unique(np.linspace(0, len(rest) - 1, min(_SHOWN_REST, len(rest))).round().astype(int))
    wanted = [*ranked[:_SHOWN_WORST], *(rest[place] for place in places)]
    shown: list[Shown] = []
    left = _PICTURE_BYTES
    for pair in wanted:
        if found.info is None or left <= 0:
            break
        shown.append(_show(folder, pair, found.info))
        left -= sum(len(picture) for picture in (shown[-1].lr, shown[-1].hr, shown[-1].difference)) * 3 // 4
    return shown[:_SHOWN_WORST], shown[_SHOWN_WORST:]


def _show(folder: Folder, pair: Pair, info: ShardInfo) -> Shown:
    """The pair's most typical tile: the one nearest its median."""
    known = np.isfinite(pair.residual_px)
    distance = np.abs(np.where(known, pair.residual_px, np.inf) - pair.median_px) if known.any() else np.zeros(1)
    tile = int(np.argmin(distance))
    with pq.ParquetFile(pair.path, filesystem=folder.filesystem) as file:
        row = decode(file.read_row_group(tile, columns=["lr_rgb", "hr_rgb"]).to_pylist()[0], info)
    hr = row["hr_rgb"].transpose(1, 2, 0)
    lr = np.ascontiguousarray(row["lr_rgb"].transpose(1, 2, 0))
    enlarged = np.asarray(cv2.resize(lr, hr.shape[1::-1], interpolation=cv2.INTER_CUBIC), np.uint8)
    side = min(_PICTURE_PX, hr.shape[0])
    start = (hr.shape[0] - side) // 2
    at = (slice(start, start + side), slice(start, start + side))
    difference = luminance(np.ascontiguousarray(hr[at])) - luminance(np.ascontiguousarray(enlarged[at]))
    grey = np.clip(128 + difference, 0, 255).astype(np.uint8)
    return Shown(pair, _jpg(enlarged[at]), _jpg(hr[at]), _jpg(grey))


def _jpg(picture: NDArray[np.uint8]) -> str:
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(out, "JPEG", quality=84)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


@dataclass(frozen=True)
class Histogram:
    """Bars of equal width; the last may stand for all that is larger."""

    width: float
    counts: list[int]
    overflow: int
    """Tiles beyond the last bar."""
    median: float
    p95: float

    @property
    def top(self) -> int:
        """The end of the y axis: 1, 2 or 5 times a power of ten that holds every bar, or a quarter of one less."""
        return _round_up(max(*self.counts, self.overflow, 1))

    @property
    def end(self) -> float:
        return self.width * len(self.counts)

    @property
    def ticks(self) -> list[float]:
        """About six round numbers from 0 to the end."""
        step = next(step for step in _STEPS if self.end / step <= 7)
        return [number * step for number in range(int(self.end / step + 1e-6) + 1)]


def histogram(values: NDArray[np.floating]) -> Histogram | None:
    """Of the finite values up to their 99th percentile; None when there are none."""
    known = values[np.isfinite(values)]
    if not known.size:
        return None
    reach = max(float(np.percentile(known, 99)), 0.05)
    width = next(step for step in _STEPS if reach / step <= _MOST_BINS)
    bins = max(1, int(np.ceil(reach / width)))
    counts = np.bincount(np.minimum((known / width).astype(int), bins), minlength=bins + 1).tolist()
    return Histogram(width, counts[:bins], counts[bins], float(np.median(known)), float(np.percentile(known, 95)))


def _round_up(value: int) -> int:
    power = 10 ** (len(str(value)) - 1)
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value)


def _page(found: Found, worst: list[Shown], rest: list[Shown]) -> str:
    pairs = found.pairs
    residual = _residuals(pairs)
    here = Path(__file__).parent
    style = (here / "inspect.css").read_text()
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters |= {"number": _number, "count": _count, "size": _size}
    return pages.get_template("inspect.html.j2").render(
        found=found,
        schema_version=SCHEMA_VERSION,
        simulated=sum(pair.simulated for pair in pairs),
        tiles=len(residual),
        unmeasured=int(np.isnan(residual).sum()),
        sequences=len({pair.columns["sequence"] for pair in pairs}),
        bytes=sum(pair.bytes for pair in pairs),
        histogram=histogram(residual),
        splits=_by(pairs, lambda pair: pair.split, SPLITS),
        cameras=_by(pairs, lambda pair: pair.columns["camera"] or "unknown"),
        focals=_by(pairs, lambda pair: (pair.columns["focal_hr_mm"], pair.columns["focal_lr_mm"])),
        isos=_by(pairs, lambda pair: pair.columns["iso_lr"] or 0),
        aligned=Counter(pair.columns["aligned_by"] for pair in pairs),
        rendered=sum("rendering" in (pair.columns["lr_source"], pair.columns["hr_source"]) for pair in pairs),
        measurements={
            meaning: _measured(pair.columns[name] for pair in pairs) for name, meaning in _MEASUREMENTS.items()
        },
        worst=worst,
        rest=rest,
        listed=_LISTED,
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    )


def _by(pairs: Iterable[Pair], key: Callable[[Pair], Any], order: Sequence[Any] | None = None) -> list[dict[str, Any]]:
    """Counts per group: key, pairs, tiles, sequences, median residual; sorted by key, or in `order`."""
    groups: dict[Any, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[key(pair)].append(pair)
    return [
        {
            "key": name,
            "pairs": len(groups[name]),
            "tiles": sum(len(pair.residual_px) for pair in groups[name]),
            "sequences": len({pair.columns["sequence"] for pair in groups[name]}),
            "median": _median(_residuals(groups[name])),
        }
        for name in (order or sorted(groups))
    ]


def _residuals(pairs: list[Pair]) -> NDArray[np.float32]:
    return np.concatenate([np.empty(0, np.float32), *(pair.residual_px for pair in pairs)])


def _median(values: NDArray[np.floating]) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else float("nan")


def _measured(values: Iterable[float | None]) -> dict[str, float]:
    """Number of finite values, their median, 5 % and 95 %."""
    known = np.array([value for value in values if value is not None and np.isfinite(value)])
    if not known.size:
        return {"count": 0}
    low, middle, high = (float(value) for value in np.percentile(known, (5, 50, 95)))
    return {"count": int(known.size), "low": low, "median": middle, "high": high}


def _number(value: float | None) -> str:
    """About three digits; a dash for what is not known."""
    if value is None or not np.isfinite(value):
        return "–"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def _count(value: float) -> str:
    """12345 -> "12 345", with narrow spaces that do not break."""
    return f"{value:,.0f}".replace(",", "\u202f")


def _size(value: float) -> str:
    """Bytes as MB or GB."""
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
