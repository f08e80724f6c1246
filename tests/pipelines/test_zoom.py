"""`sdan zoom`: the pixels that a model should give, several photographs in one call, and the output files."""

import ctypes
import errno
import gc
import os
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import zoom
from pipelines.zoom import Output, Zoomer, ZoomError, read_photo, zoom_photos
from pipelines.zooming import photo as photo_module
from pipelines.zooming import start
from pipelines.zooming.request import check_device, check_options, check_output, output_paths, shown
from preprocessing.raw import decode
from preprocessing.raw.dng import ShotTags, write_dng
from sdan import checkpoint, inference, raw_input, starter_folder
from sdan.network import SDANConfig
from sdan.ops.precision import autocast
from sdan.resample import bicubic, low_pass

TOLERANCE = 2 / 255
"""Two of the 255 steps of an 8-bit PNG."""


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth colour picture, uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).random((height // 8 + 2, width // 8 + 2, 3), np.float32)
    return (255 * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)).astype(np.uint8)


def write_photo(path: Path, height: int = 48, width: int = 64, seed: int = 0, **dng) -> Path:
    """Write `picture` as a DNG if the name ends in .dng, else as a PNG or JPG."""
    image = picture(height, width, seed)
    if path.suffix == ".dng":
        packed = raw_input.mosaic_from_srgb(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
        mosaic = 512 + 15000 * raw_input.packed_to_mosaic(packed)[0, 0].numpy()
        write_dng(path, mosaic.round().astype(np.uint16), wb=(1.0, 1.0, 1.0), **dng)
    else:
        Image.fromarray(image).save(path)
    return path


def enlarged(rendering: torch.Tensor) -> np.ndarray:
    """Bicubic enlargement by 4 of [3, H, W], as float [4H, 4W, 3]."""
    return bicubic(rendering[None], 4)[0].clamp(0, 1).permute(1, 2, 0).numpy()


def written(path: Path) -> np.ndarray:
    """The RGB values of a PNG in [0, 1]."""
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[..., ::-1]
    return image / np.iinfo(image.dtype).max


def test_the_starter_models_output_is_written(tmp_path):
    """The PNG of a one-tile photo has the network's own output for an independently decoded RAW."""
    path = write_photo(tmp_path / "photo.dng", 64, 64)
    zoomer = Zoomer.load(starter_folder())
    assert zoomer.model.input_tile_px == 32  # packed pixels
    zoom_photos([path], tmp_path / "zoomed.png", zoomer, say=print, warn=print)
    model = checkpoint.load(starter_folder()).model.eval()
    photo = decode.load(path, curve=model.config.rendering_curve)
    raw, rendering = (tensor[None] for tensor in raw_input.from_photo(photo))
    with torch.inference_mode(), autocast("auto", torch.device("cpu")):
        expected = model(raw, low_pass(rendering, 2), rendering).zoomed[0].float().clamp(0, 1)
    expected = expected.permute(1, 2, 0).numpy()
    assert np.abs(written(tmp_path / "zoomed.png") - expected).max() < TOLERANCE
    assert np.abs(expected - enlarged(rendering[0])).max() > 10 * TOLERANCE  # not bicubic alone


def test_strength_0_is_bicubic(tmp_path):
    path = write_photo(tmp_path / "photo.dng", 64, 64)
    model = Zoomer.load(starter_folder(), strength=0)
    zoom_photos([path], tmp_path / "zoomed.png", model, say=print, warn=print)
    rendering = decode.load(path, curve=model.model.config.rendering_curve).rendering
    expected = enlarged(torch.from_numpy(rendering).permute(2, 0, 1) / 255)
    assert np.abs(written(tmp_path / "zoomed.png") - expected).max() < TOLERANCE


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", ["photo.dng", "photo.png"])
def test_an_untrained_model_writes_bicubic_enlargement(name, bits, zoomer, tmp_path):
    path = write_photo(tmp_path / name, 70, 90)  # several tiles
    said = []
    (done,) = zoom_photos(
        [path], tmp_path / "zoomed.png", zoomer, output=Output(bits=bits), say=said.append, warn=print
    )
    assert (done.path, done.width, done.height) == (tmp_path / "zoomed.png", 360, 280)
    shown = decode.load(path).rendering if path.suffix == ".dng" else picture(70, 90)
    expected = enlarged(torch.from_numpy(shown).permute(2, 0, 1) / 255)
    off = np.abs(written(done.path) - expected)
    assert off.max() < (TOLERANCE if bits == 8 else TOLERANCE / 100)
    assert any("synthetic mosaic" in line for line in said) == (name == "photo.png")


def test_a_turned_raw_photo_is_written_upright(zoomer, tmp_path):
    path = write_photo(tmp_path / "photo.dng", 48, 64, shot=ShotTags(orientation=6))  # a quarter turn right
    zoom_photos([path], tmp_path / "zoomed.png", zoomer, say=print, warn=print)
    rendering = torch.from_numpy(decode.load(path).rendering).permute(2, 0, 1) / 255
    image = written(tmp_path / "zoomed.png")
    assert image.shape == (256, 192, 3)
    assert np.abs(image - np.rot90(enlarged(rendering), -1)).max() < TOLERANCE


def test_a_turned_jpg_is_written_upright(zoomer, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(48, 64)).save(tmp_path / "photo.jpg", quality=100, subsampling=0, exif=exif)
    zoom_photos([tmp_path / "photo.jpg"], tmp_path / "zoomed.png", zoomer, say=print, warn=print)
    upright = np.rot90(picture(48, 64), -1).copy()
    expected = enlarged(torch.from_numpy(upright).permute(2, 0, 1) / 255)
    assert np.abs(written(tmp_path / "zoomed.png") - expected).max() < 8 / 255  # JPG's own loss included


@pytest.mark.parametrize(("height", "width"), [(1, 1), (41, 53), (3, 64)])
def test_odd_pictures_are_zoomed_whole(height, width, zoomer, tmp_path):
    path = write_photo(tmp_path / "photo.png", height, width)
    (done,) = zoom_photos([path], tmp_path / "zoomed.png", zoomer, say=print, warn=print)
    assert (done.width, done.height) == (4 * width, 4 * height)
    padded = np.pad(picture(height, width), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    expected = enlarged(torch.from_numpy(padded).permute(2, 0, 1) / 255)[: 4 * height, : 4 * width]
    assert np.abs(written(done.path) - expected).max() < TOLERANCE


def test_an_rgb_model_reads_pictures_and_refuses_raw(tmp_path):
    photo = read_photo(write_photo(tmp_path / "photo.png", 41, 53), SDANConfig(input="rgb"))
    assert torch.equal(photo.raw, photo.rendering) and photo.raw.shape == (3, 41, 53)
    with pytest.raises(ZoomError, match="expected a JPG or PNG for a model with RGB input, got RAW"):
        read_photo(write_photo(tmp_path / "photo.dng"), SDANConfig(input="rgb"))
    padded = read_photo(tmp_path / "photo.png", SDANConfig(input="packed_rgb"))
    assert padded.raw.shape == (3, 42, 54) and padded.window[2:] == (41, 53)


def test_a_damaged_photograph_is_set_aside(zoomer, tmp_path):
    good = [write_photo(tmp_path / "one.dng", seed=1), write_photo(tmp_path / "three.png", seed=3)]
    damaged = tmp_path / "two.dng"
    damaged.write_bytes(good[0].read_bytes()[:400])
    said, warned = [], []
    with pytest.raises(ZoomError, match="expected 3 photographs, got 2; 1 set aside"):
        zoom_photos([good[0], damaged, good[1]], tmp_path / "out", zoomer, say=said.append, warn=warned.append)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one_4x.png", "three_4x.png"]
    assert len(warned) == 1 and str(damaged) in warned[0] and "\n" not in warned[0]
    for number, name in ((1, "one"), (3, "three")):
        shown = decode.load(good[0]).rendering if number == 1 else picture(48, 64, 3)
        expected = enlarged(torch.from_numpy(shown).permute(2, 0, 1) / 255)
        assert np.abs(written(tmp_path / "out" / f"{name}_4x.png") - expected).max() < TOLERANCE


def test_the_only_photograph_raises_its_own_error(zoomer, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"not a picture")
    warned = []
    with pytest.raises(ZoomError, match="got text: not a photograph"):
        zoom_photos([tmp_path / "photo.png"], tmp_path / "out", zoomer, say=print, warn=warned.append)
    assert warned == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "out", "message"),
    [
        (("one.png", "two.png"), "all.png", "expected a folder for several photographs, got one .png file"),
        (("one.png", "other/one.jpg"), "out", "other/one.jpg: expected a unique file name"),
        (("one.png",), "zoomed.webp", "or a folder, got .webp, which sdan does not write"),
    ],
)
def test_outputs_that_collide_are_refused_before_any_work(names, out, message, zoomer, tmp_path):
    photos = [tmp_path / name for name in names]
    (tmp_path / "other").mkdir()
    for photo in photos:
        photo.write_bytes(b"is not read")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ZoomError) as caught:
        zoom_photos(photos, tmp_path / out, zoomer, say=print, warn=print)
    assert message in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_each_photograph_of_a_folder_has_its_file():
    photos = [Path("a/one.ARW"), Path("b/two.jpg")]
    assert output_paths(photos, Path("out"), 8) == [Path("out/one_8x.png"), Path("out/two_8x.png")]
    assert output_paths(photos[:1], Path("one.PNG"), 8) == [Path("one.PNG")]


