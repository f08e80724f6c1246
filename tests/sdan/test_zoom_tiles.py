"""Where tiles lie, and that joining the tiles of a picture gives the picture."""

from itertools import pairwise

import pytest
import torch

from sdan.tiles import cover, fitted

SIZES = [(40, 56), (41, 90), (16, 16), (16, 17), (90, 16)]
"""Not smaller than the tests' tiles."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("upscale", [1, 3])
def test_the_tiles_of_a_picture_join_to_the_picture(size, upscale):
    picture = torch.rand(3, size[0] * upscale, size[1] * upscale)
    tiling = cover(size, (16, 16), 6, upscale=upscale)
    side = 16 * upscale

    def cut(top):
        some, tops = range(0, len(tiling.lefts), 2), top * upscale
        for columns in (some, [column for column in range(len(tiling.lefts)) if column not in some]):
            lefts = [tiling.lefts[column] * upscale for column in columns]
            if lefts:
                yield columns, torch.stack([picture[:, tops : tops + side, left : left + side] for left in lefts])

    rows = [part.clone() for part in tiling.join((cut(top) for top in tiling.tops), 3, torch.device("cpu"))]
    assert len(rows) == len(tiling.tops) and all(part.shape[1] > 0 for part in rows)
    assert torch.allclose(torch.cat(rows, dim=1), picture, atol=1e-6)


@pytest.mark.parametrize(("size", "step"), [*((size, 1) for size in SIZES), ((40, 56), 2), ((18, 90), 2)])
def test_neighbouring_tiles_share_the_overlap(size, step):
    tiling = cover(size, (16, 16), 5, step=step)
    assert len(tiling) == len(tiling.tops) * len(tiling.lefts)
    for starts, side in ((tiling.tops, size[0]), (tiling.lefts, size[1])):
        assert starts[0] == 0 and starts[-1] == side - 16
        assert all(start % step == 0 for start in starts)
        assert all(0 < later - earlier <= 11 for earlier, later in pairwise(starts))


def test_weights_add_up_to_one_and_drop_the_border():
    tiling = cover((16, 100), (16, 24), 8, upscale=2)
    total = torch.zeros(200)
    for left, weights in zip(tiling.lefts, tiling.col_weights, strict=True):
        total[2 * left : 2 * left + 48] += weights
        assert left == 0 or (weights[:4] == 0).all()  # a quarter of the overlap
        assert left == 76 or (weights[-4:] == 0).all()
    assert torch.allclose(total, torch.ones(200))
    assert torch.equal(tiling.row_weights[0], torch.ones(32))


def test_fitted_tiles_are_as_few_and_smaller():
    for side in (*range(1, 300, 7), 1416, 2120):
        for step in (1, 2):
            whole = side * step
            tile = fitted(whole, 128, 12, step)
            usual, fewer = (len(cover((whole, 1), (min(whole, px), 1), 12, step=step).tops) for px in (128, tile))
            assert tile <= min(whole, 128) and tile % step == 0 and fewer <= usual
    assert fitted(2120, 128, 12) == 123  # 19 tiles, 108 columns less than with 128


def test_a_photo_narrower_than_the_overlap_is_one_tile():
    for side in range(1, 13):
        tiling = cover((side, side), (fitted(side, 128, 12), side), 12)
        assert len(tiling) == 1 and (tiling.height, tiling.width) == (side, side)
