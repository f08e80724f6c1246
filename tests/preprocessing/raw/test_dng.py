"""LibRaw, Pillow and exifread read what preprocessing.raw.dng writes."""

import io
from pathlib import Path

import exifread
import numpy as np
import pytest
import rawpy
from PIL import Image

from preprocessing.colour import ILCE_7SM2_XYZ_TO_CAMERA, srgb_to_camera
from preprocessing.raw.dng import CFA_CODES, SONY_CROPPED_WIDTHS, ShotTags, write_arw, write_dng

EXIF_IFD = 0x8769


def random_mosaic(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 16384, (height, width), dtype=np.uint16)


@pytest.mark.parametrize("cfa", CFA_CODES)
def test_dng_decodes_exactly_in_every_phase(tmp_path: Path, cfa: str) -> None:
    mosaic = random_mosaic(94, 132)
    path = tmp_path / "a.dng"
    write_dng(path, mosaic, cfa=cfa, black_level=(500, 511, 513, 520), white_level=16000, wb=(2.125, 1.0, 1.625))
    with rawpy.imread(str(path)) as raw:
        assert np.array_equal(raw.raw_image_visible, mosaic)
        names = raw.color_desc.decode()
        assert "".join(names[index] for index in raw.raw_pattern.ravel()) == cfa
        # LibRaw's order is R, G1, B, G2; its G1 is in red's rows, too.
        assert list(raw.black_level_per_channel) == [500, 511, 520, 513]
        assert raw.white_level == 16000
        assert raw.camera_whitebalance[:3] == pytest.approx([2.125, 1.0, 1.625], abs=1e-5)


@pytest.mark.parametrize("width", [132, 1542, 4240, 4256])
def test_arw_decodes_exactly_as_the_stated_sony(tmp_path: Path, width: int) -> None:
    mosaic = random_mosaic(64, width)
    path = tmp_path / "a.ARW"
    write_arw(path, mosaic, black_level=(512, 510, 513, 520), wb=(2.0, 1.0, 1.5))
    with rawpy.imread(str(path)) as raw:
        assert np.array_equal(raw.raw_image_visible, mosaic)
        assert list(raw.black_level_per_channel) == [512, 510, 520, 513]
        assert raw.white_level == 16383
        red, green, blue, _ = raw.camera_whitebalance
        assert (red / green, blue / green) == (2.0, 1.5)
        # LibRaw finds the colour matrix in its table by make and model.
        assert raw.rgb_xyz_matrix[0, 0] == pytest.approx(0.5838)


def test_4256_columns_are_stored_in_4288(tmp_path: Path) -> None:
    write_arw(tmp_path / "a.ARW", random_mosaic(64, 4256))
    with rawpy.imread(str(tmp_path / "a.ARW")) as raw:
        assert (raw.sizes.raw_width, raw.sizes.width) == (4288, 4256)


@pytest.mark.parametrize("write", [write_dng, write_arw])
@pytest.mark.parametrize(("orientation", "flip"), [(1, 0), (3, 3), (6, 6), (8, 5)])
def test_exif_reaches_every_reader(tmp_path: Path, write: type, orientation: int, flip: int) -> None:
    path = tmp_path / ("a.dng" if write is write_dng else "a.ARW")
    write(path, random_mosaic(64, 96), shot=ShotTags(35.0, 640, 1 / 250, 6.3, orientation))
    with rawpy.imread(str(path)) as raw:
        assert raw.other.focal_length == pytest.approx(35.0)
        assert raw.other.iso_speed == 640
        assert raw.other.shutter_speed == pytest.approx(0.004)
        assert raw.other.aperture == pytest.approx(6.3)
        assert raw.sizes.flip == flip
    with Image.open(path) as image:
        exif = image.getexif()
        details = exif.get_ifd(EXIF_IFD)
        assert exif[274] == orientation
        assert (details[37386], details[34855], details[33434], details[33437]) == (35.0, 640, 0.004, 6.3)
    with path.open("rb") as file:
        tags = exifread.process_file(file, details=False)
    assert str(tags["EXIF FocalLength"]) == "35"
    assert str(tags["EXIF ISOSpeedRatings"]) == "640"