def test_photographs_of_one_stem_are_told_apart():
    photos = [Path("a") / name for name in ("x.jpg", "x.PNG", "x.dng", "y.arw", "y.dng", "z.jpg", "z.arw")]
    names = ["x_jpg", "x_png", "x_raw", "y_arw", "y_dng", "z", "z_raw"]
    assert output_paths(photos, Path("out"), 4) == [Path(f"out/{name}_4x.png") for name in names]


def test_outputs_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path, message in (
        (tmp_path / "file" / "a.png", "expected a writable folder"),
        (tmp_path / "folder.png", "expected a file name, got a folder"),
        (tmp_path / f"{'n' * 252}.png", "expected a name that can be written, got File name too long"),
    ):
        with pytest.raises(ZoomError, match=message):
            check_output(path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.png", {"bits": 10}, "--bits: expected 8 or 16, got 10"),
        ("a.jpg", {"bits": 16}, "--bits: expected 8 for a JPG, got 16"),
        ("a.png", {"scale": 5}, "--scale: expected 2, 3, 4 or 8, got 5"),
        ("a.png", {"format": "bmp"}, "--format: expected png, tiff, jpg or dng, got bmp"),
        ("a.png", {"format": "tiff"}, "expected .tif or .tiff, or a folder, got a .png file"),
        ("a.jpg", {"quality": 0}, "--quality: expected 1 to 100, got 0"),
        ("a.heic", {}, "got .heic, which sdan does not write"),
    ],
)
def test_options_that_never_work_are_refused(name, options, message):
    with pytest.raises(ZoomError, match=message):
        check_options(Path(name), Output(**options))


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0"])
def test_devices_that_never_exist_are_refused(name):
    with pytest.raises(ZoomError, match=f"--device: expected auto, cpu, cuda or cuda:N, got {name}"):
        check_device(name)


