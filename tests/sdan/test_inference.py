"""Zooming whole photos: any size, no visible tiles, and exactly bicubic before training."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from sdan.baselines import SRResNet
from sdan.inference import zoom
from sdan.metrics import psnr
from sdan.network import SDAN, SDANConfig
from sdan.ops import precision as ops_precision
from sdan.raw_input import packed_to_mosaic
from sdan.resample import bicubic, low_pass

CONFIG = SDANConfig(scale=2, features=8, blocks=1, packing_kernel=4, skip="rendering")


def photo(config, height, width, seed=0):
    """A smooth random photo, x [C,height,width] and its rendering."""
    generator = torch.Generator().manual_seed(seed)
    factor = config.mosaic_factor
    coarse = torch.rand(1, 3, height // 8 + 3, width // 8 + 3, generator=generator)
    size = (height * factor, width * factor)
    rendering = F.interpolate(coarse, size=size, mode="bicubic", align_corners=False).clamp(0, 1)[0]
    if config.input == "rgb":
        return rendering, rendering
    if config.input == "packed":
        channels = (rendering[0, ::2, ::2], rendering[1, ::2, 1::2], rendering[1, 1::2, ::2], rendering[2, 1::2, 1::2])
        return torch.stack(channels), rendering
    return rendering.mean(0, keepdim=True), rendering


def trained(config):
    """A network whose parts all affect the output, with offsets of about a pixel."""
    torch.manual_seed(1)
    model = SDAN(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("conv3.weight", "last.weight", "gamma")):
                value.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("model", [SDAN, SRResNet])
@pytest.mark.parametrize(
    ("kind", "height", "width"),
    [("mosaic", 46, 70), ("packed", 35, 41), ("rgb", 33, 64), ("mosaic", 10, 70), ("packed", 3, 7), ("rgb", 1, 1)],
)
def test_untrained_zoom_is_bicubic_of_the_whole_rendering(model, kind, height, width):
    config = replace(CONFIG, input=kind)
    x, rendering = photo(config, height, width)
    zoomed = zoom(model(config), x, rendering, tile_px=16, precision="fp32")
    expected = bicubic(rendering[None], 2).clamp(0, 1)
    assert zoomed.shape == expected.shape[1:] and zoomed.dtype == torch.float32
    assert float(psnr(zoomed[None], expected)) > 90
    # Against any target the two have the same PSNR, to the 0.01 dB that tables show.
    target = expected + 0.05 * torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    assert abs(float(psnr(zoomed[None], target) - psnr(expected, target))) < 0.01


def test_a_photo_of_one_tile_is_the_output_of_forward():
    model = trained(CONFIG)
    x, rendering = photo(CONFIG, 32, 32)
    with torch.no_grad():
        expected = model(x[None], rendering[None], rendering[None]).zoomed[0].clamp(0, 1)
    assert torch.allclose(zoom(model, x, rendering, tile_px=32, precision="fp32"), expected, atol=1e-6)
    assert (expected - bicubic(rendering[None], 2)[0].clamp(0, 1)).abs().mean() > 0.01


def test_packed_photos_get_the_low_passed_rendering_as_reference():
    config = replace(CONFIG, input="packed")
    model = trained(config)
    x, rendering = photo(config, 16, 16)
    with torch.no_grad():
        expected = model(x[None], low_pass(rendering[None], 2), rendering[None]).zoomed[0].clamp(0, 1)
    assert torch.allclose(zoom(model, x, rendering, tile_px=16, precision="fp32"), expected, atol=1e-6)


def test_tile_borders_are_hardly_visible():
    """Two photos that start some pixels apart have different tiles but nearly the same output."""
    model = trained(replace(CONFIG, attention="none"))
    x, rendering = photo(CONFIG, 96, 112)
    whole = zoom(model, x, rendering, tile_px=32, precision="fp32")
    later = zoom(model, x[:, 6:, 10:], rendering[:, 6:, 10:], tile_px=32, precision="fp32")
    common = (slice(None), slice(12 + 24, -24), slice(20 + 24, -24))
    inner = (slice(None), slice(24, -24), slice(24, -24))
    plain = bicubic(rendering[None], 2)[0][common]
    changed = (whole[common] - plain).abs().mean()
    assert changed > 0.01  # the network does more than bicubic
    assert (whole[common] - later[inner]).abs().mean() < 0.03 * changed
    assert (whole[common] - later[inner]).abs().max() < 0.5 * changed


def test_batches_do_not_change_the_output_and_progress_counts():
    model = trained(CONFIG)
    x, rendering = photo(CONFIG, 46, 70)
    calls = []
    one = zoom(model, x, rendering, tile_px=32, batch=1, precision="fp32", progress=lambda *call: calls.append(call))
    many = zoom(model, x, rendering, tile_px=32, batch=3, precision="fp32")
    assert torch.allclose(one, many, atol=1e-5)
    assert calls == [(n + 1, 6) for n in range(6)]


def test_every_tile_has_the_training_size_and_starts_on_an_r():
    """Including tiles of photos that need padding."""
    seen = []

    class Spy(SDAN):
        def forward(self, x, reference, rendering=None):
            seen.append(x.clone())
            return super().forward(x, reference, rendering)

    colours = torch.tensor([0.1, 0.4, 0.5, 0.9]).view(1, 4, 1, 1)
    for height, width in ((23, 30), (5, 6), (11, 40)):
        mosaic = packed_to_mosaic(colours.expand(1, 4, height, width))[0]
        zoom(Spy(CONFIG), mosaic, torch.rand(3, 2 * height, 2 * width), tile_px=16)
        zoom(
            Spy(replace(CONFIG, input="packed")),
            colours[0].expand(4, height, width),
            torch.rand(3, 2 * height, 2 * width),
            tile_px=16,
        )
    cells = packed_to_mosaic(colours.expand(1, 4, 8, 8))[0]
    for tiles in seen:
        assert tiles.shape[-2:] == (16, 16)
        expected = cells if tiles.shape[1] == 1 else colours[0].expand(4, 16, 16)
        assert (tiles == expected).all()


def test_padding_keeps_packed_raw_and_reference_registered():
    """Both show the column number."""
    seen = {}

    class Spy(SDAN):
        def forward(self, x, reference, rendering=None):
            seen.update(x=x.clone(), reference=reference.clone())
            return super().forward(x, reference, rendering)

    rendering = (torch.arange(12.0) / 12).expand(3, 32, 12)
    x = torch.stack(
        [rendering[0, ::2, ::2], rendering[0, ::2, 1::2], rendering[0, 1::2, ::2], rendering[0, 1::2, 1::2]]
    )
    zoom(Spy(replace(CONFIG, input="packed")), x, rendering, tile_px=16)
    mosaic = packed_to_mosaic(seen["x"])
    assert mosaic[0, 0, 0, :14].mul(12).round().tolist() == [*range(12), 10, 9]
    assert torch.allclose(low_pass(mosaic, 2)[0, 0], seen["reference"][0, 0])


@pytest.mark.parametrize(
    ("precision", "native_bf16", "expected"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, None),
        ("fp32", True, None),
        ("bf16", False, torch.bfloat16),
    ],
)
def test_precision_auto_is_bf16_only_where_it_is_native(monkeypatch, precision, native_bf16, expected):
    used = []

    class Spy(SDAN):
        def forward(self, x, reference, rendering=None):
            used.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
            return super().forward(x, reference, rendering)

    monkeypatch.setattr(ops_precision, "cpu_has_bf16", lambda: native_bf16)
    x, rendering = photo(CONFIG, 16, 16)
    zoomed = zoom(Spy(CONFIG), x, rendering, tile_px=16, precision=precision)
    assert used == [expected] and zoomed.dtype == torch.float32


def test_the_output_is_clipped_and_the_model_in_eval_mode():
    model = SDAN(CONFIG).train()
    with torch.no_grad():
        model.super_resolution.last.bias.copy_(torch.tensor([5.0, 0.0, -5.0]))
    x, rendering = photo(CONFIG, 32, 32)
    zoomed = zoom(model, x, rendering, tile_px=16)
    assert zoomed[0].min() == 1 and zoomed[2].max() == 0 and not model.training


def test_wrong_sizes_are_refused():
    model = SDAN(CONFIG)
    x, rendering = photo(CONFIG, 32, 32)
    with pytest.raises(ValueError, match=r"x: expected one photo \[1,H,W\]"):
        zoom(model, x[None], rendering, tile_px=16)
    with pytest.raises(ValueError, match=r"rendering: expected \(3, 32, 32\), got \(3, 31, 32\)"):
        zoom(model, x, rendering[:, 1:], tile_px=16)
    with pytest.raises(ValueError, match="x: expected even height and width"):
        zoom(model, x[:, 1:], rendering[:, 1:], tile_px=16)
    with pytest.raises(ValueError, match="packing_kernel=4: expected to divide"):
        zoom(model, x, rendering, tile_px=18)
    with pytest.raises(ValueError, match="overlap_px: expected 8 to 8, half of tile_px=16, got 9"):
        zoom(model, x, rendering, tile_px=16, overlap_px=9)
