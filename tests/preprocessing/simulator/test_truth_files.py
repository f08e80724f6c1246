"""The stored truth against the geometry used: known points found in rendered frames, flows that really align."""

import shutil
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from preprocessing.colour import linear_to_srgb_bytes
from preprocessing.registration.affine import apply
from preprocessing.simulator import sensor
from preprocessing.simulator.optics import PRESETS, draw_geometries
from preprocessing.simulator.scenery.painter import Canvas
from preprocessing.simulator.scenes import Scene
from preprocessing.simulator.sequences import simulate
from preprocessing.truth.frame import FAR, NEAR, FrameGeometry, nominal_lr_to_hr
from preprocessing.truth.reader import Truth, load_truth

SIZE = (480, 320)
PAIRS = (("00005", "00001"), ("00006", "00002"), ("00007", "00003"))


@pytest.fixture(scope="module")
def handheld(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("handheld")
    return simulate(out, sequences=1, width_px=480, preset="handheld", seed=3)[0]


@pytest.fixture(scope="module")
def truth(handheld: Path) -> Truth:
    loaded = load_truth(handheld)
    assert loaded is not None
    return loaded


def geometries(preset: str = "handheld", seed: int = 3, border: int = 0) -> list[FrameGeometry]:
    rng = np.random.default_rng(seed)
    return draw_geometries(rng, PRESETS[preset], jpg_size=SIZE, raw_size=(SIZE[0] + border, SIZE[1] + border))


def dots(points: np.ndarray, sigma: float, density: float) -> Canvas:
    """A canvas with a Gaussian spot of light at each scene point."""
    low, high = points.min(axis=0) - 20 * sigma, points.max(axis=0) + 20 * sigma
    width, height = np.ceil((high - low) * density).astype(int)
    light = np.full((height, width, 1), 0.02, np.float32)
    for x, y in (points - low) * density:
        reach = int(5 * sigma * density) + 2
        rows, columns = slice(int(y) - reach, int(y) + reach), slice(int(x) - reach, int(x) + reach)
        down = np.exp(-0.5 * ((np.arange(rows.start, rows.stop) + 0.5 - y) / (sigma * density)) ** 2)
        across = np.exp(-0.5 * ((np.arange(columns.start, columns.stop) + 0.5 - x) / (sigma * density)) ** 2)
        light[rows, columns, 0] += 0.9 * np.outer(down, across)
    return Canvas(linear_to_srgb_bytes(light).repeat(3, axis=2), float(low[0]), float(low[1]), density)


@pytest.mark.parametrize("number", range(7))
def test_known_points_appear_where_the_geometry_says(number: int) -> None:
    frame = geometries()[number]
    grid = np.stack(np.meshgrid(np.linspace(30.3, 450.8, 6), np.linspace(25.6, 290.1, 4)), -1).reshape(-1, 2)
    points = frame.to_scene(grid)
    scene = Scene([dots(points, 1.5 / frame.magnification, 2.0 * frame.magnification)], [], "dots")
    image = np.concatenate([band for _, band in sensor.render_linear(scene, frame, psf_px=0.6)])[..., 1]
    background = np.median(image)
    for x, y in frame.from_scene(points):
        left, top = int(x) - 8, int(y) - 8
        spot = image[top : top + 17, left : left + 17] - background
        at = np.arange(17) + 0.5
        found = ((spot * at).sum() / spot.sum() + left, (spot * at[:, None]).sum() / spot.sum() + top)
        assert np.hypot(found[0] - x, found[1] - y) < 0.03


@pytest.mark.parametrize("plane", [FAR, NEAR])
def test_forward_map_inverts_the_backward_map(plane: int) -> None:
    for frame in geometries(seed=9):
        xy = np.stack(np.meshgrid(np.linspace(-10, 490, 7), np.linspace(-10, 330, 5)), -1)
        assert np.abs(frame.from_scene(frame.to_scene(xy, plane), plane) - xy).max() < 1e-6


def test_perfect_geometry_is_the_nominal_one() -> None:
    frames = geometries("perfect")
    for lr, hr in ((frames[4], frames[0]), (frames[6], frames[2])):
        in_jpg = np.array([[3.0, 5.0], [470.0, 300.0]])
        affine = nominal_lr_to_hr(lr, hr)
        in_lr = lr.from_scene(hr.to_scene(in_jpg + hr.jpg_origin))
        assert np.abs(in_lr @ affine[:, :2].T + affine[:, 2] - in_jpg).max() < 1e-6


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("tripod", (0.7, 2.8, 6.3)), ("default", (2.4, 9.7, 24.0)), ("handheld", (4.5, 17.0, 46.0))],
)
def test_misalignment_of_the_presets(preset: str, expected: tuple[float, float, float]) -> None:
    """5/50/95 % of the misalignment of 4x pairs in HR pixels, brought to 768 px wide; figures from a calibration."""
    found = []
    for seed in range(100):
        frames = geometries(preset, seed)
        for lr, hr in ((frames[4], frames[0]), (frames[5], frames[1]), (frames[6], frames[2])):
            in_jpg = np.stack(np.meshgrid(np.linspace(5, 475, 5), np.linspace(5, 315, 4)), -1)
            affine = nominal_lr_to_hr(lr, hr)
            nominal = (in_jpg - affine[:, 2]) / affine[0, 0]
            for plane in (FAR, FAR, FAR, NEAR):
                shift = (lr.from_scene(hr.to_scene(in_jpg, plane), plane) - nominal) * affine[0, 0]
                found.append(np.hypot(shift[..., 0], shift[..., 1]).ravel() * 768 / SIZE[0])
    assert np.percentile(np.concatenate(found), (5, 50, 95)) == pytest.approx(expected, rel=0.2)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(np.float64) - other) ** 2)))


