"""`sdan zoom --format dng`: LibRaw reopens the file, and renders it as it renders the RAW."""

import io
import struct
from dataclasses import replace

import cv2
import numpy as np
import pytest
import rawpy
from PIL import Image

from pipelines import zoom
from pipelines.formats import dng
from pipelines.zoom import Output, ZoomError, zoom_photos
from pipelines.zooming.negative import camera_of
from pipelines.zooming.request import check_options
from preprocessing.colour import linear_to_srgb, srgb_to_linear
from preprocessing.raw import decode
from preprocessing.raw.dng import ShotTags, Tag, write_arw, write_dng
from preprocessing.raw.dng_colour import DngColour, dng_colour
from preprocessing.raw.rendering import render_options
from preprocessing.simulator.sequences import simulate

MATRIX = np.array([[0.688, -0.247, -0.049], [-0.393, 1.201, 0.158], [-0.089, 0.201, 0.581]])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """An ARW, whose matrix LibRaw knows, and a simulated frame of a drawn camera, whose DNG states it."""
    root = tmp_path_factory.mktemp("photographs")
    write_arw(root / "sony.ARW", colourful_counts(512, 16383), wb=(2.2, 1, 1.6))
    (drawn,) = simulate(root / "drawn", sequences=1, width_px=384, preset="wide", seed=4)
    return {"sony": root / "sony.ARW", "drawn": next(drawn.glob("*7.dng"))}


def rendered(path, **options):
    with rawpy.imread(str(path)) as raw:
        return raw.postprocess(use_camera_wb=True, **render_options("srgb"), **options)


