"""Known maps are recovered to a twentieth of a short-focal pixel; unrelated pictures are refused."""

import cv2
import numpy as np
import pytest
from known_scene import Scene, to_8_bit

from preprocessing.registration.affine import apply, compose, invert, scaling, translation
from preprocessing.registration.register import RegistrationError, register
from preprocessing.registration.shift import luminance

SIZE = (200, 300)
SHOWN = (160, 240)
"""Area that the long picture covers, pixels of the short one."""
ZOOM = 4.0
NOMINAL = compose(scaling(ZOOM), translation(-30, -20))
INNER = np.array([[45.0, 35], [255, 35], [45, 165], [255, 165], [150, 100]])
MAPS = {
    "none": np.eye(2, 3),
    "shift": translation(2.3, -1.7),
    "half a pixel": translation(0.5, 0.25),
    "far": translation(-18.4, 9.6),
}


def affine(linear, x, y):
    """An affine map about the picture's centre."""
    inner = np.concatenate([np.asarray(linear, float), [[x], [y]]], axis=1)
    return compose(translation(150, 100), compose(inner, translation(-150, -100)))


MAPS["affine"] = affine([[1.01, 0.012], [-0.009, 0.992]], 3.4, 5.1)
MAPS["smaller"] = affine([[0.975, 0.0], [0.0, 0.98]], -6.2, 2.2)


def short_picture(seed, noise=1.5):
    picture = to_8_bit(Scene(seed, waves=600).view(compose(translation(-300, -200), scaling(2.0)), SIZE))
    plane = luminance(picture)
    return (plane + np.random.default_rng(seed).normal(0, noise, plane.shape)).astype(np.float32)


def long_picture(seed, mapping, *, gamma=1.0, gains=(1.0, 1.0, 1.0), falloff=0.0):
    """uint8 [H, W, 3] that shows at NOMINAL(mapping(p)) what the short picture shows at p."""
    base = compose(translation(-300, -200), scaling(2.0))
    size = (round(SHOWN[0] * ZOOM), round(SHOWN[1] * ZOOM))
    seen = Scene(seed, waves=600).view(compose(base, invert(compose(NOMINAL, mapping))), size)
    y, x = (np.linspace(-1, 1, side) for side in size)
    shade = 1 - falloff * (x[None] ** 2 + y[:, None] ** 2)[..., None] / 2
    return to_8_bit(np.clip(seen**gamma * gains * shade, 0, 1))


def error_px(found, mapping):
    """The largest error at the points INNER, pixels of the long picture."""
    return np.hypot(*(found(INNER) - apply(compose(NOMINAL, mapping), INNER)).T).max()


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("lens", [True, False], ids=["lens", "affine"])
def test_a_known_map_is_recovered(name, lens):
    moving = long_picture(5, MAPS[name])
    found = register(short_picture(5), moving, NOMINAL, lens=lens)
    assert error_px(found, MAPS[name]) < 0.2


@pytest.mark.parametrize(
    "light",
    [
        {"gains": (0.55, 0.55, 0.55)},
        {"gamma": 1.5},
        {"gains": (0.7, 0.9, 1.0)},
        {"falloff": 0.6},
        {"gamma": 1.3, "gains": (0.8, 0.9, 1.0), "falloff": 0.3},
    ],
    ids=["darker", "contrast", "colour", "vignetting", "all"],
)
def test_light_and_colour_do_not_change_the_map(light):
    moving = long_picture(5, MAPS["affine"], **light)
    assert error_px(register(short_picture(5), moving, NOMINAL), MAPS["affine"]) < 0.2


def test_sensor_noise_is_tolerated():
    moving = long_picture(3, MAPS["shift"])
    assert error_px(register(short_picture(3, noise=12), moving, NOMINAL), MAPS["shift"]) < 0.5


@pytest.mark.parametrize("parallax_px", [0.6, 1.5, 5.0])
def test_a_moving_foreground_does_not_change_the_map(parallax_px):
    mapping = MAPS["shift"]
    moving = long_picture(6, mapping)
    nearer = long_picture(6, compose(translation(parallax_px, 0.4), mapping))
    moving[:, 240:420] = nearer[:, 240:420]
    moving[500:, 600:] = nearer[500:, 600:]
    found = register(short_picture(6), moving, NOMINAL)
    assert error_px(found, mapping) < 0.3


