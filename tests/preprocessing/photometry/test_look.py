"""The look of a JPG that was made with a known curve and matrix is measured, and taken out again."""

import cv2
import numpy as np
import pytest

from preprocessing.colour import RENDERING_BYTE_TO_LINEAR, linear_to_srgb, srgb_to_linear
from preprocessing.photometry.look import COLUMNS, KNOTS, Look, measure_look

SIZE = (320, 480)


def light(seed=0, most=0.9):
    """Linear light [H, W, 3]: flat patches of many colours and brightnesses, with a little texture."""
    random = np.random.default_rng(seed)
    patches = most * random.random((SIZE[0] // 20, SIZE[1] // 20, 3)) ** 2
    wide = cv2.resize(patches, SIZE[::-1], interpolation=cv2.INTER_NEAREST)
    return np.clip(wide * (1 + 0.02 * random.standard_normal(wide.shape)), 0, 1)


def encoded(linear):
    return np.rint(255 * linear_to_srgb(np.clip(linear, 0, 1))).astype(np.uint8)


def s_curve(value):
    return value + 0.04 * np.sin(2 * np.pi * (value - 0.5))


def vivid(linear, amount=0.25):
    """More saturated, as many cameras render; grey stays grey."""
    matrix = (1 + amount) * np.eye(3) - amount / 3
    return np.clip(linear @ matrix.T, 0, 1)


LOOKS = {
    "plain": lambda linear: encoded(linear),
    "contrast": lambda linear: np.rint(255 * s_curve(linear_to_srgb(linear))).astype(np.uint8),
    "brighter": lambda linear: encoded(np.minimum(1.6 * linear, 1)),
    "vivid": lambda linear: encoded(vivid(linear)),
    "vivid with contrast": lambda linear: np.rint(255 * s_curve(linear_to_srgb(vivid(linear)))).astype(np.uint8),
}


@pytest.mark.parametrize("curve", ["srgb", "bt709"])
@pytest.mark.parametrize("name", LOOKS)
def test_a_known_look_is_taken_out(name, curve):
    seen, other = light(0), light(1)
    table = RENDERING_BYTE_TO_LINEAR[curve]

    def rendered(linear):
        return np.interp(linear, table, np.arange(256)).round().astype(np.uint8)

    look = measure_look(LOOKS[name](seen), rendered(seen), curve)
    picture = LOOKS[name](other)  # another picture by the same camera
    removed = look.remove(picture.transpose(2, 0, 1), curve).transpose(1, 2, 0).astype(float)
    inside = (picture > 4).all(axis=2) & (picture < 250).all(axis=2)
    off = (removed - rendered(other))[inside]
    assert np.abs(off.mean(axis=0)).max() < 1 and np.abs(off).mean() < 2
    for low in range(0, 240, 40):
        level = (rendered(other)[inside][:, 1] >= low) & (rendered(other)[inside][:, 1] < low + 40)
        if level.sum() > 200:
            assert abs(off[level].mean()) < 3, low


def test_grey_black_and_white_stay():
    look = measure_look(LOOKS["vivid with contrast"](light()), encoded(light()), "srgb")
    assert np.allclose(look.matrix.sum(axis=1), 1, atol=1e-6) and (np.diff(look.curve) >= 0).all()
    grey = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    removed = look.remove(grey, "srgb")
    assert (removed.max(axis=0) - removed.min(axis=0)).max() == 0
    assert removed[0, 0, 0] == 0 and removed[0, 0, 255] == 255


def test_a_row_keeps_the_look():
    look = measure_look(LOOKS["vivid"](light()), encoded(light()), "srgb")
    kept = Look.of_row(look.columns())
    assert look.curve.shape == (KNOTS,) and tuple(look.columns()) == COLUMNS
    assert np.array_equal(kept.curve, look.curve) and np.array_equal(kept.matrix, look.matrix)
    assert Look.of_row(dict.fromkeys(COLUMNS)) is None and Look.of_row({}) is None


def test_clipped_pictures_have_no_measurable_look():
    white = np.full((*SIZE, 3), 255, np.uint8)
    assert measure_look(white, white, "srgb") is None
    assert measure_look(white[:2, :2], white[:2, :2], "srgb") is None


def test_the_curve_is_srgbs_own_for_a_plain_picture():
    look = measure_look(encoded(light()), encoded(light()), "srgb")
    assert np.abs(look.curve - np.linspace(0, 1, KNOTS)).max() < 0.01
    assert np.abs(look.matrix - np.eye(3)).max() < 0.01
    assert np.abs(srgb_to_linear(look.curve) - srgb_to_linear(np.linspace(0, 1, KNOTS))).max() < 0.02