def colourful_counts(black, white):
    """Smooth colours, RGGB, from black to clipped, of a camera with strong gains."""
    coarse = np.random.default_rng(0).random((5, 6, 3))
    planes = cv2.resize(coarse, (48, 32), interpolation=cv2.INTER_CUBIC) * 1.3 - 0.1
    light = np.empty((64, 96))
    for place, colour in enumerate((0, 1, 1, 2)):
        light[place // 2 :: 2, place % 2 :: 2] = planes[..., colour]
    light *= np.tile([[0.5, 1], [1, 0.6]], (32, 48))
    return (black + (white - black) * light).clip(0, white).astype(np.uint16)


def colourful_raw(path, **more):
    counts = colourful_counts(500, 16000)
    write_dng(
        path, counts, black_level=(500,) * 4, white_level=16000, wb=(2.2, 1, 1.6), xyz_to_camera_33=MATRIX, **more
    )
    return path


@pytest.mark.parametrize("kind", ["sony", "drawn"])
def test_mean_colours_are_the_raws(kind, photographs, zoomer, tmp_path):
    """Colours that sRGB cannot hold are in both renderings what LibRaw makes of them."""
    zoom_photos([photographs[kind]], tmp_path / "out.dng", zoomer, say=print, warn=print)
    ours, raws = rendered(tmp_path / "out.dng"), decode.render(photographs[kind])
    assert ours.shape == (4 * raws.shape[0], 4 * raws.shape[1], 3)
    for values in (lambda image: image / 255, lambda image: srgb_to_linear(image / 255)):
        mean = values(raws).mean((0, 1))
        assert np.abs(values(ours).mean((0, 1)) / mean - 1).max() < 0.005


@pytest.mark.parametrize("orientation", [1, 6])
def test_each_pixel_is_that_of_the_png(orientation, zoomer, tmp_path):
    """Tones, colours, clipped parts, and the turn; the EXIF is there once."""
    path = colourful_raw(tmp_path / "a.dng", shot=ShotTags(orientation=orientation, focal_mm=50, iso=400))
    output = Output(crop=(4, 6, 50, 52), bits=16)
    for name in ("out.dng", "out.png"):
        zoom_photos([path], tmp_path / name, zoomer, output=output, say=print, warn=print)
    ours = rendered(tmp_path / "out.dng")
    png = cv2.imread(str(tmp_path / "out.png"), cv2.IMREAD_UNCHANGED)[..., ::-1] / 65535
    assert ours.shape == png.shape == (208, 200, 3)
    assert np.abs(ours / 255 - png).max() < 1.5 / 255
    with Image.open(tmp_path / "out.dng") as preview:
        found = preview.getexif()
        assert np.abs(np.asarray(preview.convert("RGB")) / 255 - cv2.resize(png, preview.size)).mean() < 0.03
        assert found[0x0112] == 1 and found[0x0110] == "Simulated"
        assert found.get_ifd(0x8769)[0x920A] == 50 and found.get_ifd(0x8769)[0xA404] == 4


def test_a_second_white_balance_acts_as_on_the_raw(zoomer, tmp_path):
    """Editing goes on: of unclipped greys, other gains make of the DNG what they make of the RAW."""
    mosaic = np.full((64, 64), 512 + 1500, np.uint16)
    mosaic[::2, ::2] = 512 + 800
    write_dng(tmp_path / "a.dng", mosaic, wb=(2, 1, 1.5), xyz_to_camera_33=MATRIX)
    zoom_photos([tmp_path / "a.dng"], tmp_path / "out.dng", zoomer, say=print, warn=print)
    other = [1.7, 1.0, 1.9, 1.0]
    means = []
    for name in ("a.dng", "out.dng"):
        with rawpy.imread(str(tmp_path / name)) as raw:
            means.append(raw.postprocess(user_wb=other, **render_options("srgb"))[8:-8, 8:-8].mean((0, 1)))
    assert np.abs(means[0] - means[1]).max() < 1


def test_a_dngs_own_colour_tags_are_kept(tmp_path):
    """Both calibrations, forward matrices and baseline exposure; what cannot be used is left out as a whole."""
    ifd = {50706: b"\1\4\0\0", 50721: MATRIX, 50722: 1.1 * MATRIX, 50964: MATRIX / 2, 50727: (1.0, 1.0, 1.0),
           50730: 1.25, 50778: 17, 50779: 21, 50708: "Camera 1"}  # fmt: skip
    found = dng_colour(io.BytesIO(tiff_with(ifd)))
    assert found.numbers[Tag.COLOR_MATRIX_2] == pytest.approx(tuple(1.1 * MATRIX.ravel()), abs=1e-6)
    assert found.numbers[Tag.BASELINE_EXPOSURE] == (1.25,) and found.camera == "Camera 1"
    assert found.illuminants == {Tag.CALIBRATION_ILLUMINANT_1: 17, Tag.CALIBRATION_ILLUMINANT_2: 21}
    for damage in ({50778: 255}, {50722: (1.0, 2.0)}, {50706: None}):
        assert dng_colour(io.BytesIO(tiff_with(ifd | damage))) == DngColour()
    for data in (b"", b"II*\0\xff\xff\xff\xff", b"\xff\xd8\xff"):
        assert dng_colour(io.BytesIO(data)) == DngColour()


def tiff_with(values):
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    ifd = ImageFileDirectory_v2()
    for tag, value in values.items():
        if value is not None:
            ifd.tagtype[tag] = {bytes: 1, str: 2, int: 3}.get(type(value), 10)
            ifd[tag] = tuple(float(each) for each in value.ravel()) if isinstance(value, np.ndarray) else value
    file = io.BytesIO()
    file.write(b"II*\0\x08\0\0\0")
    ifd.save(file)
    return file.getvalue()


def test_a_camera_without_a_matrix_keeps_its_colours(tmp_path):
    """Without a ColorMatrix, the rendering has the sensor's colours; the DNG's matrix says that they are sRGB's."""
    path = colourful_raw(tmp_path / "a.dng")
    image = decode.load(path)
    bare = replace(image, sensor=replace(image.sensor, xyz_to_camera=None), matrix_source="none")
    camera = camera_of(path, bare)
    levels = np.random.default_rng(1).integers(0, 65536, (40, 60, 3)).astype(np.uint16)
    ours = linear_to_srgb(camera.light(levels) * camera.gains / 65535)
    assert np.abs(ours - levels / 65535).max() < 0.55 / 255  # half a step of LibRaw's bytes
    with (tmp_path / "out.dng").open("wb") as file:
        dng.write(file, [camera.light(levels)], 60, 40, camera, np.zeros((2, 3, 3), np.uint8))
    shown = rendered(tmp_path / "out.dng") / 255
    expected = linear_to_srgb(srgb_to_linear(levels / 65535))
    assert np.abs(shown - expected).max() < 2 / 255


def test_clipped_white_is_the_white_level(tmp_path):
    """Each colour clips at its own level below 65535, and none above, so no reader makes highlights magenta."""
    camera = camera_of(path := colourful_raw(tmp_path / "a.dng"), decode.load(path))
    white = camera.light(np.full((1, 1, 3), 65535, np.uint16))[0, 0]
    assert np.array_equal(white, np.rint(65535 / camera.gains)) and white.max() == 65535


def test_a_dng_past_4_gb_is_refused_before_work(tmp_path):
    with pytest.raises(ZoomError, match=r"expected at most 4.29 GB for a DNG, got 30000x30000 pixels of 6 bytes"):
        zoom.write_levels(iter([]), tmp_path / "a.dng", (30000, 30000), 16)
    assert not list(tmp_path.iterdir())


def test_what_a_dng_cannot_be_made_of_is_refused(zoomer, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.jpg")
    with pytest.raises(ZoomError, match="expected RAW for a DNG, got a finished picture"):
        zoom_photos([tmp_path / "a.jpg"], tmp_path / "out.dng", zoomer, say=print, warn=print)
    with pytest.raises(ZoomError, match="--bits: expected 16 for a DNG, got 8"):
        check_options(tmp_path / "out.dng", Output(bits=8))


def test_rows_are_written_as_they_arrive(tmp_path):
    """In strips of a megabyte that follow each other, so that readers of one strip find all of it."""
    camera = camera_of(path := colourful_raw(tmp_path / "a.dng"), decode.load(path))
    image = np.random.default_rng(2).integers(0, 65536, (700, 600, 3)).astype(np.uint16)
    file = io.BytesIO()
    parts = (image[top : top + 33] for top in range(0, 700, 33))
    dng.write(file, parts, 600, 700, camera, np.zeros((10, 9, 3), np.uint8))
    data = file.getvalue()
    assert data.endswith(image.astype("<u2").tobytes()) and len(data) < dng.size_bytes(600, 700)
    assert struct.unpack_from("<H", data, 2) == (42,)