def sawtooth(density):
    """Light that rises slowly and falls sharply to the right and down; 4 `density` samples per short pixel."""
    down, right = ((np.arange(side * density * 4) + 0.5) / (density * 4) for side in SIZE)
    light = 0.01 + 0.45 * (down / 21.3 % 1)[:, None] + 0.45 * (right / 27.7 % 1)[None]
    return light.astype(np.float32)


@pytest.mark.parametrize(("blur_px", "limit_px"), [(0.75, 0.1), (0.85, 0.16)])
def test_tone_curve_and_sharpening_do_not_move_edges(blur_px, limit_px):
    """All edges fall in one direction; the short picture has a gamma, the long one a tone curve and sharpening."""
    lens = cv2.GaussianBlur(sawtooth(4), (0, 0), 16 * blur_px)
    short = 255 * cv2.resize(lens, SIZE[::-1], interpolation=cv2.INTER_AREA) ** (1 / 2.2)
    short += np.random.default_rng(0).normal(0, 1, short.shape).astype(np.float32)
    seen = sawtooth(4)[16 * 20 : 16 * (20 + SHOWN[0]), 16 * 30 : 16 * (30 + SHOWN[1])]
    light = cv2.resize(cv2.GaussianBlur(seen, (0, 0), 4 * 0.6), None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    toned = light ** (1 / 2.4) + 0.03 * np.sin(2 * np.pi * (light ** (1 / 2.4) - 0.5))
    toned += 0.45 * (toned - cv2.GaussianBlur(toned, (0, 0), 1))
    moving = np.repeat(np.rint(255 * np.clip(toned, 0, 1)).astype(np.uint8)[..., None], 3, axis=2)
    assert error_px(register(short, moving, NOMINAL), np.eye(2, 3)) < limit_px


def test_sharp_leaves_do_not_outweigh_a_soft_background():
    mapping, leaves = MAPS["shift"], (slice(None), slice(80, 130))
    near = compose(translation(0.5, 0.2), mapping)
    short = [short_picture(seed, noise=0) for seed in (9, 10)]
    long = [long_picture(9, mapping), long_picture(10, near)]
    plane = cv2.GaussianBlur(short[0], (0, 0), 2.5)
    plane[leaves] = short[1][leaves]
    moving = cv2.GaussianBlur(long[0], (0, 0), 2.5 * ZOOM)
    moving[:, 200:400] = long[1][:, 200:400]  # the leaves, to a pixel of the short picture
    plane += np.random.default_rng(9).normal(0, 1.5, plane.shape).astype(np.float32)
    assert error_px(register(plane, moving, NOMINAL), mapping) < 0.4


@pytest.mark.parametrize("seed", range(4))
def test_unrelated_pictures_are_refused(seed):
    moving = long_picture(seed, MAPS["none"])
    with pytest.raises(RegistrationError, match=r"(correlation|overlapping blocks|shared area|map).*: expected"):
        register(short_picture(seed + 50), moving, NOMINAL)


def test_noise_and_flat_and_tiny_pictures_are_refused():
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (640, 960, 3), dtype=np.uint8)
    flat = np.full((640, 960, 3), 90, np.uint8)
    with pytest.raises(RegistrationError, match="expected"):
        register(short_picture(1), noise, NOMINAL)
    with pytest.raises(RegistrationError, match="detail: expected structure"):
        register(short_picture(1), flat, NOMINAL)
    with pytest.raises(RegistrationError, match="detail: expected structure"):
        register(np.full(SIZE, 90, np.float32), flat, NOMINAL)
    with pytest.raises(RegistrationError, match="shared area: expected at least 32 px each way, got 20 px"):
        register(np.full((20, 40), 90, np.float32), flat, NOMINAL)


def test_an_implausible_map_is_refused():
    """A picture that matches, but only with a tenth more zoom than the focal lengths say."""
    wide = affine([[1.1, 0.0], [0.0, 1.1]], 0.0, 0.0)
    with pytest.raises(RegistrationError, match=r"(correlation|map).*: expected"):
        register(short_picture(5), long_picture(5, wide), NOMINAL)