@pytest.mark.parametrize(
    ("name", "there", "chosen"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda"),
        ("cuda:1", 2, "cuda:1"),
        ("cpu", 2, "cpu"),
        ("cuda", 0, None),
        ("cuda:2", 2, None),
    ],
)
def test_the_model_runs_on_the_asked_device(name, there, chosen, untrained, monkeypatch):
    """`there`: how many GPUs PyTorch finds; None: one line, before anything is loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    started = []
    monkeypatch.setattr(zoom, "_start", lambda model, device: started.append(str(device)))
    if chosen is None:
        with pytest.raises(
            ZoomError, match=rf"--device: expected a GPU that PyTorch finds \({there} here\), got {name}"
        ):
            Zoomer.load(untrained, device=name)
    else:
        Zoomer.load(untrained, device=name).wait()
        assert started == [chosen]


def test_a_full_disk_leaves_no_file(tmp_path):
    def parts():
        yield np.zeros((2, 4, 3), np.uint8)
        raise OSError(28, "No space left on device")

    for name in ("a.png", "a.tif", "a.jpg"):
        with pytest.raises(ZoomError, match="expected a writable place, got No space left on device"):
            zoom.write_levels(parts(), tmp_path / name, (4, 4), 8)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["photo.png", "turned.dng"])
def test_an_interrupted_zoom_leaves_no_file(name, zoomer, tmp_path, monkeypatch):
    path = write_photo(tmp_path / name, 70, 90, **({"shot": ShotTags(orientation=6)} if "turned" in name else {}))

    def interrupt(bar, done, total):
        if done == total:
            raise KeyboardInterrupt

    monkeypatch.setattr(zoom, "move_bar", interrupt)
    with pytest.raises(KeyboardInterrupt):
        zoom_photos([path], tmp_path / "zoomed.png", zoomer, say=print, warn=print)
    assert list(tmp_path.iterdir()) == [path]


def test_a_gpu_without_memory_is_one_line(zoomer, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")

    monkeypatch.setattr(type(zoomer.model), "zoom_at", full)
    with pytest.raises(ZoomError, match="GPU memory: expected room for one tile, got none; close") as caught:
        zoom_photos([write_photo(tmp_path / "photo.png")], tmp_path / "out", zoomer, say=print, warn=print)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_levels_are_the_rounded_picture(orientation, zoomer, tmp_path):
    path = write_photo(tmp_path / "photo.dng", 70, 90, shot=ShotTags(orientation=orientation))
    photo = read_photo(path, zoomer.model.config)
    expected = (zoomer.zoom(photo) * 255).round().astype(np.uint8)
    levels = np.concatenate(list(zoomer.levels(photo, 8)))
    assert np.array_equal(levels, expected)
    assert zoomer.size(photo) == (levels.shape[1], levels.shape[0])


def test_a_written_row_is_freed_before_the_next(zoomer, tmp_path, monkeypatch):
    """So memory holds the output of one row of tiles."""
    finished, alive = inference._finished, []

    def watched(rows, bits):
        assert all(part() is None for part in alive)
        array = np.ascontiguousarray(finished(rows, bits).permute(1, 2, 0))  # unlike a tensor, views keep it alive
        alive.append(weakref.ref(array))
        return torch.from_numpy(array).permute(2, 0, 1)

    monkeypatch.setattr(inference, "_finished", watched)
    monkeypatch.setattr(inference, "TILE_PX", 40)
    photo = read_photo(write_photo(tmp_path / "photo.dng", 144, 96), zoomer.model.config)
    for grey in (False, True):
        for scale in (None, 3):
            alive.clear()
            rows = sum(map(len, zoomer.levels(replace(photo, grey=grey), 8, scale=scale)))
            assert rows == 144 * (scale or zoomer.model.config.scale) and len(alive) > 2


def test_a_photograph_is_read_while_the_gpu_starts(untrained, tmp_path, monkeypatch):
    started = threading.Event()
    monkeypatch.setattr(zoom, "_start", lambda *_: started.wait(60))
    zoomer = Zoomer.load(untrained)
    photo = read_photo(write_photo(tmp_path / "photo.dng"), zoomer.model.config)
    rows = zoomer.levels(photo, 8)
    assert not zoomer.start.done()
    started.set()
    expected = (255 * zoomer.zoom(photo)).round()
    assert zoomer.start.done() and np.array_equal(np.concatenate(list(rows)), expected)


def test_a_gpu_that_holds_no_model_is_one_line(untrained, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(zoom, "_start", fail)
    photo = write_photo(tmp_path / "photo.dng")
    with pytest.raises(ZoomError, match="GPU memory: expected room for one tile, got none"):
        zoom_photos([photo], tmp_path / "out.png", Zoomer.load(untrained), say=print, warn=print)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
def test_the_starter_model_starts_on_a_gpu(tmp_path):
    zoomer = Zoomer.load(starter_folder())
    photo = read_photo(write_photo(tmp_path / "photo.dng"), zoomer.model.config)
    rows = np.concatenate(list(zoomer.levels(photo, 8)))
    assert next(zoomer.model.parameters()).is_cuda
    on_cpu = (255 * Zoomer(checkpoint.load(starter_folder()).model).zoom(photo)).round()
    assert np.abs(rows - on_cpu).mean() < 2


def test_the_collector_skips_what_was_imported(monkeypatch):
    monkeypatch.setattr(start, "start_driver", lambda: None)
    try:
        with start.large_imports():
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(("no_gpu", "calls"), [(False, ["init", "get", "retain"]), (True, ["init"])])
def test_the_driver_starts_only_with_a_gpu(no_gpu, calls, monkeypatch):
    made = []

    class Driver:
        """CUDA's functions return 0, or 100 without a GPU."""

        def cuInit(self, flags):
            made.append("init")
            return 100 if no_gpu else 0

        def cuDeviceGet(self, device, number):
            made.append("get")
            return 0

        def cuDevicePrimaryCtxRetain(self, context, device):
            made.append("retain")
            return 0

    monkeypatch.setattr(start.ctypes, "CDLL", lambda name: Driver())
    start.start_driver()
    assert made == calls
    monkeypatch.setattr(start.ctypes, "CDLL", lambda name: ctypes.cdll.LoadLibrary("no such driver"))
    start.start_driver()


