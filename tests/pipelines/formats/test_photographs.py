"""JPG and TIFF from rows, and the tags in every format: other libraries read back what was written."""

import io
import struct
import time
import warnings
import weakref

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines.formats import jpg, png, tags, tiff
from pipelines.zooming.photo import read_photo
from pipelines.zooming.request import Output
from preprocessing.raw.dng import ShotTags, write_dng
from sdan.network import SDANConfig

SIZES = [(1, 1), (7, 5), (300, 170), (513, 257), (129, 300)]


def picture(height, width, bits=8):
    """Noise on a ramp."""
    random = np.random.default_rng(0)
    values = np.linspace(0, 2**bits - 1, height * width * 3) + random.normal(0, 2**bits / 50, height * width * 3)
    return values.clip(0, 2**bits - 1).astype(np.uint8 if bits == 8 else np.uint16).reshape(height, width, 3)


def parts(image, rows=100):
    return (image[top : top + rows] for top in range(0, len(image), rows))


def source_exif():
    exif = Image.Exif()
    exif.update({0x010F: "Maker", 0x0110: "Camera 1", 0x0132: "2026:05:01 10:11:12", 0x0112: 6})
    exif.get_ifd(0x8769).update({0x829A: 0.004, 0x829D: 2.8, 0x8827: 400, 0xA434: "50mm F2", 0x920A: 50.0})
    exif.get_ifd(0x8769).update({0x9003: "2026:05:01 10:11:12", 0x927C: b"addresses"})
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 12.0, 30.5)})
    return exif


@pytest.mark.parametrize("kind", ["png", "jpg", "tiff"])
def test_a_part_is_freed_before_the_next_is_made(kind):
    """256 rows are whole strips of a JPG and whole tiles of a TIFF. A part's last strips may still be in work."""
    used = []

    def made():
        for _ in range(4):
            deadline = time.monotonic() + 20
            while any(part() is not None for part in used) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert all(part() is None for part in used)
            part = picture(256, 300)
            used.append(weakref.ref(part))
            yield part
            del part

    if kind == "tiff":
        tiff.write(io.BytesIO(), made(), 300, 1024, 8)
    else:
        assert b"".join((png if kind == "png" else jpg).encode(made(), 300, 1024, *([8] if kind == "png" else [])))
    assert len(used) == 4


def tiff_bytes(image, bits, **more):
    out = io.BytesIO()
    tiff.write(out, parts(image), image.shape[1], image.shape[0], bits, **more)
    return out.getvalue()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("limit", [tiff.BIG_BYTES, 0], ids=["classic", "big"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_other_libraries_read_every_tiff_value(height, width, limit, bits, monkeypatch):
    monkeypatch.setattr(tiff, "BIG_BYTES", limit)
    image = picture(height, width, bits)
    data = tiff_bytes(image, bits, icc=tags.srgb_profile(), exif=tags.written(source_exif(), width, height))
    assert struct.unpack_from("<H", data, 2) == ((43,) if limit == 0 else (42,))
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert decoded.dtype == image.dtype and np.array_equal(decoded, image)
    if bits == 8:
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), image)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_jpg_in_strips_is_the_jpg_of_the_whole(height, width):
    image = picture(height, width)
    data = b"".join(jpg.encode(parts(image), width, height, quality=90))
    whole = io.BytesIO()
    Image.fromarray(image).save(whole, "JPEG", quality=90, subsampling=0)
    read = Image.open(io.BytesIO(data))
    assert np.array_equal(np.asarray(read), np.asarray(Image.open(whole)))
    assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1], np.asarray(read))


