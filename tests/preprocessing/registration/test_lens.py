"""A picture resampled through a known lens is where the map says."""

import numpy as np
import pytest
from known_scene import Scene, to_8_bit

from preprocessing.raw.decode import upright
from preprocessing.registration import affine
from preprocessing.registration.lens import LensMap, sample_through

SOURCE = (300, 400)
SIZE = (150, 210)


def lens(affine, **bend):
    return LensMap(np.asarray(affine, float), np.array([SOURCE[1] / 2, SOURCE[0] / 2]), 250.0, **bend)


@pytest.mark.parametrize("flip", range(8))
def test_without_distortion_it_equals_affine_sampling(flip):
    """For every orientation of the stored picture."""
    seen = to_8_bit(Scene(1).view(affine.scaling(2.0), SOURCE))
    stored = upright(seen, flip)
    base = np.array([[1.2, 0.02, 40.3], [-0.015, 1.15, 30.7]])
    turned = affine.compose(affine.turn(flip, SOURCE), base)
    found = sample_through(stored, lens(turned), SIZE).astype(int)
    assert found.shape == (*SIZE, 3)
    assert np.abs(found - affine.sample(seen, base, SIZE)).max() <= 1


def test_a_distorted_picture_is_where_the_map_says():
    """Tile by tile, compared with the scene seen through the local affine."""
    scene, base = Scene(2), affine.scaling(2.0)
    source = to_8_bit(scene.view(base, SOURCE))
    mapping = lens([[1.25, 0.01, 60.0], [-0.01, 1.25, 50.0]], radial=0.05, tilt=(0.02, -0.015))
    assert mapping.departure(mapping.affine_over(0, 0, SIZE[1], SIZE[0]), 0, 0, SIZE[1], SIZE[0]) > 1
    found = sample_through(source, mapping, SIZE).astype(float)
    side = 30
    for top in range(0, SIZE[0], side):
        for left in range(0, SIZE[1], side):
            local = mapping.affine_over(left, top, left + side, top + side)
            place = affine.compose(local, affine.translation(left, top))
            expected = scene.view(affine.compose(base, place), (side, side)) * 255
            inner = (slice(2, -2), slice(2, -2))
            error = (found[top : top + side, left : left + side] - expected)[inner].mean(-1)
            grad_y, grad_x = np.gradient(expected.mean(-1))
            columns = np.stack([grad_x[inner].ravel(), grad_y[inner].ravel()], 1)
            shift = np.linalg.lstsq(columns, error.ravel(), rcond=None)[0]
            assert np.abs(shift).max() < 0.05


def test_numbers_restore_the_map():
    mapping = lens([[4.8, 0.02, -300.0], [-0.015, 4.79, -200.0]], radial=0.012, tilt=(0.001, -0.002))
    points = np.array([[70.0, 50.0], [200.0, 140.0]])
    assert np.array_equal(LensMap.from_numbers(mapping.numbers())(points), mapping(points))
    assert mapping.numbers().shape == (12,)


def lens_map(**values):
    matrix = np.array([[4.8, 0.02, -300.0], [-0.015, 4.79, -200.0]])
    return LensMap(matrix, np.array([384.0, 256.0]), 461.5, **values)


def test_a_lens_map_without_distortion_is_its_affine():
    points = np.array([[70.0, 50.0], [200.0, 140.0]])
    assert np.allclose(lens_map()(points), affine.apply(lens_map().affine, points))
    assert np.allclose(lens_map().affine_over(60, 40, 220, 150), lens_map().affine)
    assert lens_map().departure(lens_map().affine, 60, 40, 220, 150) < 1e-9


def test_radial_distortion_is_radial_and_cubic():
    mapping = lens_map(radial=0.012)
    inner, outer = (affine.apply(affine.invert(mapping.affine), np.array([[384.0 + x, 256.0]])) for x in (100, 200))
    assert np.allclose(mapping(inner), [[484 + 0.012 * 100**3 / 461.5**2, 256]])
    assert np.allclose(mapping(outer)[0, 0] - 584, 8 * (mapping(inner)[0, 0] - 484))


def test_jacobian_matches_finite_differences():
    mapping = lens_map(radial=0.01, tilt=(0.001, -0.002))
    points = np.array([[70.0, 50.0], [200.0, 140.0], [140.0, 60.0]])
    for index in range(9):
        step = np.zeros(9)
        step[index] = 1e-4
        change = (mapping.updated(step)(points) - mapping(points)) / 1e-4
        derivative = mapping.jacobian(points)[:, :, index]
        assert np.abs(change - derivative).max() < 0.05 * max(1, np.abs(derivative).max())


@pytest.mark.parametrize("flip", range(8))
def test_a_lens_map_composes_with_similarities(flip):
    mapping = lens_map(radial=0.01, tilt=(0.001, -0.002))
    similarity = affine.compose(affine.turn(flip, (512, 768)), affine.about_centres(1.3, (512, 768), (512, 768)))
    points = np.array([[70.0, 50.0], [200.0, 140.0], [140.0, 60.0]])
    assert np.allclose(mapping.then(similarity)(points), affine.apply(similarity, mapping(points)))
    shift = affine.translation(3, -7)
    assert np.allclose(mapping.after(shift)(points), mapping(affine.apply(shift, points)))