@pytest.mark.parametrize("raw_is_given_first", [True, False])
def test_raw_and_pictures_get_their_own_model(raw_is_given_first, untrained, tmp_path):
    """The model for RAW darkens, that for pictures is bicubic."""
    raw, other = write_photo(tmp_path / "a.dng", 40, 48), write_photo(tmp_path / "b.png", 40, 48)
    dark = Zoomer.load(untrained, note="darkened")
    with torch.no_grad():
        dark.model.super_resolution.last.bias.fill_(-0.2)
    photos, said = ([raw, other] if raw_is_given_first else [other, raw]), []
    plain = Zoomer.load(untrained)
    zoom_photos(photos, tmp_path / "out", dark, pictures=plain, say=said.append, warn=print)
    shown = torch.from_numpy(picture(40, 48)).permute(2, 0, 1) / 255
    assert np.abs(written(tmp_path / "out" / "b_4x.png") - enlarged(shown)).max() < TOLERANCE
    lit = enlarged(torch.from_numpy(decode.load(raw).rendering).permute(2, 0, 1) / 255)
    unclipped = (lit > 0.25) & (lit < 0.99)
    assert np.abs(written(tmp_path / "out" / "a_4x.png") - (lit - 0.2))[unclipped].max() < TOLERANCE
    assert f"{raw}: darkened" in said and f"{other}: darkened" not in said


