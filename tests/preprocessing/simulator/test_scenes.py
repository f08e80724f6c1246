"""Scenes: consistent canvases, detail at every focal length, photographs as scenes."""

from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from preprocessing.simulator.scenery import materials
from preprocessing.simulator.scenery.photographs import find_photographs
from preprocessing.simulator.scenery.subjects import SUBJECTS
from preprocessing.simulator.scenes import Scene, build_scene, halved, to_linear

WIDTH = 480
BOXES = [(-m * WIDTH / 2, -m * WIDTH / 3, m * WIDTH / 2, m * WIDTH / 3) for m in (1.2, 2.7, 5.4, 10.8)]


def build(subject: str | None = None, seed: int = 5, **more: object) -> Scene:
    return build_scene(np.random.default_rng(seed), BOXES, frame_width=WIDTH, subject=subject, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def street() -> Scene:
    return build("street")


def test_coarse_canvases_have_the_light_of_the_finer_ones(street: Scene) -> None:
    for planes in (street.far, street.near):
        for finer, coarser in pairwise(planes):
            assert coarser.density == finer.density / 2
            row = round((finer.y0 - coarser.y0) * coarser.density)
            column = round((finer.x0 - coarser.x0) * coarser.density)
            height, width = finer.pixels.shape[0] // 2, finer.pixels.shape[1] // 2
            centre = to_linear(coarser.pixels[row : row + height, column : column + width])
            light = to_linear(finer.pixels).reshape(height, 2, width, 2, -1).mean((1, 3))
            # Compare low-passed: fine detail may differ. Clipped overshoot and 8-bit sRGB stay below 0.01.
            assert np.abs(cv2.GaussianBlur(centre - light, (0, 0), 5)).max() < 0.01
            assert abs(float((centre - light).mean())) < 2e-4


@pytest.mark.parametrize("axis", [0, 1])
def test_halving_suppresses_moire_without_a_shift(axis: int) -> None:
    at = np.arange(256) + 0.5

    def halved_wave(period: float) -> np.ndarray:
        wave = (0.5 + 0.4 * np.cos(2 * np.pi * at / period)).astype(np.float32)
        picture = np.repeat(np.repeat(np.expand_dims(wave, 1 - axis), 256, 1 - axis)[..., None], 3, axis=2)
        half = halved(picture)
        assert half.shape == (128, 128, 3)
        return np.moveaxis(half[..., 1], axis, 0)[8:-8, 64] - np.float32(0.5)

    # Periods of 1.4 to 1.7 reduced pixels must not alias. (A 2x2 average would keep 43 to 60 %.)
    for period, least in ((2.8, 0.02), (3.2, 0.15), (3.4, 0.25)):
        assert np.abs(halved_wave(period)).max() < 0.4 * least
    for period in (8.0, 16.0):
        kept = 0.4 * np.cos(2 * np.pi * (2 * np.arange(128) + 1)[8:-8] / period)
        assert np.abs(halved_wave(period) - kept).max() < 0.02


def test_canvases_cover_the_requested_boxes(street: Scene) -> None:
    for box, canvas in zip(BOXES, street.far, strict=True):
        assert canvas.covers(*box)


def test_the_seed_determines_the_scene(street: Scene) -> None:
    again, other = build("street"), build("street", seed=6)
    for one, two in zip(street.far + street.near, again.far + again.near, strict=True):
        assert np.array_equal(one.pixels, two.pixels)
    assert not np.array_equal(street.far[0].pixels, other.far[0].pixels)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_subject_has_detail_at_every_focal_length(subject: str) -> None:
    """In the middle of every canvas most 32 px blocks have edges or texture, and colours are muted."""
    scene = build(subject)
    for canvas in scene.far:
        height, width = canvas.pixels.shape[:2]
        middle = canvas.pixels[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4]
        grey = cv2.cvtColor(middle, cv2.COLOR_RGB2GRAY).astype(np.float32)
        fine = grey - cv2.GaussianBlur(grey, (0, 0), 2)
        rows, columns = (side // 32 * 32 for side in fine.shape)
        blocks = fine[:rows, :columns].reshape(rows // 32, 32, columns // 32, 32).std((1, 3))
        assert np.mean(blocks > 1.5) > 0.85, (subject, canvas.level)
        saturation = middle.max(-1).astype(int) - middle.min(-1)
        assert np.mean(saturation > 200) < 0.02, (subject, canvas.level)
        assert 25 < grey.mean() < 225


def test_materials_repeat_without_a_seam() -> None:
    for name in materials.NAMES:
        tile = materials.material(name)[0].astype(np.float32)
        inside = np.abs(np.diff(tile, axis=1)).mean((0, 2))
        seam = np.abs(tile[:, 0] - tile[:, -1]).mean()
        assert seam <= 1.5 * inside.max(), name


def save_photo(path: Path, size: tuple[int, int], seed: int) -> np.ndarray:
    height, width = size
    picture = np.clip(128 + 60 * materials.noise(seed, 1.0)[:height, :width, None] + (0, 10 * seed, -10 * seed), 0, 255)
    Image.fromarray(picture.astype(np.uint8)).save(path)
    return picture.astype(np.uint8)


def test_photographs_are_not_enlarged_on_any_canvas(tmp_path: Path) -> None:
    save_photo(tmp_path / "a.png", (500, 720), 1)
    save_photo(tmp_path / "b.jpg", (720, 500), 2)
    photos, unreadable = find_photographs(tmp_path)
    assert (len(photos), unreadable) == (2, 0)
    scene = build(photos=photos)
    assert scene.subject == "photographs"
    for canvas in scene.far:
        grey = cv2.cvtColor(canvas.pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)
        fine = (grey - cv2.GaussianBlur(grey, (0, 0), 1.0)).std()
        # 1/f noise exceeds this at its original density; a print enlarged 3 times would have less than half.
        assert fine > 4, canvas.level
    first = build(photos=photos, first_photo=0).far[0].pixels
    second = build(photos=photos, first_photo=1).far[0].pixels
    assert not np.array_equal(first, second)


def test_unreadable_photographs_are_skipped_and_counted(tmp_path: Path) -> None:
    save_photo(tmp_path / "good.JPG", (300, 400), 1)
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff no photograph")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.JPG").read_bytes()[:500])
    (tmp_path / "notes.txt").write_text("not looked at")
    photos, unreadable = find_photographs(tmp_path)
    assert [path.name for path in photos] == ["good.JPG"]
    assert unreadable == 2
