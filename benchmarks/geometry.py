"""Accuracy of a pair's maps, and the gain of sampling once: `python benchmarks/geometry.py` (minutes on 2 cores).

Simulated sequences come with the truth: the position in the long JPG of each background point of the short frame.
Errors are distances in pixels of the long frame, at points 3 pixels apart where the background is visible. "Tiles" are
the affines stored in the rows (`lr_to_hr`), each over its own tile. "Lens map" is the registered map that the pictures
are sampled through (`lr_to_hr_lens`). The floors are the affines nearest to the true map, so no affine can have a
smaller error. `--scenes DIR` adds scenes made from photographs. The tables replace their section of
benchmarks/RESULTS.md.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from results import provenance, update_section  # noqa: E402

from preprocessing import tiles  # noqa: E402
from preprocessing.plan import PairJob, PreprocessOptions, make_plan  # noqa: E402
from preprocessing.raw import decode  # noqa: E402
from preprocessing.registration import affine  # noqa: E402
from preprocessing.simulator.sequences import simulate  # noqa: E402
from preprocessing.storage import open_folder  # noqa: E402
from preprocessing.truth.reader import Truth, load_truth  # noqa: E402

Points = NDArray[np.float64]
Errors = NDArray[np.float64]
TILE_PX, STRIDE_PX = PreprocessOptions.tile_px, PreprocessOptions.stride_px
SPACING_PX = 3
FLOOR_TILES = (96, 64, 48, 32)
# SR-RAW's pairs at 4x: (ratio of the pair's focal lengths, ratio of the longest focal length to the pair's long one).
PAIRS = {"240/50": (4.8, 1.0), "150/35": (150 / 35, 1.6), "100/24": (100 / 24, 2.4)}
MOTION = np.array([[1.0, 0.004, 3.37], [-0.004, 1.0, -2.61]])


@dataclass
class Measured:
    """Errors of one or more pairs: one array per pair."""

    nominal: list[Errors] = field(default_factory=list)
    """Scale mode's map against the nominal one."""
    unregistered: list[Errors] = field(default_factory=list)
    """Scale mode's map against the truth: the misalignment before registration."""
    lens: list[Errors] = field(default_factory=list)
    tiles: list[Errors] = field(default_factory=list)
    floor: list[Errors] = field(default_factory=list)
    """Errors of each tile's nearest affine."""
    whole: list[Errors] = field(default_factory=list)
    """Errors of the whole area's nearest affine."""
    fallbacks: int = 0
    seconds: list[float] = field(default_factory=list)

    def add(self, other: "Measured") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def measure_pair(folder: Path, job: PairJob, truth: Truth) -> Measured:
    """All errors of one pair."""
    source = open_folder(str(folder))
    assert job.lr_raw and job.lr_jpg and job.hr_jpg
    image = decode.load(source.read(job.lr_raw), name=job.lr_raw)
    lr, hr = (tiles.decode_jpg(source.read(path), path) for path in (job.lr_jpg, job.hr_jpg))
    found = Measured()
    by_scale = tiles.pair_maps(image, lr, hr, job.zoom, ecc=False)
    area = box_of(image, tiles.shared_area(image, by_scale, lr.size, hr.size))
    points = points_in(area)
    true, shows = truth.true_lr_to_hr(job.lr, job.hr, points)
    lr_frame, hr_frame = truth.frames[job.lr], truth.frames[job.hr]
    lr_centre = np.array([lr_frame.raw_width, lr_frame.raw_height]) / 2
    hr_centre = np.array([hr_frame.jpg_width, hr_frame.jpg_height]) / 2
    nominal = hr_centre + (points - lr_centre) * (hr_frame.focal_mm / lr_frame.focal_mm)
    placed = affine.apply(by_scale.lr_to_hr, points)
    found.nominal.append(distance(placed, nominal))
    found.unregistered.append(distance(placed, true)[shows])
    found.whole.append(distance(affine.apply(nearest_affine(points[shows], true[shows]), points), true)[shows])
    start = time.process_time()
    aligned = tiles.pair_maps(image, lr, hr, job.zoom, ecc=True)
    found.seconds.append(time.process_time() - start)
    if aligned.found is None:
        found.fallbacks = 1
        return found
    found.lens.append(distance(aligned.found(points), true)[shows])
    shared = tiles.shared_area(image, aligned, lr.size, hr.size)
    of_tiles, of_floor = [], []
    for left, top, right, bottom in tile_boxes(image, shared, TILE_PX, STRIDE_PX):
        inside = points_in((left, top, right, bottom))
        true, shows = truth.true_lr_to_hr(job.lr, job.hr, inside)
        if shows.sum() < 10:
            continue
        inside, true = inside[shows], true[shows]
        of_tiles.append(distance(affine.apply(aligned.over(left, top, right, bottom), inside), true))
        of_floor.append(distance(affine.apply(nearest_affine(inside, true), inside), true))
    found.tiles.append(np.concatenate(of_tiles))
    found.floor.append(np.concatenate(of_floor))
    return found


