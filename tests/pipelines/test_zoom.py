"""`sdan zoom`: the pixels that a model should give, several photographs in one call, and the output files."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import config as configs
from pipelines import zoom
from pipelines.zoom import Zoomer, ZoomError, check_output, output_paths, read_photo, write_png, zoom_photos
from preprocessing.raw import decode
from preprocessing.raw.dng import ShotTags, write_dng
from sdan import checkpoint, raw_input, starter_folder
from sdan.network import SDAN, SDANConfig
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


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A checkpoint of an untrained network with skip="rendering": its output is bicubic enlargement."""
    torch.manual_seed(0)
    config = configs.smoke()
    folder = tmp_path_factory.mktemp("models") / "untrained"
    return checkpoint.save(folder, SDAN(config.model), config=configs.to_dict(config), scores={})


@pytest.fixture(scope="module")
def zoomer(untrained):
    return Zoomer.load(untrained)


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
    assert zoomer.model.tile_px == 32  # packed pixels
    zoom_photos([path], tmp_path / "zoomed.png", zoomer, say=print, warn=print)
    model = checkpoint.load(starter_folder()).model.eval()
    photo = decode.load(path, curve=model.config.rendering_curve)
    raw, rendering = (tensor[None] for tensor in raw_input.from_photo(photo))
    with torch.inference_mode(), autocast("auto", torch.device("cpu")):
        expected = model(raw, low_pass(rendering, 2), rendering).zoomed[0].float().clamp(0, 1)
    expected = expected.permute(1, 2, 0).numpy()
    assert np.abs(written(tmp_path / "zoomed.png") - expected).max() < TOLERANCE
    assert np.abs(expected - enlarged(rendering[0])).max() > 10 * TOLERANCE  # not bicubic alone


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", ["photo.dng", "photo.png"])
def test_an_untrained_model_writes_bicubic_enlargement(name, bits, zoomer, tmp_path):
    path = write_photo(tmp_path / name, 70, 90)  # several tiles
    said = []
    (done,) = zoom_photos([path], tmp_path / "zoomed.png", zoomer, bits=bits, say=said.append, warn=print)
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


def test_an_odd_picture_loses_its_last_row_and_column(tmp_path):
    photo = read_photo(write_photo(tmp_path / "photo.png", 41, 53), SDANConfig(input="packed"))
    assert photo.rendering.shape == (3, 40, 52) and photo.raw.shape == (4, 20, 26)


def test_an_rgb_model_reads_pictures_and_refuses_raw(tmp_path):
    photo = read_photo(write_photo(tmp_path / "photo.png", 41, 53), SDANConfig(input="rgb"))
    assert torch.equal(photo.raw, photo.rendering) and photo.raw.shape == (3, 41, 53)
    with pytest.raises(ZoomError, match="expected a JPG or PNG for a model with RGB input, got RAW"):
        read_photo(write_photo(tmp_path / "photo.dng"), SDANConfig(input="rgb"))


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
    with pytest.raises(ZoomError, match="expected a readable JPG or PNG"):
        zoom_photos([tmp_path / "photo.png"], tmp_path / "out", zoomer, say=print, warn=warned.append)
    assert warned == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "out", "message"),
    [
        (("one.png", "two.png"), "all.png", "expected a folder for several photographs, got one .png file"),
        (("one.png", "other/one.dng"), "out", "other/one.dng: expected a unique file name"),
        (("one.png",), "zoomed.jpg", "expected a .png or a folder, got a .jpg file"),
    ],
)
def test_outputs_that_collide_are_refused_before_any_work(names, out, message, zoomer, tmp_path):
    photos = [tmp_path / name for name in names]  # none exists: they are not read
    with pytest.raises(ZoomError) as caught:
        zoom_photos(photos, tmp_path / out, zoomer, say=print, warn=print)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_each_photograph_of_a_folder_has_its_file():
    photos = [Path("a/one.ARW"), Path("b/two.jpg")]
    assert output_paths(photos, Path("out"), 8) == [Path("out/one_8x.png"), Path("out/two_8x.png")]
    assert output_paths(photos[:1], Path("one.PNG"), 8) == [Path("one.PNG")]


def test_outputs_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path, bits, message in (
        (tmp_path / "a.png", 10, "--bits: expected 8 or 16, got 10"),
        (tmp_path / "file" / "a.png", 8, "expected a writable folder"),
        (tmp_path / "folder.png", 8, "expected a file name, got a folder"),
    ):
        with pytest.raises(ZoomError, match=message):
            check_output(path, bits)


def test_a_png_appears_complete_or_not_at_all(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zoom, "write_atomically", full)
    with pytest.raises(ZoomError, match="expected a writable place, got No space left on device"):
        write_png(np.zeros((4, 4, 3), np.float32), tmp_path / "a.png")
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


def test_the_starter_model_is_chosen_without_a_champion(untrained, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert zoom.choose_model(tmp_path, None) == (starter_folder(), True)
    assert zoom.choose_model(tmp_path, str(untrained)) == (untrained, False)
    assert zoom.choose_model(tmp_path, "starter") == (starter_folder(), False)
    assert list(tmp_path.iterdir()) == []
