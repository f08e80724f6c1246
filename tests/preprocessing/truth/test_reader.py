"""The stored truth of a simulated sequence agrees with its frames."""

import shutil
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from preprocessing.registration.affine import apply
from preprocessing.simulator import sensor
from preprocessing.simulator.sequences import simulate
from preprocessing.truth.frame import nominal_lr_to_hr
from preprocessing.truth.reader import Truth, load_truth

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


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(np.float64) - other) ** 2)))


def inner_rect(truth: Truth, hr_stem: str, lr_stem: str) -> tuple[int, int, int, int]:
    """The nominal area of a pair in the short frame, without a border; even sizes."""
    lr, hr = truth.frames[lr_stem], truth.frames[hr_stem]
    affine = nominal_lr_to_hr(lr, hr)
    low = -affine[:, 2] / affine[0, 0]
    left, top = (int(np.ceil(value / 2)) * 2 + 6 for value in low)
    width = int((hr.jpg_width / affine[0, 0] - 16) // 2 * 2)
    height = int((hr.jpg_height / affine[0, 0] - 16) // 2 * 2)
    return top, left, height, width


def test_both_frames_show_the_near_plane_at_one_place(truth: Truth) -> None:
    """What the long JPG shows at p as near is near in the short frame at p + flow(p), but for the masks' coarseness."""
    rect = inner_rect(truth, "00001", "00005")
    affine = partial(apply, nominal_lr_to_hr(truth.frames["00005"], truth.frames["00001"]))
    own, long = truth.true_near("00005", "00001", rect, affine)
    assert 0.005 < long.mean() < 0.9 and own.shape == long.shape == (rect[2] // 2, rect[3] // 2)
    flow = truth.true_flow("00005", "00001", rect).astype(np.float64)
    y, x = np.mgrid[0 : own.shape[0], 0 : own.shape[1]]
    rows, columns = np.rint(y + flow[0]).astype(int), np.rint(x + flow[1]).astype(int)
    inside = (rows >= 0) & (rows < own.shape[0]) & (columns >= 0) & (columns < own.shape[1])
    moved, unmoved = own[rows.clip(0, own.shape[0] - 1), columns.clip(0, own.shape[1] - 1)], own
    wrong = [(seen != long)[inside].mean() for seen in (moved, unmoved)]
    assert wrong[0] < 0.03 and wrong[0] < wrong[1]


@pytest.mark.parametrize(("lr_stem", "hr_stem"), PAIRS)
def test_flow_aligns_the_pair(handheld: Path, truth: Truth, lr_stem: str, hr_stem: str) -> None:
    """The ideal picture sampled at p + flow(p) matches the long JPG seen through the nominal map; at p it does not."""
    rect = inner_rect(truth, hr_stem, lr_stem)
    flow = truth.true_flow(lr_stem, hr_stem, rect).astype(np.float32)
    assert flow.shape == (2, rect[2] // 2, rect[3] // 2)
    top, left, height, width = truth.ideals[lr_stem, 4]
    ideal = truth.true_rgb(lr_stem, (top, left, height, width), 4)
    assert ideal is not None
    jpg = np.asarray(Image.open(handheld / f"{hr_stem}.JPG"))
    # Sample both pictures at the packed pixels' centres, low-passed to packed resolution.
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
    # An additional shift by a third of a packed pixel in any direction is worse.
    for off_x, off_y in ((0.33, 0), (-0.33, 0), (0, 0.33), (0, -0.33)):
        assert right > matched(at(flow[1] + off_x, flow[0] + off_y))


def test_flow_depends_on_the_map_that_the_pair_used(truth: Truth) -> None:
    """A map shifted by 8 JPG pixels to the right shifts the flow by the same distance in the short frame."""
    rect = inner_rect(truth, "00001", "00005")
    affine = nominal_lr_to_hr(truth.frames["00005"], truth.frames["00001"])
    moved = affine.copy()
    moved[0, 2] += 8.0
    plain = truth.true_flow("00005", "00001", rect, partial(apply, affine)).astype(np.float64)
    shifted = truth.true_flow("00005", "00001", rect, partial(apply, moved)).astype(np.float64)
    assert np.median(shifted[1] - plain[1]) == pytest.approx(8 / 4.8 / 2, abs=0.02)
    assert np.median(shifted[0] - plain[0]) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(("lr_stem", "scale"), [("00005", 4), ("00006", 4), ("00007", 4), ("00007", 8)])
def test_ideal_picture_matches_the_frames_jpg(handheld: Path, truth: Truth, lr_stem: str, scale: int) -> None:
    top, left, height, width = truth.ideals[lr_stem, scale]
    ideal = truth.true_rgb(lr_stem, (top, left, height, width), scale)
    assert ideal is not None
    assert ideal.shape == (height * scale, width * scale, 3)
    part = np.asarray(Image.open(handheld / f"{lr_stem}.JPG"))[top : top + height, left : left + width]
    # Average linear light, as a pixel does, not encoded values.
    steps = np.linspace(0, 1, 4097)
    light = np.interp(ideal / 255, sensor.tone_curve(steps), steps)
    low = 255 * sensor.tone_curve(cv2.resize(light, (width, height), interpolation=cv2.INTER_AREA))
    # Compare mean light: demosaicing spreads light, so encoded means differ.
    shown = np.interp(part / 255, sensor.tone_curve(steps), steps)
    assert shown.mean((0, 1)) == pytest.approx(light.mean((0, 1)), rel=0.04)
    assert psnr(low, part) > 22
    # A shift by one pixel in any direction is worse.
    grey = [image.astype(np.float64).mean(-1) for image in (low, part)]
    inside = (slice(2, -2), slice(2, -2))
    errors = {
        (dy, dx): np.mean((np.roll(grey[0], (dy, dx), (0, 1))[inside] - grey[1][inside]) ** 2)
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    }
    assert min(errors, key=lambda shift: errors[shift]) == (0, 0)


def test_true_rgb_cuts_reduces_and_returns_none_outside(truth: Truth) -> None:
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


def test_truth_is_the_same_from_a_copy_and_through_read(handheld: Path, truth: Truth, tmp_path: Path) -> None:
    shutil.copytree(handheld, tmp_path / "elsewhere")
    copied = load_truth(tmp_path / "elsewhere")
    through_reader = load_truth("s3://bucket/00001", read=lambda name: (handheld / name).read_bytes())
    rect = truth.ideals["00006", 4]
    for other in (copied, through_reader):
        assert other is not None
        assert np.array_equal(other.true_rgb("00006", rect, 4), truth.true_rgb("00006", rect, 4))
        small = (rect[0], rect[1], 8, 8)
        assert np.array_equal(other.true_flow("00006", "00002", small), truth.true_flow("00006", "00002", small))


def test_no_truth_is_none_and_damaged_truth_an_error(tmp_path: Path) -> None:
    assert load_truth(tmp_path) is None
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "geometry.json").write_text('{"frames": {}}')
    with pytest.raises(
        ValueError, match=r"geometry\.json: expected .*, got a damaged file \(.*\); simulate the sequence again"
    ):
        load_truth(tmp_path)