def inner_rect(truth: Truth, hr_stem: str, lr_stem: str) -> tuple[int, int, int, int]:
    """The nominal area of a pair in the short frame, less a border, even."""
    lr, hr = truth.frames[lr_stem], truth.frames[hr_stem]
    affine = nominal_lr_to_hr(lr, hr)
    low = -affine[:, 2] / affine[0, 0]
    left, top = (int(np.ceil(value / 2)) * 2 + 6 for value in low)
    width = int((hr.jpg_width / affine[0, 0] - 16) // 2 * 2)
    height = int((hr.jpg_height / affine[0, 0] - 16) // 2 * 2)
    return top, left, height, width


@pytest.mark.parametrize(("lr_stem", "hr_stem"), PAIRS)
def test_flow_brings_the_pair_together(handheld: Path, truth: Truth, lr_stem: str, hr_stem: str) -> None:
    """The ideal picture sampled at p + flow(p) is what the long JPG shows through the nominal map; at p it is not."""
    rect = inner_rect(truth, hr_stem, lr_stem)
    flow = truth.true_flow(lr_stem, hr_stem, rect).astype(np.float32)
    assert flow.shape == (2, rect[2] // 2, rect[3] // 2)
    top, left, height, width = truth.ideals[lr_stem, 4]
    ideal = truth.true_rgb(lr_stem, (top, left, height, width), 4)
    assert ideal is not None
    jpg = np.asarray(Image.open(handheld / f"{hr_stem}.JPG"))
    # Both on the packed grid: its pixel centres, seen at packed resolution.
    y, x = np.mgrid[0 : rect[2] // 2, 0 : rect[3] // 2].astype(np.float32) * 2 + 1
    x, y = x + rect[1], y + rect[0]
    affine = nominal_lr_to_hr(truth.frames[lr_stem], truth.frames[hr_stem]).astype(np.float32)
    blur = affine[0, 0]
    seen = cv2.remap(
        cv2.GaussianBlur(jpg, (0, 0), float(blur)),
        affine[0, 0] * x + affine[0, 2] - 0.5, affine[1, 1] * y + affine[1, 2] - 0.5, cv2.INTER_CUBIC,
    )  # fmt: skip

    def at(shift_x: np.ndarray | float, shift_y: np.ndarray | float) -> np.ndarray:
        smooth = cv2.GaussianBlur(ideal, (0, 0), 4.0)
        map_x, map_y = 4 * (x + 2 * shift_x - left) - 0.5, 4 * (y + 2 * shift_y - top) - 0.5
        return cv2.remap(smooth, map_x.astype(np.float32), map_y.astype(np.float32), cv2.INTER_CUBIC)

    # Exposure differs between frames: compare after matching mean and contrast.
    def matched(picture: np.ndarray) -> float:
        flat = picture.astype(np.float64)
        gain = flat.std() and seen.std() / flat.std()
        return psnr((flat - flat.mean()) * gain + seen.mean(), seen)

    right = matched(at(flow[1], flow[0]))
    assert right > 30
    assert right > matched(at(0, 0)) + 3
    assert right > matched(at(-flow[1], -flow[0])) + 3
    # A third of a packed pixel off in any direction is visibly worse.
    for off_x, off_y in ((0.33, 0), (-0.33, 0), (0, 0.33), (0, -0.33)):
        assert right > matched(at(flow[1] + off_x, flow[0] + off_y))


def test_flow_follows_the_map_that_the_pair_used(truth: Truth) -> None:
    """A map that puts the long frame 8 JPG pixels to the right moves the true position by as much, the other way."""
    rect = inner_rect(truth, "00001", "00005")
    affine = nominal_lr_to_hr(truth.frames["00005"], truth.frames["00001"])
    moved = affine.copy()
    moved[0, 2] += 8.0
    plain = truth.true_flow("00005", "00001", rect, partial(apply, affine)).astype(np.float64)
    shifted = truth.true_flow("00005", "00001", rect, partial(apply, moved)).astype(np.float64)
    assert np.median(shifted[1] - plain[1]) == pytest.approx(8 / 4.8 / 2, abs=0.02)
    assert np.median(shifted[0] - plain[0]) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(("lr_stem", "scale"), [("00005", 4), ("00006", 4), ("00007", 4), ("00007", 8)])
def test_ideal_picture_is_the_frame_without_its_faults(handheld: Path, truth: Truth, lr_stem: str, scale: int) -> None:
    top, left, height, width = truth.ideals[lr_stem, scale]
    ideal = truth.true_rgb(lr_stem, (top, left, height, width), scale)
    assert ideal is not None
    assert ideal.shape == (height * scale, width * scale, 3)
    part = np.asarray(Image.open(handheld / f"{lr_stem}.JPG"))[top : top + height, left : left + width]
    # A pixel averages light, not the JPG's encoded values.
    steps = np.linspace(0, 1, 4097)
    light = np.interp(ideal / 255, sensor.tone_curve(steps), steps)
    low = 255 * sensor.tone_curve(cv2.resize(light, (width, height), interpolation=cv2.INTER_AREA))
    # The same light in all: interpolated colours spread light, so that encoded means would differ.
    shown = np.interp(part / 255, sensor.tone_curve(steps), steps)
    assert shown.mean((0, 1)) == pytest.approx(light.mean((0, 1)), rel=0.04)
    assert psnr(low, part) > 22
    # Same place: one pixel off is worse in every direction.
    grey = [image.astype(np.float64).mean(-1) for image in (low, part)]
    inside = (slice(2, -2), slice(2, -2))
    errors = {
        (dy, dx): np.mean((np.roll(grey[0], (dy, dx), (0, 1))[inside] - grey[1][inside]) ** 2)
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    }
    assert min(errors, key=lambda shift: errors[shift]) == (0, 0)


def test_rectangles_scales_and_what_is_not_stored(truth: Truth) -> None:
    top, left, height, width = truth.ideals["00005", 4]
    whole = truth.true_rgb("00005", (top, left, height, width), 4)
    part = truth.true_rgb("00005", (top + 4, left + 6, 20, 24), 4)
    assert whole is not None and part is not None
    assert np.array_equal(part, whole[16 : 16 + 80, 24 : 24 + 96])
    half = truth.true_rgb("00005", (top + 4, left + 6, 20, 24), 2)
    assert half is not None
    assert np.abs(half - part.reshape(40, 2, 48, 2, 3).mean((1, 3))).max() <= 1
    assert truth.true_rgb("00005", (top - 2, left, 20, 24), 4) is None
    assert truth.true_rgb("00005", (top, left, 20, 24), 3) is None
    assert truth.true_rgb("00001", (top, left, 20, 24), 4) is None


def test_truth_travels_with_its_folder(handheld: Path, truth: Truth, tmp_path: Path) -> None:
    shutil.copytree(handheld, tmp_path / "elsewhere")
    copied = load_truth(tmp_path / "elsewhere")
    through_reader = load_truth("s3://bucket/00001", read=lambda name: (handheld / name).read_bytes())
    rect = truth.ideals["00006", 4]
    for other in (copied, through_reader):
        assert other is not None
        assert np.array_equal(other.true_rgb("00006", rect, 4), truth.true_rgb("00006", rect, 4))
        small = (rect[0], rect[1], 8, 8)
        assert np.array_equal(other.true_flow("00006", "00002", small), truth.true_flow("00006", "00002", small))


def test_no_truth_and_damaged_truth(tmp_path: Path) -> None:
    assert load_truth(tmp_path) is None
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "geometry.json").write_text('{"frames": {}}')
    with pytest.raises(ValueError, match="damaged"):
        load_truth(tmp_path)