def test_an_output_never_replaces_a_photograph(zoomer, tmp_path):
    path = write_photo(tmp_path / "photo.png")
    before = path.read_bytes()
    (tmp_path / "link.png").symlink_to(path)
    for out in (path, tmp_path / "link.png"):
        with pytest.raises(ZoomError, match="expected a new file, got the photograph itself"):
            zoom_photos([path], out, zoomer, output=Output(overwrite=True), say=print, warn=print)
    assert path.read_bytes() == before


def test_an_existing_output_needs_overwrite(zoomer, tmp_path):
    path = write_photo(tmp_path / "photo.png")
    out = tmp_path / "out" / "photo_4x.png"
    out.parent.mkdir()
    out.write_bytes(b"old")
    with pytest.raises(ZoomError, match=r"photo_4x.png: expected a new file.*add --overwrite"):
        zoom_photos([path], tmp_path / "out", zoomer, say=print, warn=print)
    assert out.read_bytes() == b"old"
    zoom_photos([path], tmp_path / "out", zoomer, output=Output(overwrite=True), say=print, warn=print)
    assert written(out).shape == (192, 256, 3)


@pytest.mark.parametrize("links", [True, False])
def test_of_two_zooms_to_one_file_the_first_is_kept(links, zoomer, tmp_path, monkeypatch):
    path, out = write_photo(tmp_path / "photo.png"), tmp_path / "z.png"
    real = zoom.read_photo

    def read_while_another_writes(*arguments):
        out.write_bytes(b"the other's")
        return real(*arguments)

    def no_links(*arguments):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(zoom, "read_photo", read_while_another_writes)
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", no_links)
    with pytest.raises(ZoomError, match=r"z.png: expected a new file, got one that another program wrote meanwhile"):
        zoom_photos([path], out, zoomer, say=print, warn=print)
    assert out.read_bytes() == b"the other's" and sorted(tmp_path.iterdir()) == [path, out]
    zoom_photos([path], out, zoomer, output=Output(overwrite=True), say=print, warn=print)
    assert written(out).shape == (192, 256, 3)
    monkeypatch.setattr(zoom, "read_photo", real)
    zoom_photos([path], tmp_path / "y.png", zoomer, say=print, warn=print)
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "y.png", out]