def test_focal_length_can_be_missing(tmp_path: Path) -> None:
    write_dng(tmp_path / "a.dng", random_mosaic(64, 96), shot=ShotTags(focal_mm=None))
    with Image.open(tmp_path / "a.dng") as image:
        assert 37386 not in image.getexif().get_ifd(EXIF_IFD)
    with rawpy.imread(str(tmp_path / "a.dng")) as raw:
        assert raw.other.focal_length == 0


def test_thumbnail_is_the_one_given(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), (200, 30, 90), np.uint8)).save(buffer, "JPEG")
    write_dng(tmp_path / "a.dng", random_mosaic(64, 96), shot=ShotTags(thumbnail_jpg=buffer.getvalue()))
    with rawpy.imread(str(tmp_path / "a.dng")) as raw:
        thumbnail = raw.extract_thumb()
    with Image.open(io.BytesIO(thumbnail.data)) as image:
        assert image.size == (60, 40)
        assert np.abs(np.asarray(image).mean((0, 1)) - (200, 30, 90)).max() < 4


def test_colours_come_back_from_libraw(tmp_path: Path) -> None:
    """LibRaw inverts the stated camera matrix and white balance."""
    wb = np.array([2.1, 1.0, 1.6])
    linear = np.array([[0.5, 0.5, 0.5], [0.5, 0.2, 0.1], [0.1, 0.4, 0.15], [0.1, 0.15, 0.5]])
    camera = linear @ srgb_to_camera(ILCE_7SM2_XYZ_TO_CAMERA).T / wb
    mosaic = np.empty((64, 4 * 32), np.uint16)
    for number, (red, green, blue) in enumerate(np.rint(512 + camera * (16383 - 512)).astype(np.uint16)):
        patch = mosaic[:, 32 * number : 32 * number + 32]
        patch[:] = green
        patch[0::2, 0::2], patch[1::2, 1::2] = red, blue
    for write, name in ((write_dng, "a.dng"), (write_arw, "a.ARW")):
        write(tmp_path / name, mosaic, wb=wb)
        with rawpy.imread(str(tmp_path / name)) as raw:
            rgb = raw.postprocess(use_camera_wb=True, no_auto_bright=True, gamma=(1, 1), output_bps=16, user_flip=0)
        found = rgb[32, 16::32] / 65535
        assert np.abs(found - linear).max() < 0.01, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mosaic_HW": random_mosaic(63, 96)}, "both even"),
        ({"mosaic_HW": random_mosaic(64, 96).astype(np.float32)}, "uint16"),
        ({"cfa": "RGBG"}, "RGGB, GRBG"),
        ({"black_level": (512, 512, 512)}, "4 values"),
        ({"black_level": (512, 512, 512, 20000)}, "below 16383"),
        ({"wb": (2.0, 0.0, 1.5)}, "positive"),
        ({"shot": ShotTags(orientation=9)}, "EXIF orientation"),
    ],
)
def test_dng_refuses_what_it_cannot_hold(tmp_path: Path, change: dict, message: str) -> None:
    arguments = {"mosaic_HW": random_mosaic(64, 96)} | change
    with pytest.raises(ValueError, match=message):
        write_dng(tmp_path / "a.dng", **arguments)
    assert not (tmp_path / "a.dng").exists()


def test_arw_refuses_widths_that_libraw_crops(tmp_path: Path) -> None:
    for width in SONY_CROPPED_WIDTHS:
        with pytest.raises(ValueError, match="that LibRaw does not crop"):
            write_arw(tmp_path / "a.ARW", np.full((64, width), 600, np.uint16))
    with pytest.raises(ValueError, match="whole numbers"):
        write_arw(tmp_path / "a.ARW", random_mosaic(64, 96), black_level=(512, 512.5, 512, 512))
