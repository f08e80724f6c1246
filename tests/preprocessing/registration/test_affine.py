"""Pictures resampled through a known shift, scale or turn are where the map says."""

import numpy as np
import pytest
from known_scene import Scene, to_8_bit

from preprocessing.raw.decode import upright
from preprocessing.registration import affine

SIZE = (120, 160)


def misplacement(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """(dx, dy) in pixels of `found` against `expected`, least squares on the expected picture's gradient."""
    inner = (slice(8, -8), slice(8, -8))
    expected, found = expected.astype(float).mean(-1), found.astype(float).mean(-1)
    grad_y, grad_x = np.gradient(expected)
    columns = np.stack([grad_x[inner].ravel(), grad_y[inner].ravel()], 1)
    return -np.linalg.lstsq(columns, (found - expected)[inner].ravel(), rcond=None)[0]


def turned(degrees: float, factor: float, x: float, y: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    linear = factor * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.concatenate([linear, [[x], [y]]], axis=1)


@pytest.mark.parametrize(
    "to_source",
    [
        affine.translation(20.37, 30.79),
        np.array([[1.2, 0, 11.13], [0, 1.2, 7.77]]),
        np.array([[1.0417, 0, 40.5], [0, 1.07, 20.25]]),
        np.array([[0.8, 0, 10.2], [0, 0.8, 3.3]]),
        turned(1.5, 1.1, 30.3, 20.7),
        turned(-0.4, 1.0, 12.0, 25.5),
    ],
    ids=["shift", "shrink", "two scales", "enlarge", "turn and shrink", "turn"],
)
def test_sample_is_where_the_map_says(to_source):
    scene = Scene(1)
    # The scene has wavelengths of 10 px and more; the source samples it twice as densely.
    base = affine.scaling(2.0)
    source = to_8_bit(scene.view(base, (240, 320)))
    expected = scene.view(affine.compose(base, to_source), SIZE) * 255
    found = affine.sample(source, to_source, SIZE)
    assert found.shape == (*SIZE, 3) and found.dtype == np.uint8
    assert np.abs(misplacement(found, expected)).max() < 0.02


def test_sample_at_whole_pixels_changes_nothing():
    source = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    assert np.array_equal(affine.sample(source, affine.translation(7, 5), (40, 50)), source[5:45, 7:57])


def test_sample_removes_detail_that_would_alias():
    checks = np.indices((240, 240)).sum(0) % 2 * 255
    source = np.repeat(checks[..., None], 3, -1).astype(np.uint8)
    shrunk = affine.sample(source, np.array([[1.3, 0, 3.1], [0, 1.3, 2.2]]), (170, 170))
    assert shrunk[10:-10, 10:-10].std() < 6  # interpolation without low-pass leaves moire of about 40


def test_both_resampling_methods_agree():
    source = to_8_bit(Scene(2).view(affine.scaling(1.5), (200, 200)))
    upright_map = np.array([[1.17, 0, 12.3], [0, 1.11, 9.7]])
    sheared_map = upright_map.copy()
    sheared_map[0, 1] = 1e-7  # moves no pixel, but selects the two-pass resampling
    there = affine.sample(source, upright_map, (100, 120)).astype(int)
    assert np.abs(there - affine.sample(source, sheared_map, (100, 120))).max() <= 2


@pytest.mark.parametrize("flip", range(8))
def test_turn_matches_upright(flip):
    sensor = np.random.default_rng(flip).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    stored = upright(sensor, flip)
    assert np.array_equal(affine.sample(stored, affine.turn(flip, (30, 50)), (30, 50)), sensor)


def test_upright_turns_as_viewers_do():
    arrow = np.arange(6).reshape(2, 3, 1)
    assert np.array_equal(upright(arrow, 3), np.rot90(arrow, 2))
    assert np.array_equal(upright(arrow, 5), np.rot90(arrow, 1))
    assert np.array_equal(upright(arrow, 6), np.rot90(arrow, -1))


def test_the_jpg_is_centred_in_the_frame():
    mapping = affine.frame_to_jpg(1.0, (2848, 4256), (2832, 4240), 0)
    assert np.array_equal(affine.apply(mapping, np.array([[8.0, 8.0], [2128.0, 1424.0]])), [[0, 0], [2120, 1416]])


def test_zoom_is_about_the_centre():
    mapping = affine.frame_to_jpg(4.8, (1024, 1536), (1024, 1536), 0)
    points = affine.apply(mapping, np.array([[768.0, 512.0], [769.0, 510.0]]))
    assert np.allclose(points, [[768, 512], [772.8, 502.4]])


def test_a_small_jpg_is_scaled_and_a_cropped_one_is_not():
    assert affine.jpg_scale((2832, 4240), (2848, 4256)) == 1
    assert affine.jpg_scale((2384, 4240), (2848, 4256)) == 1  # 16:9
    assert affine.jpg_scale((1424, 2128), (2848, 4256)) == 0.5


@pytest.mark.parametrize(
    ("orientation", "flip", "jpg", "expected"),
    [
        (1, 0, (200, 300), 0),
        (None, 0, (200, 300), 0),
        (6, 6, (200, 300), 0),  # the camera stores sensor orientation and a tag
        (1, 6, (300, 200), 6),  # software has turned the pixels
        (None, 5, (300, 200), 5),
        (None, 5, (200, 300), 0),  # no tag, pixels not turned
        (3, 3, (200, 300), 0),
        (1, 3, (200, 300), 3),
        (None, 3, (200, 300), 0),
    ],
)
def test_stored_flip(orientation, flip, jpg, expected):
    assert affine.stored_flip(orientation, flip, jpg, (200, 300)) == expected


def test_footprint_is_the_largest_box_inside():
    left, top, right, bottom = affine.footprint(turned(1.0, 2.0, 10, 20), (400, 600))
    corners = np.array([[left, top], [right, top], [left, bottom], [right, bottom]])
    inside = affine.apply(turned(1.0, 2.0, 10, 20), corners)
    assert (inside >= -8).all() and (inside <= np.array([608, 408])).all()
    assert right - left > 280 and bottom - top > 180


def test_footprint_of_a_scaling_is_exact():
    mapping = affine.compose(affine.scaling(2.0), affine.translation(-30, -20))
    assert affine.footprint(mapping, (400, 600)) == (30, 20, 330, 220)


def test_sampling_outside_the_source_is_an_error():
    with pytest.raises(ValueError, match=r"target: expected within the source's 50x50 px, got \[1"):
        affine.sample(np.zeros((50, 50, 3), np.uint8), affine.translation(1, 0), (50, 50))