def test_a_cut_off_jpg_is_refused(zoomer, tmp_path):
    write_photo(tmp_path / "whole.jpg", 200, 200)
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "photo.jpg").write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(ZoomError, match=r"photo.jpg: expected a readable JPG"):
        zoom_photos([tmp_path / "photo.jpg"], tmp_path / "out", zoomer, say=print, warn=print)
    assert not (tmp_path / "out").exists()


def test_a_profile_is_converted_and_srgb_is_written(zoomer, tmp_path):
    exif = Image.Exif()
    exif[0x0131] = "an editor"
    exif.get_ifd(0x8769)[0xA001] = 0xFFFF  # Adobe RGB
    Image.new("RGB", (32, 32), (180, 62, 55)).save(tmp_path / "photo.png", exif=exif)
    said = []
    zoom_photos([tmp_path / "photo.png"], tmp_path / "z.png", zoomer, say=said.append, warn=print)
    assert np.abs(255 * written(tmp_path / "z.png") - (208, 60, 52)).max() < 3
    assert any("converted from Adobe RGB to sRGB" in line for line in said)
    assert Image.open(tmp_path / "z.png").info["icc_profile"]


def test_16_bits_stay_16_bits(zoomer, tmp_path):
    ramp = np.linspace(20_000, 21_000, 64 * 48).reshape(48, 64).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "photo.png"), np.repeat(ramp[..., None], 3, axis=2))
    zoom_photos([tmp_path / "photo.png"], tmp_path / "z.tif", zoomer, say=print, warn=print)
    stored = cv2.imread(str(tmp_path / "z.tif"), cv2.IMREAD_UNCHANGED)
    assert stored.dtype == np.uint16 and len(np.unique(stored)) > 900


def test_alpha_and_grey_are_said_and_kept(zoomer, tmp_path):
    image = Image.new("RGBA", (32, 32), (90, 80, 70, 0))
    image.save(tmp_path / "clear.png")
    Image.fromarray(picture(32, 40)[..., 0]).save(tmp_path / "grey.png")
    said = []
    zoom_photos([tmp_path / "clear.png", tmp_path / "grey.png"], tmp_path / "o", zoomer, say=said.append, warn=print)
    assert written(tmp_path / "o" / "clear_4x.png").min() > 0.99
    assert any("composited on white" in line for line in said)
    assert np.ptp(written(tmp_path / "o" / "grey_4x.png"), axis=2).max() == 0


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("notes.txt", b"plain words\n" * 40, "got text: not a photograph"),
        ("photo.arw", b"plain words\n" * 40, "got text: not a photograph"),
        ("photo.heic", bytes(4) + b"ftypheic" + bytes(90), "got HEIC; export it as JPG"),
        ("photo.jpg", bytes(4) + b"ftypmsf1" + bytes(90), "got HEIC; export it as JPG"),
        ("photo.jpg", b"\xff\x0a" + bytes(90), "got JPEG XL; export it as JPG"),
        ("photo.jp2", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(90), "got JPEG 2000; export it as JPG"),
        ("clip.mov", bytes(4) + b"ftypqt  " + bytes(90), "got a video; export it as JPG"),
        ("photo.jpg", b"II*\0" + bytes(90), "expected a complete TIFF or RAW, got a damaged one"),
        ("photo.gpr", b"II*\0" + bytes(90), "got GoPro's GPR"),
        ("photo.jpg", b"", "got an empty file"),
    ],
)
def test_other_files_are_named_for_what_they_are(name, data, message, zoomer, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ZoomError, match=message):
        zoom_photos([tmp_path / name], tmp_path / "out", zoomer, say=print, warn=print)


