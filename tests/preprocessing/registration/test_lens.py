"""A picture seen through a known lens: what lies where the map says."""

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
def test_without_a_bend_it_is_the_affine_sampling(flip):
    """Whichever way the stored picture is turned against the target."""
    seen = to_8_bit(Scene(1).view(affine.scaling(2.0), SOURCE))
    stored = upright(seen, flip)
    base = np.array([[1.2, 0.02, 40.3], [-0.015, 1.15, 30.7]])
    turned = affine.compose(affine.turn(flip, SOURCE), base)
    found = sample_through(stored, lens(turned), SIZE).astype(int)
    assert found.shape == (*SIZE, 3)
    assert np.abs(found - affine.sample(seen, base, SIZE)).max() <= 1


def test_a_bent_picture_lies_where_the_map_says():
    """Tile by tile, against the scene seen through the affine that follows the lens there."""
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


def test_numbers_are_the_whole_map():
    mapping = lens([[4.8, 0.02, -300.0], [-0.015, 4.79, -200.0]], radial=0.012, tilt=(0.001, -0.002))
    points = np.array([[70.0, 50.0], [200.0, 140.0]])
    assert np.array_equal(LensMap.from_numbers(mapping.numbers())(points), mapping(points))
    assert mapping.numbers().shape == (12,)
