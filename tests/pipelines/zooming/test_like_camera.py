"""`sdan zoom --like-camera`: the result has the tones and colours of the camera's JPG."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from pipelines.zoom import Output, ZoomError, zoom_photos
from pipelines.zooming.request import check_options
from preprocessing.colour import linear_to_srgb, srgb_to_linear
from preprocessing.photometry.look import measure_look
from preprocessing.raw import decode
from preprocessing.raw.dng import ShotTags, bare_dng, write_dng

HEIGHT, WIDTH = 192, 256
SATURATION = np.array([[1.3, -0.2, -0.1], [-0.15, 1.25, -0.1], [-0.05, -0.25, 1.3]])


def scene(height, width, seed):
    """Smooth, muted colours in linear light, [height, width, 3] from 0.02 to 0.7."""
    random = np.random.default_rng(seed)
    coarse = 0.8 * random.random((12, 16, 1)) ** 2 + 0.15 * random.random((12, 16, 3)) - 0.05
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).clip(0.02, 0.7)


def mosaic(seed=0):
    """RGGB counts from 512 to 16383 of a scene."""
    light = scene(HEIGHT // 2, WIDTH // 2, seed)
    found = np.empty((HEIGHT, WIDTH))
    for place, colour in enumerate((0, 1, 1, 2)):
        found[place // 2 :: 2, place % 2 :: 2] = light[..., colour]
    return (512 + 15000 * found).astype(np.uint16)


def camera_style(rendering):
    """The rendering with more colour and contrast, uint8."""
    light = (srgb_to_linear(rendering / 255) @ SATURATION.T).clip(0, 1)
    value = linear_to_srgb(light)
    return (255 * (value + 0.13 * np.sin(2 * np.pi * (value - 0.5)) / 2)).clip(0, 255).round().astype(np.uint8)


def as_jpg(picture):
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def raw_with(path, *, preview=None, orientation=1, seed=0):
    """A RAW whose preview, stored as the sensor lies, has `preview` made of the rendering."""
    write_dng(path, mosaic(seed), wb=(1, 1, 1))
    jpg = as_jpg(preview(decode.render(path))) if preview else None
    write_dng(path, mosaic(seed), wb=(1, 1, 1), shot=ShotTags(orientation=orientation, thumbnail_jpg=jpg))
    return path


def zoomed(path, zoomer, out, **options):
    output = Output(like_camera=True, overwrite=True, **options)
    zoom_photos([path], out, zoomer, output=output, say=print, warn=print)
    image = cv2.imread(str(out), cv2.IMREAD_UNCHANGED)[..., ::-1]
    return image * (255 / np.iinfo(image.dtype).max)


@pytest.mark.parametrize("bits", [8, 16])
def test_tones_are_those_of_the_jpg_beside_it(bits, zoomer, tmp_path):
    """The preview inside has other tones: the JPG beside the RAW goes first."""
    path = raw_with(tmp_path / "a.dng", preview=lambda rendering: 255 - rendering)
    rendering = decode.render(path)
    wanted = camera_style(rendering)
    (tmp_path / "A.JPG").write_bytes(as_jpg(wanted))
    image = zoomed(path, zoomer, tmp_path / "out.png", bits=bits)
    off = np.abs(cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA) - wanted)
    assert np.abs(rendering.astype(float) - wanted).mean() > 12
    assert off.mean() < 2 and np.percentile(off, 99) < 8
    assert len(np.unique(image)) > 240  # no gaps between the levels where the curve is steep


@pytest.mark.parametrize("orientation", [1, 6])
def test_tones_are_those_of_the_preview_inside(orientation, zoomer, tmp_path):
    """Also of a turned photograph whose preview has no tags, and of a part of it."""
    path = raw_with(tmp_path / "a.dng", preview=camera_style, orientation=orientation)
    whole = zoomed(path, zoomer, tmp_path / "out.png")
    wanted = decode.upright(camera_style(decode.render(path)), decode.load(path).flip)
    off = np.abs(cv2.resize(whole, wanted.shape[1::-1], interpolation=cv2.INTER_AREA) - wanted)
    assert off.mean() < 2
    part = zoomed(path, zoomer, tmp_path / "part.png", crop=(60, 70, 64, 48))
    assert np.abs(part - whole[280:472, 240:496]).max() <= 2  # the same tones as in the whole


def test_a_curve_is_added_as_it_was_removed():
    """`add` undoes `remove` but for rounding, and keeps grey grey, black and white."""
    rendering = (255 * linear_to_srgb(scene(384, 512, 3))).astype(np.uint8)
    look = measure_look(camera_style(rendering), rendering, "srgb")
    back = look.add(rendering.astype(np.uint16) * 257, 8)
    assert np.abs(look.remove(back.transpose(2, 0, 1), "srgb").transpose(1, 2, 0).astype(int) - rendering).mean() < 2
    ramp = np.repeat(np.arange(65536, dtype=np.uint16)[None, :, None], 3, axis=2)
    grey = look.add(ramp, 16)[0].astype(int)
    assert (np.diff(grey, axis=0) >= 0).all() and np.ptp(grey, axis=1).max() <= 2 * 257 / 20
    assert grey[0, 0] == 0 and grey[-1, 0] == 65535


def test_without_the_cameras_jpg_one_line_says_so(zoomer, tmp_path):
    bare = tmp_path / "bare.dng"
    bare.write_bytes(bare_dng(mosaic(), "RGGB", (512,) * 4, 16383, None))
    other = raw_with(tmp_path / "other.dng", preview=lambda _: decode.render(raw_with(tmp_path / "5.dng", seed=5)))
    flat = raw_with(tmp_path / "wide.dng", preview=lambda rendering: rendering[40:-40])
    for path, line in (
        (bare, "expected the camera's JPG beside it or a preview inside, got none"),
        (other, "other.dng, its preview: expected the same picture as the RAW, got another one"),
        (flat, "wide.dng, its preview: expected the same picture as the RAW, got another one"),
    ):
        with pytest.raises(ZoomError, match=line):
            zoomed(path, zoomer, tmp_path / "out.png")
    (tmp_path / "bare.jpg").write_bytes(b"no JPG")
    with pytest.raises(ZoomError, match=r"bare.jpg: .*leave out --like-camera"):
        zoomed(bare, zoomer, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_pictures_and_dngs_have_no_camera_look(zoomer, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.jpg")
    with pytest.raises(ZoomError, match="expected RAW for --like-camera, got a picture"):
        zoomed(tmp_path / "a.jpg", zoomer, tmp_path / "out.png")
    with pytest.raises(ZoomError, match="--like-camera: expected png, tiff or jpg, got dng"):
        check_options(tmp_path / "out.dng", Output(like_camera=True))