def test_cmyk_is_refused(zoomer, tmp_path):
    Image.new("CMYK", (32, 32)).save(tmp_path / "photo.jpg")
    with pytest.raises(ZoomError, match="expected an RGB or grey picture, got CMYK"):
        zoom_photos([tmp_path / "photo.jpg"], tmp_path / "out", zoomer, say=print, warn=print)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [(".jfif", "JPEG"), (".webp", "WEBP"), (".tif", "TIFF"), (".jpg", "TIFF"), (".avif", "AVIF")],
)
def test_other_picture_formats_are_read(suffix, kind, zoomer, tmp_path):
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(picture(48, 64)).save(path, kind, quality=95)
    zoom_photos([path], tmp_path / "z.png", zoomer, say=print, warn=print)
    expected = enlarged(torch.from_numpy(picture(48, 64)).permute(2, 0, 1) / 255)
    assert np.abs(written(tmp_path / "z.png") - expected).mean() < 4 / 255


def test_raw_and_jpg_of_one_name_get_two_files(zoomer, tmp_path):
    photos = [write_photo(tmp_path / name) for name in ("b.dng", "b.jpg")]
    zoom_photos(photos, tmp_path / "two", zoomer, say=print, warn=print)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["b_4x.png", "b_raw_4x.png"]


def test_too_large_a_photograph_is_refused_first(zoomer, tmp_path, monkeypatch):
    large, small = (write_photo(tmp_path / name, side, side) for name, side in (("l.png", 400), ("s.png", 32)))
    need = photo_module._BASE_BYTES + 32 * 32 * 100
    monkeypatch.setattr(photo_module, "available_memory", lambda: need)
    warned = []
    with pytest.raises(ZoomError, match="expected 2 photographs, got 1"):
        zoom_photos([large, small], tmp_path / "out", zoomer, say=print, warn=warned.append)
    assert len(warned) == 1 and "l.png: expected 0.7 GB of free memory for 400x400 pixels" in warned[0]
    assert (tmp_path / "out" / "s_4x.png").exists()


def test_any_error_is_that_photographs(zoomer, tmp_path, monkeypatch):
    photos = [write_photo(tmp_path / name) for name in ("a.png", "b.png")]
    real, warned = photo_module.read_picture, []

    def broken(data, name):
        if "a.png" in name:
            raise RuntimeError("odd\nfault")
        return real(data, name)

    monkeypatch.setattr(photo_module, "read_picture", broken)
    with pytest.raises(ZoomError, match="expected 2 photographs, got 1"):
        zoom_photos(photos, tmp_path / "out", zoomer, say=print, warn=warned.append)
    assert "a.png" in warned[0] and "RuntimeError: odd fault" in warned[0] and "\n" not in warned[0]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("name", ["photo.dng", "photo.png"])
def test_a_crop_is_that_part_of_the_whole(name, orientation, zoomer, tmp_path):
    more = {"shot": ShotTags(orientation=orientation)} if name.endswith("dng") else {}
    path = write_photo(tmp_path / name, 100, 120, **more)
    for out, crop in (("whole.png", None), ("part.png", (31, 40, 21, 30))):
        zoom_photos([path], tmp_path / out, zoomer, output=Output(crop=crop), say=print, warn=print)
    part = written(tmp_path / "whole.png")[160:280, 124:208]
    assert np.abs(written(tmp_path / "part.png") - part).max() < TOLERANCE
    with pytest.raises(ZoomError, match="expected a crop within"):
        zoom_photos([path], tmp_path / "c.png", zoomer, output=Output(crop=(90, 90, 40, 40)), say=print, warn=print)