@pytest.mark.parametrize("gps", [True, False])
@pytest.mark.parametrize("kind", ["png", "jpg", "tiff", "bigtiff"])
def test_tags_and_profile_are_kept(kind, gps, monkeypatch):
    if kind == "bigtiff":
        monkeypatch.setattr(tiff, "BIG_BYTES", 0)
    image = picture(40, 60)
    more = {"icc": tags.srgb_profile(), "exif": tags.written(source_exif(), 60, 40, gps=gps)}
    if kind == "png":
        data = b"".join(png.encode(parts(image), 60, 40, 8, **more))
    elif kind == "jpg":
        data = b"".join(jpg.encode(parts(image), 60, 40, **more))
    else:
        data = tiff_bytes(image, 8, **more)
    with Image.open(io.BytesIO(data)) as read:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(read.info["icc_profile"]))
        found = read.getexif()
        assert "sRGB" in profile.profile.profile_description
        assert (found[0x010F], found[0x0110], found.get(0x0112)) == ("Maker", "Camera 1", 1)
        shot, place = found.get_ifd(0x8769), found.get_ifd(0x8825)
    assert (shot[0x829A], shot[0x829D], shot[0x8827], shot[0xA434]) == (0.004, 2.8, 400, "50mm F2")
    assert (shot[0xA002], shot[0xA003], 0x927C in shot) == (60, 40, False)
    assert (place.get(2) == (48.0, 12.0, 30.5)) == gps and bool(place) == gps


@pytest.mark.parametrize("left", [0.5, 0.7, 0.9])
def test_tags_cut_off_with_the_head_give_no_warning(left):
    whole = source_exif().tobytes().removeprefix(b"Exif\x00\x00")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tags.read(whole[: int(left * len(whole))])
        assert tags.written(found, 3, 2)[:2] in (b"II", b"MM")
        found.get_ifd(0x8769)


def test_damaged_tags_count_as_none():
    for head in (b"", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + bytes(50), b"\xff\xd8\xff\xe1"):
        assert tags.written(tags.read(head), 3, 2)[:2] in (b"II", b"MM")


@pytest.mark.parametrize(
    ("before", "scale", "crop_factor", "zoom", "focal"),
    [
        ({}, 4, 1.0, 4, None),
        ({0xA405: 75}, 4, 1.0, 4, 75),
        ({0xA404: 2.0, 0xA405: 75}, 4, 4.0, 8, 300),
        ({0xA404: 0.0, 0xA405: 0}, 2, 3.0, 2, None),  # 0: no digital zoom, unknown
        ({0xA405: 60000}, 4, 2.0, 4, None),  # more than the tag holds
    ],
)
def test_the_digital_zoom_is_in_the_tags(before, scale, crop_factor, zoom, focal):
    """A crop to a quarter enlarged 4x has the tags of a camera's own 4x digital zoom; FocalLength stays."""
    source = source_exif()
    source.get_ifd(0x8769).update(before)
    found = tags.read(tags.written(source, 60, 40, scale=scale, crop_factor=crop_factor)).get_ifd(0x8769)
    assert (found[0xA404], found.get(0xA405), found[0x920A]) == (zoom, focal, 50)
    assert all(type(value) is not float for value in found.values())  # rationals, which EXIF has


@pytest.mark.parametrize("name", ["a.dng", "a.png"])
def test_a_crop_narrows_the_view_by_its_diagonal(name, tmp_path):
    if name == "a.png":
        Image.new("RGB", (96, 64)).save(tmp_path / name)
    else:
        write_dng(tmp_path / name, np.full((64, 96), 2000, np.uint16), shot=ShotTags(orientation=6))
    crop = (4, 6, 48, 32) if name == "a.png" else (4, 6, 32, 48)
    config = SDANConfig(input="packed")
    assert read_photo(tmp_path / name, config, Output(crop=crop)).crop_factor == pytest.approx(2)
    assert read_photo(tmp_path / name, config).crop_factor == 1


def test_the_colour_profile_does_not_hold_the_time_of_day():
    """Otherwise no two runs of `sdan zoom` would write the same bytes."""
    profile = tags.srgb_profile()
    assert profile[24:36] == bytes((7, 208, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0))
    assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
