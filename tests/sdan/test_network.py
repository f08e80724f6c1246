"""The network: sizes, figures 1 and 2, Table 2 as configs, the untrained output, and that it learns."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d

from sdan.attention import ChannelAttention, CrossPackingAttention
from sdan.baselines import SRResNet
from sdan.losses import LossConfig, sdan_loss
from sdan.metrics import psnr
from sdan.network import CHANNELS, SDAN, SDANConfig, add_skip, with_flips
from sdan.ops import per_point_deform_conv2d
from sdan.resample import bicubic, low_pass

SMALL = SDANConfig(features=8, blocks=2, packing_kernel=4)
INPUTS = ("mosaic", "packed", "rgb", "packed_rgb")


def batch(config, n=2, height=16, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factor = config.mosaic_factor
    shapes = (
        (n, CHANNELS[config.input], height, width),
        (n, 3, height, width),
        (n, 3, height * factor, width * factor),
    )
    return tuple(torch.rand(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize(("kind", "scale", "skip"), list(itertools.product(INPUTS, (2, 4, 8), ("none", "rendering"))))
def test_output_sizes(kind, scale, skip):
    config = replace(SMALL, input=kind, scale=scale, skip=skip)
    x, reference, rendering = batch(config)
    output = SDAN(config)(x, reference, rendering)
    mosaic = (16 * config.mosaic_factor, 24 * config.mosaic_factor)
    assert output.zoomed.shape == (2, 3, scale * mosaic[0], scale * mosaic[1])
    assert output.aligned.shape == (2, 3, 16, 24)
    assert output.mask.shape == (2, 1, 16, 24) and output.offset.shape == (2, 2, 16, 24)
    assert not output.mask.requires_grad


@pytest.mark.parametrize(
    ("model_class", "offset", "channels"), [(SDAN, "squared", 2), (SDAN, "per_point", 18), (SRResNet, "squared", 0)]
)
def test_forward_is_its_two_parts(model_class, offset, channels):
    torch.manual_seed(0)
    model = model_class(replace(SMALL, input="packed", encoding="sqrt", offset=offset, skip="rendering"))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("conv3.weight", "last.weight", "gamma")):
                value.normal_(0, 0.1)
    x, reference, rendering = batch(model.config)
    offsets = model.find_offset(x, reference)
    assert offsets.shape[1] == channels == model.offset_channels
    assert torch.equal(model.zoom_at(x, offsets, rendering), model(x, reference, rendering).zoomed)


def test_direct_upsampling_is_cheaper_for_the_same_sizes():
    config = replace(SMALL, input="packed", upsampling="direct")
    inputs = batch(config)
    direct, stages = SDAN(config), SDAN(replace(config, upsampling="stages"))
    assert direct(*inputs).zoomed.shape == stages(*inputs).zoomed.shape
    operations = []
    for model in (direct, stages):
        with FlopCounterMode(display=False) as counter:
            model(*inputs)
        operations.append(counter.get_total_flops())
    assert operations[0] < operations[1] / 3


def test_sqrt_encoding_equals_the_network_on_square_roots():
    config = replace(SMALL, encoding="sqrt")
    model, (x, reference, rendering) = SDAN(config), batch(config)
    plain = SDAN(replace(config, encoding="linear"))
    plain.load_state_dict(model.state_dict())
    for a, b in zip(model(x, reference, rendering), plain(x.sqrt(), reference, rendering), strict=True):
        torch.testing.assert_close(a, b)


TABLE_2 = {
    "DCN": {"offset": "per_point", "attention": "none", "flips": False},
    "SDCN": {"attention": "none", "flips": False},
    "+ CL": {"attention": "channel", "flips": False},
    "+ CP": {"attention": "cross_packing", "flips": False},
    "++ flips": {},
}


@pytest.mark.parametrize("row", TABLE_2)
@pytest.mark.parametrize("skip", ["none", "rendering"])
@pytest.mark.parametrize("upsampling", ["stages", "direct"])
def test_every_row_of_table_2_trains_every_weight(row, skip, upsampling):
    config = replace(SMALL, features=32, skip=skip, upsampling=upsampling, **TABLE_2[row])
    torch.manual_seed(0)
    model, (x, reference, rendering) = SDAN(config), batch(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    for _ in range(3):  # layers before zero weights move only from the second or third step on
        output = model(x, reference, rendering)
        terms = sdan_loss(output, reference, bicubic(rendering, 4) ** 2, LossConfig(border_px=8))
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
    unmoved = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert not unmoved


def test_per_point_offsets_need_16_more_output_channels():
    def count(config):
        return sum(p.numel() for p in SDAN(config).parameters())

    per_channel = 9 * 64 + 1  # weights and bias of one output channel of the last offset convolution
    assert count(SDANConfig(offset="per_point")) - count(SDANConfig()) == 16 * per_channel


def test_flips_are_the_image_and_its_three_mirror_images():
    image = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    views = with_flips(image)
    assert views.shape == (2, 12, 4, 5)
    assert torch.equal(views[:, :3], image)
    assert views[1, 3, 0, 0] == image[1, 0, 3, 0]
    assert views[1, 6, 0, 0] == image[1, 0, 0, 4]
    assert views[1, 9, 0, 0] == image[1, 0, 3, 4]


def test_cpa_equals_its_equation_and_starts_as_the_identity():
    torch.manual_seed(0)
    attention = CrossPackingAttention(4)
    x = 0.3 * torch.randn(2, 3, 8, 12)
    assert torch.equal(attention(x), x)
    with torch.no_grad():
        attention.gamma.fill_(0.7)
    packed = x.view(2, 3, 2, 4, 3, 4).permute(0, 1, 3, 5, 2, 4).reshape(2, 48, 6)  # [N, C K^2, positions]
    energy = packed @ packed.transpose(1, 2)
    weights = torch.softmax(energy.amax(-1, keepdim=True) - energy, dim=-1)
    attended = (weights @ packed).view(2, 3, 4, 4, 2, 3).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 8, 12)
    assert torch.allclose(attention(x), x + 0.7 * attended, atol=1e-5)
    assert torch.allclose(attention(x, relu=True), (x + 0.7 * attended).relu(), atol=1e-5)


def test_channel_attention_scales_channels_by_0_to_1():
    torch.manual_seed(0)
    attention, x = ChannelAttention(32), 5 * torch.randn(2, 32, 6, 7)
    scales = attention(x) / x
    mean = x.mean((2, 3))
    squeeze, _, excite, _ = attention.excite
    expected = torch.sigmoid(
        F.linear(F.relu(F.linear(mean, squeeze.weight[..., 0, 0], squeeze.bias)), excite.weight[..., 0, 0], excite.bias)
    )
    torch.testing.assert_close(scales, expected[:, :, None, None].expand_as(x), atol=1e-5, rtol=1e-4)
    assert squeeze.weight.shape[0] == 2


def test_srresnet_passes_the_reference_through_unaligned():
    model, (x, reference, rendering) = SRResNet(SMALL), batch(SMALL)
    output = model(x, reference, rendering)
    assert torch.equal(output.aligned, reference) and output.offset.abs().max() == 0 and output.mask.min() == 1
    assert torch.equal(output.zoomed, model(x, 1 - reference, rendering).zoomed)


def test_squared_equals_per_point_with_repeated_offsets():
    """A per-point network whose last offset layer repeats one (dy, dx) equals the squared network."""
    torch.manual_seed(0)
    squared = SDAN(SMALL)
    point = SDAN(replace(SMALL, offset="per_point"))
    weights = squared.state_dict()
    for end in ("weight", "bias"):
        name = f"alignment.offset_learner.conv3.{end}"
        weights[name] = weights[name].repeat(9, *(1,) * (weights[name].dim() - 1))
    point.load_state_dict(weights)
    x, reference, _ = batch(SMALL)
    a, b = squared(x, reference), point(x, reference)
    assert a.offset.detach().abs().max() > 0.05
    for mine, other in zip(a, b, strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


def test_per_point_is_torchvisions_under_autocast_too():
    torch.manual_seed(0)
    x, offset, weight = torch.randn(1, 4, 6, 7), torch.randn(1, 18, 6, 7), torch.randn(5, 4, 3, 3)
    expected = deform_conv2d(x, offset, weight, padding=1)
    assert torch.equal(per_point_deform_conv2d(x, offset, weight, None), expected)
    moved = per_point_deform_conv2d(x.bfloat16(), offset, weight, None)
    assert moved.dtype == torch.bfloat16 and torch.allclose(moved.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(("kind", "model"), list(itertools.product(INPUTS, (SDAN, SRResNet))))
def test_untrained_with_skip_equals_bicubic_of_the_rendering(kind, model):
    config = replace(SMALL, input=kind, skip="rendering")
    x, reference, rendering = batch(config)
    output = model(config)(x, reference, rendering)
    assert (output.zoomed - bicubic(rendering, 4)).abs().max() < 1e-5
    assert torch.equal(output.offset, torch.zeros(2, 2, 16, 24))
    assert torch.equal(output.mask, torch.ones(2, 1, 16, 24))


@pytest.mark.parametrize("kind", INPUTS)
def test_the_skip_moves_the_rendering_by_the_offset(kind):
    config = replace(SMALL, input=kind, skip="rendering")
    model, (x, reference, rendering) = SDAN(config), batch(config)
    with torch.no_grad():
        model.alignment.offset_learner.conv3.bias.copy_(torch.tensor([2.0, -1.0]))
    output = model(x, reference, rendering)
    assert torch.allclose(output.offset, torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(2, 2, 16, 24))
    rows, cols = 2 * config.mosaic_factor, -1 * config.mosaic_factor
    height, width = rendering.shape[-2:]
    index = torch.arange(height) + rows, torch.arange(width) + cols
    moved = rendering[:, :, index[0].clamp(0, height - 1)][..., index[1].clamp(0, width - 1)]
    assert (output.zoomed - bicubic(moved, 4)).abs().max() < 1e-4
    assert output.mask[0, 0, -2:].max() == 0 and output.mask[0, 0, :-2, 1:].min() == 1


@pytest.mark.parametrize("offset", ["squared", "per_point"])
def test_autocast_keeps_offsets_and_output_in_float32(offset):
    torch.manual_seed(0)
    config = replace(SMALL, offset=offset, skip="rendering")
    model, (x, reference, rendering) = SDAN(config), batch(config)
    with torch.no_grad():
        model.alignment.offset_learner.conv3.bias.fill_(30.0625)  # bfloat16 rounds to 30 or 30.125
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, reference, rendering)
    assert output.offset.dtype == output.zoomed.dtype == output.aligned.dtype == torch.float32
    assert torch.equal(output.offset, torch.full_like(output.offset, 30.0625))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"input": "bayer"}, "input: expected one of mosaic, packed, rgb, packed_rgb"),
        ({"offset": "round"}, "offset: expected one of squared, per_point"),
        ({"attention": "self"}, "attention: expected one of none, channel, cross_packing"),
        ({"skip": True}, "skip: expected one of none, rendering"),
        ({"upsampling": "cubic"}, "upsampling: expected one of stages, direct"),
        ({"encoding": "log"}, "encoding: expected one of linear, sqrt"),
        ({"encoding": "sqrt", "input": "rgb"}, "encoding: expected linear for rgb"),
        ({"scale": 3}, "scale: expected one of 2, 4, 8, 16"),
        ({"features": 0}, "features: expected a whole number from 1 to 1024, got 0"),
        ({"features": 10**5}, "features: expected a whole number from 1 to 1024, got 100000"),
        ({"blocks": 10**9}, "blocks: expected a whole number from 1 to 256, got 1000000000"),
        ({"packing_kernel": 2.5}, "packing_kernel: expected a whole number from 1 to 256, got 2.5"),
        ({"flips": "no"}, "flips: expected true or false, got 'no'"),
        ({"scale": 4.0}, "scale: expected one of 2, 4, 8, 16"),
    ],
)
def test_wrong_settings_are_refused_when_constructed(setting, message):
    with pytest.raises(ValueError, match=message):
        SDANConfig(**setting)


def test_a_packing_kernel_must_divide_the_size():
    config = replace(SMALL, packing_kernel=5)
    with pytest.raises(ValueError, match=r"packing_kernel=5: .* 16x24 \(remainders 1, 4\).*multiple of 5.*\[2, 4, 8\]"):
        SDAN(config)(*batch(config))
    with pytest.raises(ValueError, match="packing_kernel=8: expected to divide"):
        SDANConfig().check_crop(100)
    SDANConfig().check_crop(128)
    replace(SDANConfig(), attention="none").check_crop(100)
    with pytest.raises(ValueError, match="mosaic crop: expected an even side"):
        replace(SDANConfig(), attention="none").check_crop(99)


def test_inputs_of_wrong_sizes_are_refused():
    config = replace(SMALL, input="packed", skip="rendering")
    model, (x, reference, rendering) = SDAN(config), batch(config)
    with pytest.raises(ValueError, match=r"x: expected \[N,4,H,W\] for input='packed', got"):
        model(x[:, :1], reference, rendering)
    with pytest.raises(ValueError, match=r"reference: expected \(2, 3, 16, 24\)"):
        model(x, rendering, rendering)
    with pytest.raises(ValueError, match=r"rendering: expected \(2, 3, 32, 48\) .* got None"):
        model(x, reference)


def picture(generator, n, side):
    """Smooth random texture; the low-pass reduces its contrast, and bicubic interpolation does not restore it."""
    coarse = torch.rand(n, 3, side // 4, side // 4, generator=generator)
    return F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)


def test_training_beats_bicubic_on_new_pictures():
    """A few steps of the deployed pass ({X, X}) on aligned pairs, starting at bicubic."""
    torch.manual_seed(0)
    config = SDANConfig(input="rgb", scale=2, features=8, blocks=1, packing_kernel=4, skip="rendering")
    model, generator = SDAN(config), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def pairs(n):
        high = picture(generator, n, 64)
        return low_pass(high, 2), high

    for _ in range(60):
        low, high = pairs(8)
        terms = sdan_loss(model(low, low, low), low, high, LossConfig(border_px=4))
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
    low, high = pairs(32)
    with torch.no_grad():
        gain = psnr(model(low, low, low).zoomed, high, border_px=4) - psnr(bicubic(low, 2), high, border_px=4)
    assert gain.mean() > 0.4


@pytest.mark.parametrize(("skip", "tolerance"), [("rendering", 0.3), ("none", 1.3)])
def test_the_loss_pulls_the_offset_to_the_true_shift(skip, tolerance):
    """One pair whose target's view is 1 px lower and 2 px to the left: X'(p) comes from x(p + offset(p)).

    Without the skip, the convolutions themselves may learn up to a pixel of a constant shift.
    """
    torch.manual_seed(0)
    config = SDANConfig(input="rgb", scale=2, features=8, blocks=1, packing_kernel=4, skip=skip)
    coarse = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    wide = F.interpolate(coarse, scale_factor=8, mode="bicubic", align_corners=False)
    low, high = low_pass(wide[:, :, 16:80, 16:80], 2), wide[:, :, 18:82, 12:76]
    reference, model = low_pass(high, 2), SDAN(config)
    with torch.no_grad():
        model.alignment.offset_learner.conv3.weight.zero_()  # start at offset 0, as skip="rendering" does anyway
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        output = model(low, reference, low)
        optimizer.zero_grad()
        sdan_loss(output, reference, high, LossConfig(border_px=8)).total.backward()
        optimizer.step()
    found = output.offset.detach()[0, :, 6:-6, 6:-6].flatten(1).median(dim=1).values
    assert found[0] > 0.5 and found[1] < -0.5
    assert torch.allclose(found, torch.tensor([1.0, -2.0]), atol=tolerance)


@pytest.mark.parametrize("kind", ["mosaic", "packed", "rgb", "packed_rgb"])
def test_kept_tones_are_those_of_the_rendering(kind):
    """Weights drawn at random: a free network changes every tone, one that keeps them changes none."""
    model = SDAN(replace(SMALL, input=kind, skip="rendering"))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.super_resolution.last.weight, std=0.2)
    torch.nn.init.constant_(model.super_resolution.last.bias, 0.3)
    side = 64 // model.config.mosaic_factor
    x = torch.full((1, CHANNELS[kind], side, side), 0.4)
    colours = torch.tensor([0.1, 0.5, 0.9]).view(1, 3, 1, 1)
    rendering = colours.expand(1, 3, side * model.config.mosaic_factor, side * model.config.mosaic_factor)
    shifts = {}
    for tones in ("free", "kept"):
        model.config = replace(model.config, tones=tones)
        with torch.no_grad():
            zoomed = model(x, low_pass(rendering, model.config.mosaic_factor), rendering).zoomed
        inner = zoomed[..., 96:-96, 96:-96]  # zero padding changes the borders
        shifts[tones] = float((inner.mean((2, 3), keepdim=True) - colours).abs().max())
    assert shifts["free"] > 0.1 and shifts["kept"] < 0.5 / 255


def test_kept_tones_leave_fine_detail():
    """Detail of a period of 4 output pixels passes, and a slope over the whole picture does not."""
    config = replace(SMALL, input="rgb", skip="rendering", tones="kept")
    rendering, offset = torch.full((1, 3, 64, 64), 0.5), torch.zeros(1, 2, 64, 64)
    size = 64 * config.scale
    fine = 0.1 * torch.sin(torch.arange(size) * math.pi / 2).expand(1, 3, size, size)
    slope = (0.1 * torch.linspace(-1, 1, size)).expand(1, 3, size, size)
    assert torch.allclose(add_skip(fine, rendering, offset, config), 0.5 + fine, atol=1e-3)
    left = add_skip(slope, rendering, offset, config)[..., 64:-64] - 0.5
    assert left.abs().max() < 0.1 * slope.abs().max()


def test_kept_tones_need_the_skip():
    with pytest.raises(ValueError, match=r'tones: expected free without skip="rendering", got .kept.'):
        replace(SMALL, tones="kept")
