"""Reduced pictures: known colours and edges stay where they are, and every draw is seeded."""

import numpy as np
import pytest

from preprocessing.photometry.reduction import FILTERS, _resized, reduced


def gradient(side=64):
    """Smooth colours: what every reduction must keep."""
    ramp = np.linspace(20, 230, side)
    picture = np.stack([np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side)), np.full((side, side), 90.0)])
    return np.rint(picture).astype(np.uint8)


def test_smooth_colours_stay_where_they_are():
    picture = gradient()
    expected = picture.reshape(3, 16, 4, 16, 4).mean((2, 4))
    for seed in range(24):
        small = reduced(picture, 4, np.random.default_rng(seed))
        assert small.dtype == np.uint8 and small.shape == (3, 16, 16)
        inside = np.abs(small[:, 3:-3, 3:-3] - expected[:, 3:-3, 3:-3])
        assert inside.max() <= 12 and inside.mean() < 3, seed


def test_the_same_seed_gives_the_same_picture():
    picture = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    one, same, other = (reduced(picture, 4, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_the_centre_of_a_blob(name):
    rows = np.arange(64)
    blob = np.exp(-((rows - 30.0) ** 2) / 72)
    small = _resized(np.repeat((200 * np.outer(blob, blob))[..., None], 3, axis=2).astype(np.uint8), 4, name)
    weights = small[..., 0].astype(float)
    centre = (weights.sum(0) * np.arange(16)).sum() / weights.sum()
    assert abs(centre - (30.5 / 4 - 0.5)) < 0.05
