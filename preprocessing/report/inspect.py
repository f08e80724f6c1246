"""`sdan inspect`: a report on a SHARDS folder, as one self-contained HTML page.

The page (inspect.html.j2, inspect.css) has no script, and its Content-Security-Policy blocks external content.
"""

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from preprocessing.registration.shift import luminance
from preprocessing.report.inventory import InspectError, Inventory, Pair, ranking, read_inventory
from preprocessing.report.page import policy_hash, templates
from preprocessing.schema import SCHEMA_VERSION, SPLITS, ShardInfo, decode
from preprocessing.storage import Folder, one_line, open_folder

__all__ = ["InspectError", "check_output", "inspect"]

_SHOWN_WORST = _SHOWN_REST = 12
"""Number of pairs with pictures: the worst-aligned, and a selection of the rest."""
_LISTED = 300
"""Maximum rows of a list."""
_PICTURE_PX = 360
"""Side of a picture, HR pixels. Pictures are not scaled, because that would hide small shifts."""
_PICTURE_BYTES = 6_000_000
"""Limit for all pictures together, before base64 adds a third."""
_MOST_BINS = 36
_STEPS = [factor * 10.0**power for power in range(-3, 6) for factor in (1, 2, 5)]
_MEASUREMENTS = {
    "exposure_ratio": "exposure ratio HR / LR, measured",
    "exposure_ratio_exif": "exposure ratio HR / LR, from EXIF",
    "exposure_falloff": "HR's vignetting: light lost in the corner",
    "jpg_scale": "LR's JPG vs its RAW: scale",
    "jpg_k1": "LR's JPG vs its RAW: radial coefficient",
    "jpg_falloff": "LR's JPG vs its RAW: light lost in the corner",
}


@dataclass(frozen=True)
class ShownPair:
    """A pair with its pictures as data: URIs."""

    pair: Pair
    lr: str
    hr: str
    difference: str


def inspect(shards: str, *, progress: Callable[[int, int], None] | None = None) -> str:
    """The report on the folder or `s3://` URI `shards`, HTML of at most about 10 MB.

    progress: called with (files read, total files), first with 0.
    Raises InspectError, one line, as `read_inventory` does.
    """
    inventory = read_inventory(shards, progress)
    try:
        worst, rest = _sheet(open_folder(shards), inventory)
    except (OSError, pa.ArrowException) as error:
        raise InspectError(
            f"{shards}: expected readable shards, got {one_line(error)}; run again when nothing writes there"
        ) from error
    return _render(inventory, worst, rest)


def check_output(path: Path) -> None:
    """Check, before the work starts, that the page can be written.

    Raises:
        InspectError: `path` is a folder, or is not inside one that exists.
    """
    if path.is_dir() or not path.parent.is_dir():
        got = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise InspectError(f"-o {path}: expected a file in an existing folder, got {got}; e.g. -o report.html")


def _sheet(folder: Folder, inventory: Inventory) -> tuple[list[ShownPair], list[ShownPair]]:
    """(the worst-aligned pairs, a selection of the rest), both worst first, until the pictures reach their limit."""
    ranked = ranking(inventory.pairs)
    rest = ranked[_SHOWN_WORST:]
    places = np.unique(np.linspace(0, len(rest) - 1, min(_SHOWN_REST, len(rest))).round().astype(int))
    wanted = [*ranked[:_SHOWN_WORST], *(rest[place] for place in places)]
    shown: list[ShownPair] = []
    left = _PICTURE_BYTES
    for pair in wanted:
        if inventory.info is None or left <= 0:
            break
        try:
            shown.append(_show(folder, pair, inventory.info))
        except ValueError as error:  # of another tile size or scale
            reason = f"{pair.path}: expected tiles as in the first shard, got {one_line(error)}; delete it"
            inventory.unreadable.append({"file": folder.relative(pair.path), "reason": reason})
            inventory.pairs = [other for other in inventory.pairs if other is not pair]
            continue
        left -= sum(len(picture) for picture in (shown[-1].lr, shown[-1].hr, shown[-1].difference)) * 3 // 4
    return shown[:_SHOWN_WORST], shown[_SHOWN_WORST:]


def _show(folder: Folder, pair: Pair, info: ShardInfo) -> ShownPair:
    """Pictures of the pair's most typical tile, whose residual is nearest to the median."""
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
    return ShownPair(pair, _jpg(enlarged[at]), _jpg(hr[at]), _jpg(grey))


def _jpg(picture: NDArray[np.uint8]) -> str:
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(out, "JPEG", quality=84)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


