"""Counts to [0, 1], and the two layouts of RAW."""

import pytest
import torch

from sdan.raw_input import mosaic_to_packed, normalise, packed_to_mosaic


def test_normalise_maps_black_to_zero_and_white_to_one_with_each_channels_gain():
    black, wb = torch.tensor([[500.0, 510, 520, 530]]), torch.tensor([[2.0, 1.0, 1.0, 1.5]])
    white = torch.tensor([4000.0])
    counts = torch.stack([torch.full((2, 2), float(b)) for b in black[0]])[None].to(torch.uint16)
    assert torch.equal(normalise(counts, black, white, wb), torch.zeros(1, 4, 2, 2))
    half = ((black + white) / 2).view(1, 4, 1, 1).expand(1, 4, 2, 2)
    result = normalise(half, black, white, wb)
    assert torch.allclose(result[0, :, 0, 0], torch.tensor([1.0, 0.5, 0.5, 0.75]))  # red is clipped
    assert result.dtype == torch.float32


def test_normalise_keeps_images_of_a_batch_apart():
    counts = torch.full((2, 4, 1, 1), 1000, dtype=torch.uint16)
    black, wb = torch.tensor([[0.0] * 4, [500.0] * 4]), torch.ones(2, 4)
    result = normalise(counts, black, torch.tensor([2000.0, 1500.0]), wb)
    assert torch.allclose(result[:, 0, 0, 0], torch.tensor([0.5, 0.5]))
    result = normalise(counts, black, torch.tensor([2000.0, 2500.0]), wb)
    assert torch.allclose(result[:, 0, 0, 0], torch.tensor([0.5, 0.25]))


def test_normalise_refuses_what_does_not_fit():
    counts, four = torch.zeros(1, 4, 2, 2), torch.ones(1, 4)
    with pytest.raises(ValueError, match="white level must exceed black"):
        normalise(counts, four * 512, torch.tensor([512.0]), four)
    with pytest.raises(ValueError, match="expected packed"):
        normalise(counts, four[0], torch.tensor([4000.0]), four)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint8, torch.float32])
def test_mosaic_puts_each_colour_in_its_place(dtype):
    packed = torch.arange(2 * 4 * 3 * 5).view(2, 4, 3, 5).to(dtype)
    mosaic = packed_to_mosaic(packed)
    assert mosaic.shape == (2, 1, 6, 10) and mosaic.dtype == dtype
    for channel, (row, col) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        assert mosaic[:, 0, row::2, col::2].tolist() == packed[:, channel].tolist()
    assert mosaic_to_packed(mosaic).tolist() == packed.tolist()


def test_large_counts_survive_the_layouts():
    packed = torch.full((1, 4, 2, 2), 65535, dtype=torch.int32).to(torch.uint16)
    assert packed_to_mosaic(packed).int().min() == 65535
