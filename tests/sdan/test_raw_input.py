"""Normalising counts, the two layouts of RAW, and the synthetic mosaic."""

import numpy as np
import pytest
import torch

from preprocessing import colour
from sdan.raw_input import (
    mosaic_from_srgb,
    mosaic_to_packed,
    normalise,
    packed_to_mosaic,
    rendering_from_srgb,
)


def test_normalise_maps_black_to_0_and_white_to_the_gain():
    black, wb = torch.tensor([[500.0, 510, 520, 530]]), torch.tensor([[2.0, 1.0, 1.0, 1.5]])
    white = torch.tensor([4000.0])
    counts = torch.stack([torch.full((2, 2), float(b)) for b in black[0]])[None].to(torch.uint16)
    assert torch.equal(normalise(counts, black, white, wb), torch.zeros(1, 4, 2, 2))
    for share, expected in ((0.25, [0.5, 0.25, 0.25, 0.375]), (1.0, [1.0, 1.0, 1.0, 1.0])):  # clipped to 1
        counts = (black + share * (white - black)).view(1, 4, 1, 1).expand(1, 4, 2, 2)
        result = normalise(counts, black, white, wb)
        assert torch.allclose(result[0, :, 0, 0], torch.tensor(expected))
    assert normalise(counts - 5000, black, white, wb).min() == 0
    assert result.dtype == torch.float32


def test_normalise_uses_the_levels_of_each_image():
    counts = torch.full((2, 4, 1, 1), 1000, dtype=torch.uint16)
    black, wb = torch.tensor([[0.0] * 4, [500.0] * 4]), torch.ones(2, 4)
    result = normalise(counts, black, torch.tensor([2000.0, 1500.0]), wb)
    assert torch.allclose(result[:, 0, 0, 0], torch.tensor([0.5, 0.5]))
    result = normalise(counts, black, torch.tensor([2000.0, 2500.0]), wb)
    assert torch.allclose(result[:, 0, 0, 0], torch.tensor([0.5, 0.25]))


def test_normalise_refuses_wrong_levels_and_shapes():
    counts, four = torch.zeros(1, 4, 2, 2), torch.ones(1, 4)
    with pytest.raises(ValueError, match=r"white level: expected more than the black level \[\[512.*, got \[512"):
        normalise(counts, four * 512, torch.tensor([512.0]), four)
    with pytest.raises(ValueError, match="RAW: expected packed"):
        normalise(counts, four[0], torch.tensor([4000.0]), four)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint8, torch.float32])
def test_each_colour_is_at_its_place_in_the_mosaic(dtype):
    packed = torch.arange(2 * 4 * 3 * 5).view(2, 4, 3, 5).to(dtype)
    mosaic = packed_to_mosaic(packed)
    assert mosaic.shape == (2, 1, 6, 10) and mosaic.dtype == dtype
    for channel, (row, col) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        assert mosaic[:, 0, row::2, col::2].tolist() == packed[:, channel].tolist()
    assert mosaic_to_packed(mosaic).tolist() == packed.tolist()


def test_large_counts_survive_the_layouts():
    packed = torch.full((1, 4, 2, 2), 65535, dtype=torch.int32).to(torch.uint16)
    assert packed_to_mosaic(packed).int().min() == 65535


def test_a_synthetic_mosaic_samples_linear_light_by_colour():
    srgb, linear = torch.tensor([0.02, 0.5, 1.0]), torch.tensor([0.02 / 12.92, 0.21404, 1.0])
    image = srgb.view(1, 3, 1, 1).expand(1, 3, 2, 2)
    expected = linear[[0, 1, 1, 2]].view(1, 4, 1, 1)
    torch.testing.assert_close(mosaic_from_srgb(image), expected, atol=1e-5, rtol=0)
    image = torch.arange(12.0).view(1, 3, 2, 2) / 12  # every photosite and colour differs
    photosites = mosaic_from_srgb(image).flatten()
    chosen = torch.stack([image[0, 0, 0, 0], image[0, 1, 0, 1], image[0, 1, 1, 0], image[0, 2, 1, 1]])
    torch.testing.assert_close(photosites[1:], ((chosen[1:] + 0.055) / 1.055) ** 2.4)
    assert photosites[0] == 0


def test_pictures_get_the_models_rendering_curve():
    picture = torch.linspace(0, 1, 256).expand(3, 2, 256)
    assert torch.equal(rendering_from_srgb(picture, "srgb"), picture)
    expected = colour.linear_to_srgb(colour.bt709_to_linear(rendering_from_srgb(picture, "bt709").numpy()))
    assert np.abs(expected - picture.numpy()).max() < 1e-5
