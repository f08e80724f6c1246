"""Zooming whole photos: any size, no visible tiles, bounded memory, and exactly bicubic before training."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from sdan import inference
from sdan.baselines import SRResNet
from sdan.inference import zoom, zoom_rows
from sdan.metrics import psnr
from sdan.network import SDAN, SDANConfig
from sdan.ops import precision as ops_precision
from sdan.raw_input import packed_to_mosaic, rgb_to_packed
from sdan.resample import bicubic, low_pass
from sdan.tiles import cover

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
    if config.input == "packed_rgb":
        return rgb_to_packed(rendering[None])[0], rendering
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
    [
        ("mosaic", 46, 70),
        ("packed", 35, 41),
        ("rgb", 33, 64),
        ("packed_rgb", 35, 41),
        ("mosaic", 10, 70),
        ("packed", 3, 7),
        ("rgb", 1, 1),
        ("packed_rgb", 1, 3),
    ],
)
def test_untrained_zoom_is_bicubic_of_the_whole_rendering(model, kind, height, width):
    config = replace(CONFIG, input=kind)
    x, rendering = photo(config, height, width)
    zoomed = zoom(model(config), x, rendering, input_tile_px=16, precision="fp32")
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
    assert torch.allclose(zoom(model, x, rendering, input_tile_px=32, precision="fp32"), expected, atol=1e-6)
    assert (expected - bicubic(rendering[None], 2)[0].clamp(0, 1)).abs().mean() > 0.01


def test_packed_photos_get_the_low_passed_rendering_as_reference():
    config = replace(CONFIG, input="packed")
    model = trained(config)
    x, rendering = photo(config, 16, 16)
    with torch.no_grad():
        expected = model(x[None], low_pass(rendering[None], 2), rendering[None]).zoomed[0].clamp(0, 1)
    assert torch.allclose(zoom(model, x, rendering, input_tile_px=16, precision="fp32"), expected, atol=1e-6)


@pytest.fixture
def small_tiles(monkeypatch):
    """The second pass's tiles are so small that a test's photo needs several."""
    monkeypatch.setattr(inference, "TILE_PX", 40)


def test_tile_borders_are_hardly_visible(small_tiles):
    """Two photos that start some pixels apart have different tiles but nearly the same output."""
    model = trained(replace(CONFIG, attention="none"))
    x, rendering = photo(CONFIG, 96, 112)
    whole = zoom(model, x, rendering, input_tile_px=32, precision="fp32")
    later = zoom(model, x[:, 6:, 10:], rendering[:, 6:, 10:], input_tile_px=32, precision="fp32")
    common = (slice(None), slice(12 + 24, -24), slice(20 + 24, -24))
    inner = (slice(None), slice(24, -24), slice(24, -24))
    plain = bicubic(rendering[None], 2)[0][common]
    changed = (whole[common] - plain).abs().mean()
    assert changed > 0.01  # the network does more than bicubic
    assert (whole[common] - later[inner]).abs().mean() < 0.03 * changed
    assert (whole[common] - later[inner]).abs().max() < 0.5 * changed


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_strength_mixes_network_and_bicubic(strength, small_tiles):
    model = trained(CONFIG)
    x, rendering = photo(model.config, 46, 70)
    plain = bicubic(rendering[None], model.config.scale)[0]
    # Without clipping the mixture is linear.
    x, rendering, plain = 0.5 * x, 0.3 + 0.4 * rendering, 0.3 + 0.4 * plain
    network = zoom(model, x, rendering, input_tile_px=32, precision="fp32")
    mixed = zoom(model, x, rendering, input_tile_px=32, precision="fp32", strength=strength)
    inside = (network > 0) & (network < 1)
    assert inside.float().mean() > 0.5 and not torch.allclose(network, plain, atol=0.05)
    assert torch.allclose(mixed[inside], (strength * network + (1 - strength) * plain)[inside], atol=1e-5)
    with pytest.raises(ValueError, match=r"strength: expected a value in \[0, 1\], got 1.5"):
        zoom(model, x, rendering, input_tile_px=32, strength=1.5)


@pytest.mark.parametrize("kind", ["mosaic", "packed", "rgb", "packed_rgb"])
def test_wide_overlaps_give_the_output_of_one_forward(kind, monkeypatch):
    """Without attention and flips a pixel depends on 6 pixels around it in the first pass, and 8 in the second."""
    config = replace(CONFIG, input=kind, attention="none", flips=False)
    model = trained(config)
    x, rendering = photo(config, 90, 76)
    with torch.no_grad():
        reference = low_pass(rendering[None], config.mosaic_factor)
        expected = model(x[None], reference, rendering[None]).zoomed[0].clamp(0, 1)
    monkeypatch.setattr(inference, "TILE_PX", 70)
    monkeypatch.setattr(inference, "OVERLAP_PX", 34)
    zoomed = zoom(model, x, rendering, input_tile_px=60, overlap_px=28, precision="fp32")
    assert torch.allclose(zoomed, expected, atol=1e-5)
    monkeypatch.setattr(inference, "OVERLAP_PX", 4)
    assert not torch.allclose(zoom(model, x, rendering, input_tile_px=60, precision="fp32"), expected, atol=1e-3)


@pytest.mark.parametrize("model_class", [SDAN, SRResNet])
@pytest.mark.parametrize("batch", [1, 2, 3, None])
def test_batches_do_not_change_the_output_and_progress_counts(model_class, batch, small_tiles):
    model = trained(CONFIG) if model_class is SDAN else SRResNet(CONFIG)
    x, rendering = photo(CONFIG, 46, 130)
    calls = []
    zoomed = zoom(
        model, x, rendering, input_tile_px=32, batch=batch, precision="fp32", progress=lambda *call: calls.append(call)
    )
    assert torch.allclose(zoomed, zoom(model, x, rendering, input_tile_px=32, batch=4, precision="fp32"), atol=1e-5)
    total = 2 * 5 + (2 * 6 if model_class is SDAN else 0)  # SRResNet has no offsets, hence no first pass
    done = [tiles for tiles, _ in calls]
    assert {tiles for _, tiles in calls} == {total} and done[-1] == total
    steps = [later - earlier for earlier, later in zip([0, *done], done, strict=False)]
    most = 5 if model_class is SRResNet else 6  # tiles in a row
    assert min(steps) >= 1 and max(steps) == (batch or most)


def test_rows_come_as_soon_as_their_tiles_are_done(small_tiles):
    model = trained(CONFIG)
    x, rendering = photo(CONFIG, 100, 50)
    calls = []
    rows = zoom_rows(
        model, x, rendering, input_tile_px=32, precision="fp32", bits=8, progress=lambda *call: calls.append(call)
    )
    assert calls == []
    first = next(rows)
    done, total = calls[-1]
    assert 0 < done < total / 2
    assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")  # while the caller works
    parts = [first, *rows]
    assert len(parts) > 2 and sum(part.shape[1] for part in parts) == 200
    assert all(part.permute(1, 2, 0).is_contiguous() for part in parts)  # as files store them
    expected = zoom(model, x, rendering, input_tile_px=32, precision="fp32")
    assert torch.equal(torch.cat(parts, dim=1), (expected * 255).round().to(torch.uint8))
    parts = list(zoom_rows(model, x, rendering, input_tile_px=32, precision="fp32", bits=16))
    assert torch.equal(torch.cat(parts, dim=1), (expected * 65535).round().to(torch.uint16))


def test_a_batch_that_does_not_fit_into_memory_is_halved(small_tiles, monkeypatch):
    sizes = []

    class Small(SDAN):
        """Has memory for two tiles."""

        def zoom_at(self, x, offset, rendering=None):
            sizes.append(len(x))
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().zoom_at(x, offset, rendering)

    x, rendering = photo(CONFIG, 60, 160)
    plain = trained(CONFIG)
    model = Small(CONFIG)
    model.load_state_dict(plain.state_dict())
    calls = []
    zoomed = zoom(
        model, x, rendering, input_tile_px=32, batch=8, precision="fp32", progress=lambda *call: calls.append(call)
    )
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1, *[1] * 6] and calls[-1][0] == calls[-1][1]
    assert torch.allclose(zoomed, zoom(plain, x, rendering, input_tile_px=32, precision="fp32"), atol=1e-5)
    monkeypatch.setattr(Small, "zoom_at", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError, match="none"):
        zoom(model, x, rendering, input_tile_px=32, precision="fp32")


def test_a_batch_on_a_gpu_takes_what_its_memory_holds(monkeypatch):
    free = {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**20)
    tiling = cover((512, 1024), (128, 128), 12, upscale=8)
    sizes = {}
    for megabytes in (1, 3000, 9000, 100_000):
        free["bytes"] = megabytes * 2**20
        sizes[megabytes] = inference._suitable(replace(CONFIG, features=48), tiling, torch.device("cuda"))
    assert sizes[1] == 1 and 1 < sizes[3000] < sizes[9000] < sizes[100_000] == 2**19 // 128**2


@pytest.mark.parametrize("kind", ["mosaic", "packed", "rgb", "packed_rgb"])
def test_a_warm_up_runs_both_passes(kind):
    calls = []

    class Spy(SDAN):
        def find_offset(self, x, reference):
            calls.append(("find_offset", x.shape[-1]))
            return super().find_offset(x, reference)

        def zoom_at(self, x, offset, rendering=None):
            calls.append(("zoom_at", x.shape[-1]))
            return super().zoom_at(x, offset, rendering)

    inference.warm_up(Spy(replace(CONFIG, input=kind)), input_tile_px=16)
    assert set(calls) == {("find_offset", 16), ("zoom_at", inference.TILE_PX)}


def test_an_interrupted_zoom_leaves_nothing_switched_on(small_tiles):
    model = trained(CONFIG)
    x, rendering = photo(CONFIG, 60, 60)

    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoom(model, x, rendering, input_tile_px=32, precision="bf16", progress=interrupt)
    assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
    assert zoom(model, x, rendering, input_tile_px=32, precision="fp32").isfinite().all()


def test_a_row_is_asked_for_while_the_last_one_is_used():
    asked, used = [], []
    for item in inference._one_ahead(asked.append(item) or item for item in range(4)):
        used.append((item, len(asked)))
    assert used == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert list(inference._one_ahead(iter(()))) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
@pytest.mark.parametrize("kind", ["mosaic", "packed"])
def test_a_gpu_gives_the_cpus_output(kind, small_tiles):
    config = replace(CONFIG, input=kind)
    model = trained(config)
    x, rendering = photo(config, 100, 150)
    expected = zoom(model, x, rendering, input_tile_px=32, precision="fp32")
    model.cuda()
    assert torch.allclose(zoom(model, x, rendering, input_tile_px=32, precision="fp32"), expected, atol=1e-3)
    parts = list(zoom_rows(model, x, rendering, input_tile_px=32, bits=8))
    assert len(parts) > 1 and all(part.dtype == torch.uint8 and part.is_pinned() for part in parts)
    levels = torch.cat(parts, dim=1)
    assert (levels.float() / 255 - expected).abs().mean() < 4 / 255
    fine = torch.cat(list(zoom_rows(model, x, rendering, input_tile_px=32, bits=16, precision="fp32")), dim=1)
    assert (fine.float() / 65535 - expected).abs().max() < 1e-3


def test_the_offsets_tiles_have_the_training_size():
    """Including tiles of photos that need padding; a mosaic's tiles start on an R photosite in both passes."""
    seen, zoomed = [], []

    class Spy(SDAN):
        def find_offset(self, x, reference):
            seen.append(x.clone())
            return super().find_offset(x, reference)

        def zoom_at(self, x, offset, rendering=None):
            zoomed.append(x.clone())
            return super().zoom_at(x, offset, rendering)

    colours = torch.tensor([0.1, 0.4, 0.5, 0.9]).view(1, 4, 1, 1)
    for height, width in ((23, 30), (5, 6), (11, 40), (21, 85)):
        mosaic = packed_to_mosaic(colours.expand(1, 4, height, width))[0]
        zoom(Spy(CONFIG), mosaic, torch.rand(3, 2 * height, 2 * width), input_tile_px=16)
        zoom(
            Spy(replace(CONFIG, input="packed")),
            colours[0].expand(4, height, width),
            torch.rand(3, 2 * height, 2 * width),
            input_tile_px=16,
        )
    for tiles in (*seen, *zoomed):
        height, width = tiles.shape[-2:]
        cells = packed_to_mosaic(colours.expand(1, 4, height // 2, width // 2))[0]
        expected = cells if tiles.shape[1] == 1 else colours[0].expand(4, height, width)
        assert (tiles == expected).all()
    assert {tuple(tiles.shape[-2:]) for tiles in seen} == {(16, 16)}
    assert max(tiles.shape[-1] for tiles in zoomed) <= inference.TILE_PX


def test_padding_keeps_packed_raw_and_reference_registered():
    """Both show the column number."""
    seen = {}

    class Spy(SDAN):
        def find_offset(self, x, reference):
            seen.update(x=x.clone(), reference=reference.clone())
            return super().find_offset(x, reference)

    rendering = (torch.arange(12.0) / 12).expand(3, 32, 12)
    x = torch.stack(
        [rendering[0, ::2, ::2], rendering[0, ::2, 1::2], rendering[0, 1::2, ::2], rendering[0, 1::2, 1::2]]
    )
    zoom(Spy(replace(CONFIG, input="packed")), x, rendering, input_tile_px=16)
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
        def zoom_at(self, x, offset, rendering=None):
            used.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
            return super().zoom_at(x, offset, rendering)

    monkeypatch.setattr(ops_precision, "cpu_has_bf16", lambda: native_bf16)
    x, rendering = photo(CONFIG, 16, 16)
    zoomed = zoom(Spy(CONFIG), x, rendering, input_tile_px=16, precision=precision)
    assert used == [expected] and zoomed.dtype == torch.float32


def test_the_output_is_clipped_and_the_model_in_eval_mode():
    model = SDAN(CONFIG).train()
    with torch.no_grad():
        model.super_resolution.last.bias.copy_(torch.tensor([5.0, 0.0, -5.0]))
    x, rendering = photo(CONFIG, 32, 32)
    zoomed = zoom(model, x, rendering, input_tile_px=16)
    assert zoomed[0].min() == 1 and zoomed[2].max() == 0 and not model.training


def test_wrong_sizes_are_refused():
    model = SDAN(CONFIG)
    x, rendering = photo(CONFIG, 32, 32)
    with pytest.raises(ValueError, match=r"x: expected one photo \[1,H,W\]"):
        zoom(model, x[None], rendering, input_tile_px=16)
    with pytest.raises(ValueError, match=r"rendering: expected \(3, 32, 32\), got \(3, 31, 32\)"):
        zoom(model, x, rendering[:, 1:], input_tile_px=16)
    with pytest.raises(ValueError, match="x: expected even height and width"):
        zoom(model, x[:, 1:], rendering[:, 1:], input_tile_px=16)
    with pytest.raises(ValueError, match="packing_kernel=4: expected to divide"):
        zoom(model, x, rendering, input_tile_px=18)
    with pytest.raises(ValueError, match="overlap_px: expected 8 to 8, half of input_tile_px=16, got 9"):
        zoom(model, x, rendering, input_tile_px=16, overlap_px=9)
    with pytest.raises(ValueError, match="bits: expected None, 8 or 16, got 12"):
        zoom_rows(model, x, rendering, input_tile_px=16, bits=12)


@pytest.mark.parametrize("bits", [None, 8, 16])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_an_output_that_is_not_finite_is_an_error(value, bits):
    config = SDANConfig(input="packed", scale=2, features=8, blocks=1, packing_kernel=4)
    model = trained(config)
    with torch.no_grad():
        model.super_resolution.last.bias[1] = float(value)
    x, rendering = photo(config, 16, 24)
    with pytest.raises(inference.InferenceError, match="expected a finite picture, got NaN or infinity"):
        list(zoom_rows(model, x, rendering, input_tile_px=16, bits=bits))
