"""A known shift between two pictures in different light is measured; correlation is Pearson's."""

import numpy as np
import pytest
from known_scene import Scene, to_8_bit

from preprocessing.registration.affine import compose, invert, scaling, translation
from preprocessing.registration.shift import correlation, local_detail, luminance, measure_shift

SIZE = (200, 300)


def planes_of(seed, mapping, noise=1.5):
    """Two planes of the same size; the second is moved by `mapping` and has another contrast and colour."""
    scene, draw = Scene(seed, waves=600), np.random.default_rng(seed)
    base = compose(translation(-300, -200), scaling(2.0))
    moved = scene.view(compose(base, invert(mapping)), SIZE) ** 1.3 * [0.8, 0.9, 1.0]
    planes = [luminance(to_8_bit(np.clip(p, 0, 1))) for p in (scene.view(base, SIZE), moved)]
    return [(plane + draw.normal(0, noise, plane.shape)).astype(np.float32) for plane in planes]


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.4, -0.3), (5.3, -8.6), (-12.2, 3.1)])
def test_a_known_shift_is_measured(shift):
    found_y, found_x = measure_shift(*map(local_detail, planes_of(7, translation(*shift))))
    assert np.hypot(found_x - shift[0], found_y - shift[1]) < 0.05


def test_unmeasurable_shifts_are_nan():
    flat = np.zeros((64, 64), np.float32)
    assert np.isnan(measure_shift(flat, flat)).all()
    assert np.isnan(correlation(flat, flat))
    draw = np.random.default_rng(0)
    a, b = (draw.normal(0, 20, (128, 128)).astype(np.float32) for _ in range(2))
    assert np.isnan(measure_shift(a, b)).all()


def test_correlation_is_pearsons():
    a = np.random.default_rng(1).normal(100, 20, (50, 50)).astype(np.float32)
    assert correlation(a, 0.5 * a + 7) == pytest.approx(1, abs=1e-5)
    assert correlation(a, -a) == pytest.approx(-1, abs=1e-5)
    b = np.random.default_rng(2).normal(0, 3, (50, 50)).astype(np.float32) + 0.1 * a
    assert correlation(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-5)


def test_local_detail_ignores_exposure_and_vignetting():
    plane = planes_of(7, translation(0, 0), noise=0)[0]
    shade = np.linspace(1, 0.5, plane.shape[1], dtype=np.float32)
    assert correlation(local_detail(plane), local_detail(0.7 * plane * shade)) > 0.98
