"""The network against the paper's figures 1 and 2, written with plain functions."""

from dataclasses import replace

import pytest
import torch
from test_network import INPUTS, SMALL, batch
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from sdan.network import SDAN
from sdan.resample import bicubic, enlarge_offset, sample


def by_the_figures(model, x, reference, rendering):
    """(zoomed, X', offset) of figures 1 and 2, written with plain functions and torchvision's operator."""
    values, config = model.state_dict(), model.config

    def conv(name, image):
        weight = values[f"{name}.weight"]
        return F.conv2d(image, weight, values.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def cpa(name, image):
        k, gamma = config.packing_kernel, values[f"{name}.gamma"]
        packed = F.pixel_unshuffle(image, k)
        flat = packed.flatten(2)
        energy = flat @ flat.transpose(1, 2)
        attended = torch.softmax(energy.amax(-1, keepdim=True) - energy, dim=-1) @ flat
        return image + gamma * F.pixel_shuffle(attended.view_as(packed), k)

    features, learner = F.relu(conv("head", x)), "alignment.offset_learner"
    views = torch.cat([reference, reference.flip(2), reference.flip(3), reference.flip(2, 3)], 1)
    hidden = torch.cat([features, F.relu(conv("alignment.reference_conv", views))], 1)
    for layer in (1, 2):
        hidden = F.relu(cpa(f"{learner}.attention{layer}", conv(f"{learner}.conv{layer}", hidden)))
    offset = conv(f"{learner}.conv3", hidden)
    deform = [values[f"alignment.deform.{end}"] for end in ("weight", "bias")]
    aligned_features = F.relu(deform_conv2d(features, offset.repeat(1, 9, 1, 1), *deform, padding=1))
    trunk, name = aligned_features, "super_resolution"
    for block in range(config.blocks):
        trunk = trunk + conv(f"{name}.blocks.{block}.conv2", F.relu(conv(f"{name}.blocks.{block}.conv1", trunk)))
    trunk = aligned_features + conv(f"{name}.join", trunk)
    for stage in range(config.upscale.bit_length() - 1):
        trunk = F.pixel_shuffle(conv(f"{name}.enlarge.{stage}", trunk), 2)
        trunk = F.relu(trunk) if config.skip == "none" else trunk
    zoomed = conv(f"{name}.last", trunk)
    if config.skip == "rendering":
        zoomed = zoomed + bicubic(sample(rendering, enlarge_offset(offset, config.mosaic_factor)), config.scale)
    return zoomed, conv("alignment.to_rgb", aligned_features), offset


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("skip", ["none", "rendering"])
def test_the_network_equals_the_figures(kind, skip):
    torch.manual_seed(0)
    config = replace(SMALL, input=kind, skip=skip)
    model, inputs = SDAN(config), batch(config)
    with torch.no_grad():
        for value in model.parameters():
            if value.abs().max() == 0:  # gamma, biases, and the layers that start at 0
                value.normal_(0, 0.1)
        output = model(*inputs)
        zoomed, aligned, offset = by_the_figures(model, *inputs)
    assert offset.abs().max() > 0.1
    torch.testing.assert_close(output.offset, offset, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.aligned, aligned, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.zoomed, zoomed, atol=1e-4, rtol=1e-4)