@pytest.mark.parametrize("scale", [2, 3, 8])
def test_other_scales_are_resampled_and_said(scale, zoomer, tmp_path):
    path = write_photo(tmp_path / "photo.png", 300, 80)
    said = []
    (done,) = zoom_photos([path], tmp_path / "z.png", zoomer, output=Output(scale=scale), say=said.append, warn=print)
    assert (done.width, done.height) == (80 * scale, 300 * scale)
    whole = enlarged(torch.from_numpy(picture(300, 80)).permute(2, 0, 1) / 255)
    mode = cv2.INTER_AREA if scale < 4 else cv2.INTER_CUBIC
    expected = cv2.resize(whole, (80 * scale, 300 * scale), interpolation=mode).clip(0, 1)
    assert np.abs(written(done.path) - expected).max() < TOLERANCE
    assert said[0] == f"the model enlarges 4x; its result is resampled to {scale}x"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_a_raws_tags_are_kept_and_turned_once(suffix, zoomer, tmp_path):
    path = write_photo(tmp_path / "photo.dng", shot=ShotTags(orientation=6, focal_mm=50.0, iso=200))
    zoom_photos([path], tmp_path / f"z{suffix}", zoomer, say=print, warn=print)
    with Image.open(tmp_path / f"z{suffix}") as image:
        exif = image.getexif()
        assert image.size == (192, 256) and exif[0x0112] == 1 and "Simulated" in exif[0x0110]
        assert exif.get_ifd(0x8769)[0x920A] == 50 and exif.get_ifd(0x8769)[0x8827] == 200


def test_a_name_that_is_not_utf_8_is_zoomed(zoomer, tmp_path):
    for suffix in (".png", ".dng"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/stra\xdfe" + suffix.encode()))
        write_photo(tmp_path / f"named{suffix}").rename(path)
        said = []
        zoom_photos([path], tmp_path / f"out{suffix[1:]}", zoomer, say=said.append, warn=print)
        assert len(list((tmp_path / f"out{suffix[1:]}").iterdir())) == 1
        said[-1].encode()


def test_a_name_in_a_message_steers_no_terminal():
    assert shown(Path("a\nb\x1b[31m\u202e é.jpg")) == "a\\nb\\x1b[31m\\u202e é.jpg"


@pytest.mark.parametrize("cfa", ["RGGB", "BGGR", "GRBG", "GBRG"])
@pytest.mark.parametrize(("orientation", "height", "width"), [(1, 70, 90), (3, 72, 90), (6, 70, 92), (8, 72, 92)])
def test_raw_of_any_start_is_zoomed_whole(cfa, orientation, height, width, zoomer, tmp_path):
    """Every row and column of the sensor is kept, and each colour is read from its own sites."""
    colours = {"R": (0, 4000), "B": (3, 1500)}
    red_row = cfa.index("R") // 2
    places = [colours.get(name, (1, 3000) if n // 2 == red_row else (2, 2500)) for n, name in enumerate(cfa)]
    mosaic = np.zeros((height, width), np.uint16)
    for n, (_, value) in enumerate(places):
        mosaic[n // 2 :: 2, n % 2 :: 2] = value
    black, path = (512, 600, 700, 800), tmp_path / "photo.dng"
    write_dng(path, mosaic, cfa=cfa, black_level=black, wb=(1.0, 1.0, 1.0), shot=ShotTags(orientation=orientation))
    photo = read_photo(path, zoomer.model.config)
    shares = [(value - black[n]) / (16383 - black[n]) for n, value in enumerate((4000, 3000, 2500, 1500))]
    if orientation in (6, 8):
        shares = [shares[n] for n in (0, 2, 1, 3)]
        height, width = width, height
    assert photo.window[2:] == (height, width) and zoomer.size(photo) == (4 * width, 4 * height)
    for plane, share in zip(photo.raw, shares, strict=True):
        assert torch.allclose(plane, torch.tensor(share, dtype=torch.float32), atol=1e-5)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("cfa", ["GBRG", "BGGR"])
def test_turned_raw_shows_the_rendering(orientation, cfa, zoomer, tmp_path):
    grey = picture(72, 90)[..., 1].astype(np.uint16) * 40 + 600
    path = tmp_path / "photo.dng"
    write_dng(path, grey, cfa=cfa, wb=(1.0, 1.0, 1.0), shot=ShotTags(orientation=orientation))
    image = decode.load(path)
    shown = decode.upright(image.sensor.render(0, 0, 72, 90), image.flip)
    expected = enlarged(torch.from_numpy(shown).permute(2, 0, 1) / 255)
    found = zoomer.zoom(read_photo(path, zoomer.model.config))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < TOLERANCE
