"""Known affines come back; unrelated pictures are refused."""

import numpy as np
import pytest
from known_scene import Scene, to_8_bit

from preprocessing import registration
from preprocessing.geometry import apply, compose, scaling, translation

SIZE = (200, 300)
CORNERS = np.array([[20.0, 20], [280, 20], [20, 180], [280, 180], [150, 100]])


def affine(linear, x, y):
    """About the picture's centre."""
    centre = translation(150, 100)
    inner = np.concatenate([np.asarray(linear, float), [[x], [y]]], axis=1)
    return compose(centre, compose(inner, translation(-150, -100)))


def pair_of(seed, mapping, noise=1.5):
    """Luminance of a reference and of what is moved by `mapping`, in other light: gain, gamma, vignetting, noise."""
    scene, draw = Scene(seed, waves=600), np.random.default_rng(seed)
    base = compose(translation(-300, -200), scaling(2.0))
    reference = to_8_bit(scene.view(base, SIZE))
    # moving(mapping(p)) = reference(p), so the moving picture looks through the inverse.
    inverse = np.linalg.inv(np.vstack([mapping, [0, 0, 1]]))[:2]
    y, x = np.mgrid[:200, :300]
    shade = 1 - 0.3 * (((x - 150) / 150) ** 2 + ((y - 100) / 100) ** 2)[..., None] / 2
    moving = to_8_bit(np.clip((scene.view(compose(base, inverse), SIZE) ** 1.3) * [0.8, 0.9, 1.0] * shade, 0, 1))
    planes = [registration.luminance(picture) for picture in (reference, moving)]
    return [(plane + draw.normal(0, noise, plane.shape)).astype(np.float32) for plane in planes]


@pytest.mark.parametrize(
    "mapping",
    [
        affine(np.eye(2), 0, 0),
        affine(np.eye(2), 2.3, -1.7),
        affine(np.eye(2), -18.4, 9.6),
        affine([[1.01, 0.012], [-0.009, 0.992]], 3.4, 5.1),
        affine([[0.975, 0.0], [0.0, 0.98]], -6.2, 2.2),
    ],
    ids=["none", "shift", "far", "affine", "smaller"],
)
def test_a_known_affine_is_recovered(mapping):
    found = registration.register(*pair_of(5, mapping))
    assert np.abs(apply(found, CORNERS) - apply(mapping, CORNERS)).max() < 0.1


def test_a_foreground_that_moves_on_its_own_does_not_pull():
    reference, moving = pair_of(6, affine(np.eye(2), 1.0, 0.5))
    _, foreground = pair_of(6, affine(np.eye(2), 6.0, 0.5))
    moving[60:150, 40:140] = foreground[60:150, 40:140]
    found = registration.register(reference, moving)
    assert np.abs(apply(found, CORNERS) - CORNERS - [1.0, 0.5]).max() < 0.25


def test_unrelated_pictures_are_refused():
    reference, _ = pair_of(1, affine(np.eye(2), 0, 0))
    other, _ = pair_of(2, affine(np.eye(2), 0, 0))
    with pytest.raises(registration.RegistrationError, match="expected"):
        registration.register(reference, other)


def test_flat_and_tiny_pictures_are_refused():
    flat = np.full(SIZE, 90, np.float32)
    with pytest.raises(registration.RegistrationError):
        registration.register(flat, flat)
    with pytest.raises(registration.RegistrationError, match="shared area 20x20"):
        registration.register(flat[:20, :20], flat[:20, :20])


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.4, -0.3), (5.3, -8.6), (-12.2, 3.1)])
def test_the_shift_left_is_measured(shift):
    planes = pair_of(7, affine(np.eye(2), *shift))
    found_y, found_x = registration.measure_shift(*map(registration.local_detail, planes))
    assert np.hypot(found_x - shift[0], found_y - shift[1]) < 0.1


def test_nothing_to_measure_is_nan():
    flat = np.zeros((64, 64), np.float32)
    assert np.isnan(registration.measure_shift(flat, flat)).all()
    assert np.isnan(registration.correlation(flat, flat))
    draw = np.random.default_rng(0)
    a, b = (draw.normal(0, 20, (128, 128)).astype(np.float32) for _ in range(2))
    assert np.isnan(registration.measure_shift(a, b)).all()


def test_correlation():
    a = np.random.default_rng(1).normal(100, 20, (50, 50)).astype(np.float32)
    assert registration.correlation(a, 0.5 * a + 7) == pytest.approx(1, abs=1e-5)
    assert registration.correlation(a, -a) == pytest.approx(-1, abs=1e-5)
