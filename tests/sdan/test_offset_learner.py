"""The pyramid offset learner."""

import pytest
import torch

from sdan.network import CHANNELS, SDAN, SDANConfig
from sdan.offset_learner import PyramidOffsetLearner, cost_volume


def test_the_cost_volume_finds_a_known_shift():
    torch.manual_seed(0)
    features = torch.randn(1, 32, 24, 24)
    reference = features.roll((-2, 3), (2, 3))  # reference(p) = features(p + (2, -3))
    best = cost_volume(features, reference)[0, :, 8:16, 8:16].argmax(0)
    assert best.unique().tolist() == [(2 + 4) * 9 + (-3 + 4)]


@pytest.mark.parametrize("layout", CHANNELS)
def test_pyramid_offsets_start_at_zero_at_odd_sizes(layout):
    config = SDANConfig(input=layout, scale=2, features=8, blocks=1, skip="rendering", offset_learner="pyramid")
    factor, x = config.mosaic_factor, torch.rand(1, CHANNELS[layout], 36, 46)
    output = SDAN(config)(x, torch.rand(1, 3, 36, 46), torch.rand(1, 3, 36 * factor, 46 * factor))
    assert output.offset.shape == (1, 2, 36, 46) and not output.offset.any()


def test_exposure_and_colour_change_no_pyramid_offset():
    torch.manual_seed(0)
    learner, x, reference = PyramidOffsetLearner(3, 24), torch.rand(1, 3, 48, 64), torch.rand(1, 3, 48, 64)
    for head in learner.heads:
        torch.nn.init.normal_(head[-1].weight, std=0.01)
    gains = torch.tensor([0.6, 0.8, 0.9]).view(3, 1, 1)
    with torch.no_grad():
        first, second = learner(x, reference), learner(x, reference * gains + 0.05)
    assert first.abs().max() > 1e-3
    assert (first - second).abs().max() < 0.05 * first.abs().max()


def test_the_pyramid_is_float32_and_learns_in_autocast():
    torch.manual_seed(0)
    learner = PyramidOffsetLearner(1, 24)
    for head in learner.heads:
        torch.nn.init.normal_(head[-1].weight, std=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        offset = learner(torch.rand(1, 1, 33, 47), torch.rand(1, 3, 33, 47))
    assert offset.dtype == torch.float32
    offset.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.parameters())