@dataclass(frozen=True)
class Histogram:
    """Bars of equal width, and the number of values beyond them."""

    width: float
    counts: list[int]
    overflow: int
    """Number of values beyond the last bar."""
    median: float
    p95: float

    @property
    def top(self) -> int:
        """End of the y axis: a round number, at least as high as every bar."""
        return _round_up(max(*self.counts, self.overflow, 1))

    @property
    def end(self) -> float:
        return self.width * len(self.counts)

    @property
    def ticks(self) -> list[float]:
        """At most eight round numbers from 0 to the end."""
        step = next(step for step in _STEPS if self.end / step <= 7)
        return [number * step for number in range(int(self.end / step + 1e-6) + 1)]


def histogram(values: NDArray[np.floating]) -> Histogram | None:
    """Bars up to the 99th percentile of the finite values; None if there are none."""
    known = values[np.isfinite(values)]
    if not known.size:
        return None
    reach = max(float(np.percentile(known, 99)), 0.05)
    width = next(step for step in _STEPS if reach / step <= _MOST_BINS)
    bins = max(1, int(np.ceil(reach / width)))
    counts = np.bincount(np.minimum((known / width).astype(int), bins), minlength=bins + 1).tolist()
    return Histogram(width, counts[:bins], counts[bins], float(np.median(known)), float(np.percentile(known, 95)))


def _round_up(value: int) -> int:
    """The next 1, 2, 4, 5, 8 or 10 times a power of ten."""
    power = 10 ** (len(str(value)) - 1)
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value)


def _render(inventory: Inventory, worst: list[ShownPair], rest: list[ShownPair]) -> str:
    pairs = inventory.pairs
    residual = _residuals(pairs)
    here = Path(__file__).parent
    style = (here / "inspect.css").read_text()
    pages = templates(here)
    pages.filters |= {"number": _number, "count": _count, "size": _size, "focals": _focals}
    return pages.get_template("inspect.html.j2").render(
        inventory=inventory,
        schema_version=SCHEMA_VERSION,
        simulated=sum(pair.simulated for pair in pairs),
        tiles=len(residual),
        unmeasured=int(np.isnan(residual).sum()),
        sequences=len({pair.columns["sequence"] for pair in pairs}),
        bytes=sum(pair.bytes for pair in pairs),
        histogram=histogram(residual),
        splits=_groups(pairs, lambda pair: pair.split, SPLITS),
        cameras=_groups(pairs, lambda pair: pair.columns["camera"] or "unknown"),
        focals=_groups(pairs, lambda pair: (pair.columns["focal_hr_mm"] or 0, pair.columns["focal_lr_mm"] or 0)),
        isos=_groups(pairs, lambda pair: pair.columns["iso_lr"] or 0),
        aligned=Counter(pair.columns["aligned_by"] for pair in pairs),
        rendered=sum("rendering" in (pair.columns["lr_source"], pair.columns["hr_source"]) for pair in pairs),
        measurements={
            meaning: _percentiles(pair.columns[name] for pair in pairs) for name, meaning in _MEASUREMENTS.items()
        },
        worst=worst,
        rest=rest,
        listed=_LISTED,
        style=style,
        style_hash=policy_hash(style),
    )


def _groups(
    pairs: Iterable[Pair], key: Callable[[Pair], Any], order: Sequence[Any] | None = None
) -> list[dict[str, Any]]:
    """Per group: key, number of pairs and tiles, median residual; sorted by key, or in `order`."""
    groups: dict[Any, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[key(pair)].append(pair)
    return [
        {
            "key": name,
            "pairs": len(groups[name]),
            "tiles": sum(len(pair.residual_px) for pair in groups[name]),
            "median": _median(_residuals(groups[name])),
        }
        for name in (order or sorted(groups))
    ]


def _residuals(pairs: list[Pair]) -> NDArray[np.float32]:
    return np.concatenate([np.empty(0, np.float32), *(pair.residual_px for pair in pairs)])


def _median(values: NDArray[np.floating]) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else float("nan")


def _percentiles(values: Iterable[float | None]) -> dict[str, float]:
    """Number of finite values, their median and their 5 % and 95 % percentiles."""
    known = np.array([value for value in values if value is not None and np.isfinite(value)])
    if not known.size:
        return {"count": 0}
    low, middle, high = (float(value) for value in np.percentile(known, (5, 50, 95)))
    return {"count": int(known.size), "low": low, "median": middle, "high": high}


def _number(value: float | None) -> str:
    """About three digits; a dash for an unknown value."""
    if value is None or not np.isfinite(value):
        return "–"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def _focals(pair: tuple[float | None, float | None]) -> str:
    """(HR, LR) -> "240 / 50 mm"; without them "unknown"."""
    return "{:g} / {:g} mm".format(*pair) if all(pair) else "unknown"


def _count(value: float) -> str:
    """12345 -> "12 345", with narrow no-break spaces."""
    return f"{value:,.0f}".replace(",", "\u202f")


def _size(value: float) -> str:
    """Bytes as MB or GB."""
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
