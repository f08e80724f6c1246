"""The truth that the simulator writes: windows of the ideal pictures and masks of the near plane."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from simulated_frames import SIZE, draw_frames

from preprocessing.registration.affine import apply
from preprocessing.simulator import truth_files
from preprocessing.simulator.optics import PRESETS, draw_exposures
from preprocessing.simulator.scenery.canvas import Canvas
from preprocessing.simulator.scenes import Scene
from preprocessing.truth.frame import FAR, NEAR, FrameGeometry, nominal_lr_to_hr
from preprocessing.truth.reader import Truth, load_truth


def test_every_pair_gets_an_ideal_picture() -> None:
    """240/50, 150/35 and 100/24 mm at 4x; 240/24 mm at 8x."""
    planned = [(ideal.frame, ideal.scale) for ideal in truth_files.plan_ideals(draw_frames())]
    assert planned == [(4, 4), (5, 4), (6, 4), (6, 8)]


@pytest.mark.parametrize("seed", range(5))
def test_windows_contain_the_long_frames_footprint(seed: int) -> None:
    frames = draw_frames(seed=seed)
    for ideal, hr in zip(truth_files.plan_ideals(frames), (frames[0], frames[1], frames[2], frames[0]), strict=True):
        lr = frames[ideal.frame]
        top, left, height, width = ideal.window
        assert not any(value % 2 for value in ideal.window)
        corners = np.array([[x, y] for x in (0.0, hr.jpg_width) for y in (0.0, hr.jpg_height)])
        nominal = nominal_lr_to_hr(lr, hr)
        seen = [(corners - nominal[:, 2]) / nominal[0, 0]]
        seen += [lr.from_scene(hr.to_scene(corners + hr.jpg_origin, plane), plane) for plane in (FAR, NEAR)]
        points = np.clip(np.concatenate(seen), 0, [lr.raw_width, lr.raw_height])
        assert (points >= [left, top]).all() and (points <= [left + width, top + height]).all()
        # Not much larger than that: edges may bulge between corners, and 4 px and even numbers are added.
        assert (points.min(axis=0) - [left, top]).max() < 10
        assert ([left + width, top + height] - points.max(axis=0)).max() < 10


def half_covered(folder: Path) -> tuple[Truth, list[FrameGeometry]]:
    """The truth of a sequence whose near plane covers the scene left of its axis."""
    frames = draw_frames()
    near = np.zeros((1000, 1500, 4), np.uint8)
    near[:, :750] = 255
    scene = Scene([], [Canvas(near, -3000.0, -2000.0, 0.25)], "half")
    exposures = draw_exposures(np.random.default_rng(0), PRESETS["handheld"])
    (folder / "truth").mkdir()
    truth_files.write(folder / "truth", {}, scene, frames, exposures, [])
    truth = load_truth(folder)
    assert truth is not None
    assert list(truth.frames.values()) == frames
    assert list(truth.exposures.values()) == exposures
    return truth, frames


def test_near_masks_show_where_the_near_plane_is(tmp_path: Path) -> None:
    truth, frames = half_covered(tmp_path)
    at = np.stack(np.meshgrid(np.arange(2.0, SIZE[0], 7), np.arange(2.0, SIZE[1], 7)), axis=-1)
    for stem, frame in zip(truth.frames, frames, strict=True):
        with Image.open(tmp_path / "truth" / f"{stem}_near.png") as mask:
            assert (mask.mode, mask.size) == ("1", (SIZE[0] // 4, SIZE[1] // 4))
        edge_distance_px = frame.to_scene(at + frame.jpg_origin, NEAR)[..., 0] * frame.magnification
        clear = np.abs(edge_distance_px) > 8
        assert np.array_equal(truth.shows_near(stem, at)[clear], edge_distance_px[clear] < 0)


def test_flow_and_visibility_follow_the_nearest_plane(tmp_path: Path) -> None:
    truth, frames = half_covered(tmp_path)
    lr, hr = frames[4], frames[0]
    rect = (140, 200, 40, 80)
    flow = truth.true_flow("00005", "00001", rect).astype(np.float64)
    x, y = np.meshgrid(rect[1] + 2 * np.arange(40) + 1.0, rect[0] + 2 * np.arange(20) + 1.0)
    at = np.stack([x, y], axis=-1)
    in_jpg = partial(apply, nominal_lr_to_hr(lr, hr))(at.reshape(-1, 2)).reshape(at.shape)
    covered = truth.shows_near("00001", in_jpg)
    assert 0.2 < covered.mean() < 0.8
    for plane, part in ((NEAR, covered), (FAR, ~covered)):
        exact = (lr.from_scene(hr.to_scene(in_jpg + hr.jpg_origin, plane), plane) - at) / 2
        assert np.abs(flow[1] - exact[..., 0])[part].max() < 0.01
        assert np.abs(flow[0] - exact[..., 1])[part].max() < 0.01
        other = (lr.from_scene(hr.to_scene(in_jpg + hr.jpg_origin, 1 - plane), 1 - plane) - at) / 2
        assert np.abs(other - exact)[part].max() > 0.05  # the planes can be distinguished
    positions, visible = truth.true_lr_to_hr("00005", "00001", at)
    assert np.array_equal(visible, ~truth.shows_near("00001", positions))
    assert 0.2 < visible.mean() < 0.8
