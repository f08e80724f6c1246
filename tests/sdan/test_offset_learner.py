"""The pyramid offset learner."""

import pytest
import torch

from sdan.network import CHANNELS, SDAN, SDANConfig
from sdan.offsets.offset_learner import PyramidOffsetLearner, centre_of_mass, cost_volume
from sdan.raw_input import packed_to_mosaic, rgb_to_packed
from sdan.resample import bicubic, low_pass

SMALL = SDANConfig(scale=2, features=8, blocks=1, skip="rendering", offset_learner="pyramid")


def learner(layout: str = "rgb", max_shift: int = 24) -> PyramidOffsetLearner:
    """An untrained one, with heads that are not zero."""
    torch.manual_seed(0)
    made = PyramidOffsetLearner(layout, max_shift)
    for head in made.heads:
        torch.nn.init.normal_(head[-1].weight, std=0.01)
    return made


def picture(height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    """A picture [1, 3, height, width] with structure of several sizes."""
    random = torch.Generator().manual_seed(seed)
    layers = [torch.rand(1, 3, 96 // size, 96 // size, generator=random) for size in (2, 4, 8)]
    return sum(bicubic(layer, 96 // layer.shape[-1]) for layer in layers)[..., :height, :width].clamp(0, 3) / 3


def as_input(rgb: torch.Tensor, layout: str) -> torch.Tensor:
    """A picture at the mosaic's size as the network's input x."""
    if layout in ("rgb", "packed_rgb"):
        return rgb if layout == "rgb" else rgb_to_packed(rgb)
    red, green, blue = low_pass(rgb, 2).square().unbind(1)
    packed = torch.stack((red, green, green, blue), 1)
    return packed if layout == "packed" else packed_to_mosaic(packed)


@pytest.mark.parametrize("radius", [2, 4])
def test_the_cost_volume_finds_a_known_shift(radius):
    torch.manual_seed(0)
    features = torch.randn(1, 32, 24, 24)
    reference = features.roll((-2, 1), (2, 3))  # reference(p) = features(p + (2, -1))
    cost = cost_volume(features, reference, radius)
    side = 2 * radius + 1
    assert cost[0, :, 8:16, 8:16].argmax(0).unique().tolist() == [(2 + radius) * side + (-1 + radius)]
    centre = centre_of_mass(cost, torch.tensor(200.0), radius)[0, :, 8:16, 8:16]
    assert torch.allclose(centre, torch.tensor([2.0, -1.0])[:, None, None].expand_as(centre), atol=1e-2)


def test_without_structure_the_centre_of_mass_is_zero():
    assert centre_of_mass(torch.zeros(1, 25, 4, 4), torch.tensor(16.0), 2).abs().max() < 1e-6


@pytest.mark.parametrize("layout", CHANNELS)
def test_the_pyramid_takes_every_input_at_odd_sizes(layout):
    config = SDANConfig(**{**vars(SMALL), "input": layout})
    factor, x = config.mosaic_factor, torch.rand(1, CHANNELS[layout], 36, 46)
    output = SDAN(config)(x, torch.rand(1, 3, 36, 46), torch.rand(1, 3, 36 * factor, 46 * factor))
    assert output.offset.shape == (1, 2, 36, 46) and output.offset.isfinite().all()


@pytest.mark.parametrize("layout", CHANNELS)
def test_an_untrained_pyramid_finds_most_of_a_shift(layout):
    whole = picture(96, 96)
    shift = 4  # of the mosaic
    x = as_input(whole[..., :80, :80], layout)
    reference = low_pass(whole[..., shift : 80 + shift, :80], 80 // x.shape[-1])
    torch.manual_seed(0)
    with torch.no_grad():
        found = PyramidOffsetLearner(layout, 24)(x, reference)[0, :, 8:-8, 8:-8].mean((1, 2))
    wanted = shift * x.shape[-1] / 80
    assert 0.6 * wanted < found[0] < 1.2 * wanted and abs(found[1]) < 0.2 * wanted


def test_exposure_and_colour_change_no_pyramid_offset():
    made, x, reference = learner(), picture(48, 64), picture(48, 64, seed=1)
    gains = torch.tensor([0.6, 0.8, 0.9]).view(3, 1, 1)
    with torch.no_grad():
        first, second = made(x, reference), made(x, reference * gains + 0.05)
    assert first.abs().max() > 1e-3
    assert (first - second).abs().max() < 0.05 * first.abs().max()


def test_pyramid_offsets_have_half_the_resolution():
    # There is no channel per pixel that could carry the reference's picture: from one coarse pixel's centre to the
    # next, offsets change linearly.
    with torch.no_grad():
        offset = learner()(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))
    assert offset.abs().max() > 1e-3
    for rows in (offset, offset.transpose(2, 3)):
        # Pixels 1 and 2 lie between the first coarse pixels, 3 and 4 between the next: both pairs give the second's.
        before = 1.5 * rows[..., 2:-2:2, :] - 0.5 * rows[..., 1:-3:2, :]
        after = 1.5 * rows[..., 3:-1:2, :] - 0.5 * rows[..., 4::2, :]
        assert torch.allclose(before, after, atol=1e-4)


def test_the_deployed_pyramid_skips_its_offsets():
    torch.manual_seed(0)
    model = SDAN(SDANConfig(**{**vars(SMALL), "input": "packed"})).eval()
    x, rendering = torch.rand(1, 4, 16, 16), torch.rand(1, 3, 32, 32)
    offset = model.find_offset(x, low_pass(rendering, 2))
    assert offset.shape == (1, 0, 16, 16) and model.offset_channels == 0
    zoomed = model.zoom_at(x, offset, rendering)
    assert torch.allclose(zoomed, model.zoom_at(x, torch.zeros(1, 2, 16, 16), rendering), atol=1e-5)
    assert torch.allclose(zoomed, bicubic(rendering, 2), atol=1e-5)  # untrained: bicubic


def test_the_pyramid_is_float32_and_learns_in_autocast():
    made = learner("mosaic")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        offset = made(torch.rand(1, 1, 34, 46), torch.rand(1, 3, 34, 46))
    assert offset.dtype == torch.float32
    offset.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