def box_of(image: decode.RawImage, area: tiles.Area) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a packed area, mosaic pixels of the visible area."""
    left, top = tiles.mosaic_origin(image, area)[:, 2].tolist()
    return left, top, left + 2 * area[3], top + 2 * area[2]


def tile_boxes(
    image: decode.RawImage, area: tiles.Area, tile_px: int, stride_px: int
) -> Iterator[tuple[float, float, float, float]]:
    """The tiles that `cut` makes. Areas smaller than a tile give square tiles of their shorter side."""
    tile_px = min(tile_px, area[2], area[3])
    for row in tiles.tile_starts(area[2], tile_px, stride_px):
        for col in tiles.tile_starts(area[3], tile_px, stride_px):
            yield box_of(image, (area[0] + row, area[1] + col, tile_px, tile_px))


def points_in(box: tuple[float, float, float, float]) -> Points:
    left, top, right, bottom = box
    x, y = np.meshgrid(np.arange(left + 0.5, right, SPACING_PX), np.arange(top + 0.5, bottom, SPACING_PX))
    return np.stack([x.ravel(), y.ravel()], axis=1)


def distance(a: Points, b: Points) -> Errors:
    return np.asarray(np.hypot(*(a - b).T), np.float64)


def nearest_affine(points: Points, true: Points) -> affine.Map:
    matrix = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    return np.asarray(np.linalg.lstsq(matrix, true, rcond=None)[0].T, np.float64)


def accuracy_rows(groups: dict[str, Measured]) -> Iterator[str]:
    yield (
        "| preset, scenes, width | pairs | scale mode to nominal, 95 % | scale mode to truth, 50 / 95 % "
        "| lens map, 50 / 95 % | worst pair | **tiles, 50 / 95 %** | worst pair | floor of tiles | floor of one affine "
        "| fallbacks | CPU s a pair |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for name, found in groups.items():
        cells = [
            name,
            f"{len(found.nominal)}",
            f"{percentile(found.nominal, 95):.3f}",
            both(found.unregistered),
            both(found.lens),
            worst(found.lens),
            f"**{both(found.tiles)}**",
            worst(found.tiles),
            f"{percentile(found.floor, 95):.2f}",
            f"{percentile(found.whole, 95):.2f}",
            f"{found.fallbacks}",
            f"{np.mean(found.seconds):.2f}",
        ]
        yield f"| {' | '.join(cells)} |"


def percentile(errors: list[Errors], part: float) -> float:
    return float(np.percentile(np.concatenate(errors), part)) if errors else float("nan")


def both(errors: list[Errors]) -> str:
    return f"{percentile(errors, 50):.2f} / {percentile(errors, 95):.2f}"


def worst(errors: list[Errors]) -> str:
    return f"{max((percentile([one], 95) for one in errors), default=float('nan')):.2f}"


def floor_rows(sequences: dict[str, Path]) -> Iterator[str]:
    """Errors of the affines nearest to the true map, by tile size."""
    yield "| width, pair | " + " | ".join(f"tile {size}" for size in FLOOR_TILES) + " | whole area |"
    yield "|---|" + "---|" * (len(FLOOR_TILES) + 1)
    for name, folder in sequences.items():
        for job in make_plan(open_folder(str(folder)), PreprocessOptions(), {}).jobs:
            truth = load_truth(folder / job.folder)
            assert truth is not None
            if job.sequence != "00001":
                continue
            width, height = truth.frames[job.hr].jpg_width, truth.frames[job.hr].jpg_height
            half = np.array([width, height]) / job.zoom / 2
            centre = np.array([truth.frames[job.lr].raw_width, truth.frames[job.lr].raw_height]) / 2
            (left, top), (right, bottom) = centre - half, centre + half
            cells = []
            for size in (*FLOOR_TILES, None):
                side = 2 * size if size else right - left
                errors = []
                for x in np.linspace(left, max(left, right - side), 6):
                    for y in np.linspace(top, max(top, bottom - side), 4):
                        inside = points_in((x, y, min(x + side, right), min(y + side, bottom)))
                        true, _ = truth.true_lr_to_hr(job.lr, job.hr, inside)
                        errors.append(distance(affine.apply(nearest_affine(inside, true), inside), true))
                cells.append(f"{percentile(errors, 95):.2f}")
            pair = f"{job.hr_exif.focal_mm:g}/{job.lr_exif.focal_mm:g} mm"
            yield f"| {name}, {pair} | {' | '.join(cells)} |"


def chain_rows(pictures: list[Path]) -> Iterator[str]:
    """One affine sampled once, against the authors' chain of resizes; the reference picture has twice the density."""
    yield "| pair | once, dB | authors' chain, dB | the same, bilinear, dB |"
    yield "|---|---|---|---|"
    for pair, (zoom, to_longest) in PAIRS.items():
        rows = []
        for path in pictures:
            fine = np.asarray(cv2.imread(str(path), cv2.IMREAD_COLOR_RGB), np.uint8)
            fine = np.ascontiguousarray(fine[: fine.shape[0] // 2 * 2, : fine.shape[1] // 2 * 2])
            height, width = fine.shape[0] // 2, fine.shape[1] // 2
            long = np.asarray(cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
            size = (round(height * 4 / zoom), round(width * 4 / zoom))
            steps = np.array([[width / size[1], 0, 0], [0, height / size[0], 0]])
            grown = affine.scaling(to_longest)
            to_long = affine.compose(
                affine.scaling(1 / to_longest), affine.compose(MOTION, affine.compose(grown, steps))
            )
            inner = (slice(24, size[0] - 24), slice(24, size[1] - 24))
            ideal = area_average(fine, affine.compose(affine.scaling(2), to_long), size)[inner]
            corner = affine.compose(to_long, affine.translation(24, 24))
            once = affine.sample(long, corner, (size[0] - 48, size[1] - 48))
            chains = (
                authors_chain(long, to_longest, size, kind)[inner] for kind in (cv2.INTER_CUBIC, cv2.INTER_LINEAR)
            )
            rows.append([psnr(once, ideal), *(psnr(shown, ideal) for shown in chains)])
        once_db, cubic_db, linear_db = np.mean(rows, axis=0)
        yield f"| {pair} | **{once_db:.1f}** | {cubic_db:.1f} | {linear_db:.1f} |"


def area_average(fine: NDArray[np.uint8], to_fine: affine.Map, size: affine.Size) -> NDArray[np.float64]:
    """`fine` seen through a map at `size`: each pixel averages 6 x 6 points, [H, W, 3] in [0, 255]."""
    parts = 6
    total = np.zeros((*size, 3))
    x, y = np.meshgrid(np.arange(size[1]), np.arange(size[0]))
    for row in range(parts):
        for col in range(parts):
            at = np.stack([x.ravel() + (col + 0.5) / parts, y.ravel() + (row + 0.5) / parts], axis=1)
            place = (affine.apply(to_fine, at) - 0.5).astype(np.float32).reshape(*size, 2)
            total += cv2.remap(fine, place[..., 0], place[..., 1], cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REPLICATE)
    return total / parts**2


def authors_chain(long: NDArray[np.uint8], to_longest: float, size: affine.Size, resize: int) -> NDArray[np.float64]:
    """Enlarge to the longest focal length's grid, warp, reduce, resize to the exact scale, as in SRRawDataset."""
    picture: NDArray[Any] = long.astype(np.float32) / 255
    height, width = picture.shape[:2]
    picture = cv2.resize(picture, (round(width * to_longest), round(height * to_longest)), interpolation=resize)
    index = affine.compose(affine.translation(-0.5, -0.5), affine.compose(MOTION, affine.translation(0.5, 0.5)))
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    picture = cv2.warpAffine(picture, index, picture.shape[1::-1], flags=flags)
    picture = cv2.resize(picture, (width, height), interpolation=resize)
    picture = cv2.resize(picture, size[::-1], interpolation=resize)
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.float64)


def psnr(shown: NDArray[np.generic], ideal: NDArray[np.float64]) -> float:
    return float(10 * np.log10(255**2 / np.mean((np.asarray(shown, np.float64) - ideal) ** 2)))


def main() -> None:
    """Simulate, measure, print each row when it is ready, and update RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, help="also build scenes from this folder of photographs")
    parser.add_argument("--sequences", type=int, default=4, help="sequences of each kind")
    parser.add_argument("--wide", type=int, default=1, help="sequences of preset default at 4240 px; 0: none")
    parser.add_argument("--work", type=Path, help="keep the sequences here (default: a temporary folder)")
    parser.add_argument("--print", action="store_true", help="do not change RESULTS.md")
    chosen = parser.parse_args()
    cv2.setNumThreads(1)
    arguments = ["--scenes DIR" if chosen.scenes else "", f"--sequences {chosen.sequences}", f"--wide {chosen.wide}"]
    text = [provenance("python benchmarks/geometry.py " + " ".join(filter(None, arguments)), ("../preprocessing",))]
    with tempfile.TemporaryDirectory() as temporary:
        for line in tables(chosen, chosen.work or Path(temporary)):
            text.append(line)
            print(line, flush=True)
    if not chosen.print:
        update_section("geometry", "\n".join(text))


def tables(chosen: argparse.Namespace, work: Path) -> Iterator[str]:
    groups: dict[str, Measured] = {}
    folders: dict[str, Path] = {}
    kinds = {"procedural": None} | ({"photographs": chosen.scenes} if chosen.scenes else {})
    for width, count in ((1536, chosen.sequences), (4240, chosen.wide)):
        for seed, preset in enumerate(("perfect", "default", "handheld"), 21):
            for number, (kind, scenes) in enumerate(kinds.items()):
                if not count or (width == 4240 and preset != "default"):
                    continue
                folder = work / f"{preset}_{kind}_{width}"
                raw_format = ("dng", "arw")[(seed + number) % 2]
                options = {"scenes": scenes, "preset": preset, "raw_format": raw_format}
                simulate(folder, sequences=count, width_px=width, seed=seed, **options)
                found = groups.setdefault(f"{preset}, {kind}, {width}", Measured())
                for job in make_plan(open_folder(str(folder)), PreprocessOptions(), {}).jobs:
                    truth = load_truth(folder / job.folder)
                    assert truth is not None
                    found.add(measure_pair(folder, job, truth))
                if preset == "default" and kind == "procedural":
                    folders[f"{width}"] = folder
    yield "\n### Errors of the map, HR pixels\n"
    yield from accuracy_rows(groups)
    yield "\n### How near an affine comes to the true map, 95 %, HR pixels (preset default, one sequence)\n"
    yield from floor_rows(folders)
    yield "\n### Sampled once, against a chain of resizes (PSNR against the known picture)\n"
    yield from chain_rows(sorted(work.glob("perfect_*_1536/*/truth/*_4x.png")))


if __name__ == "__main__":
    main()
