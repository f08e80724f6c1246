"""PNG files: other libraries read back every value, whatever the parts and strips."""

import io
import os
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from pipelines.formats import png


def picture(height: int, width: int, bits: int) -> np.ndarray:
    """Noise on a ramp, with both ends of the range."""
    random = np.random.default_rng(0)
    values = np.linspace(0, 2**bits - 1, height * width * 3) + random.normal(0, 2**bits / 50, height * width * 3)
    return values.clip(0, 2**bits - 1).astype(np.uint8 if bits == 8 else np.uint16).reshape(height, width, 3)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (300, 170), (123, 1), (1, 300)])
@pytest.mark.parametrize("rows", [1, 64, 1000])
def test_other_libraries_read_every_value(bits, height, width, rows, monkeypatch):
    monkeypatch.setattr(png, "_STRIP_BYTES", 2**14)
    image = picture(height, width, bits)
    parts = (image[top : top + rows] for top in range(0, height, rows))
    data = b"".join(png.encode(parts, width, height, bits))
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert decoded.dtype == image.dtype and np.array_equal(decoded, image)
    Image.open(io.BytesIO(data)).verify()  # the chunks' checksums
    if bits == 8:  # Pillow reads 8 of 16 bits
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), image)


def test_the_joined_checksum_is_that_of_the_whole():
    first, second = bytes(range(256)) * 300, b"\xff" * 70_001
    joined = png._joined(zlib.adler32(first), zlib.adler32(second), len(second))
    assert joined == zlib.adler32(first + second)


def test_few_parts_are_asked_for_ahead(monkeypatch):
    """So that a picture need not be in memory as a whole."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    asked, most = [], 2 * 2 + 1

    def parts():
        for number in range(20):
            asked.append(number)
            yield picture(20, 30, 8)

    pieces = png.encode(parts(), 30, 400, 8)
    assert next(pieces).startswith(b"\x89PNG") and asked == []
    next(pieces), next(pieces)
    assert len(asked) == most
    next(pieces)
    assert len(asked) == most + 1
    assert b"".join(pieces).endswith(b"IEND" + zlib.crc32(b"IEND").to_bytes(4, "big")) and len(asked) == 20


def test_turned_and_sliced_arrays_are_written_as_they_look():
    image = picture(40, 50, 16)
    turned = np.rot90(image)[::2]
    data = b"".join(png.encode([turned], turned.shape[1], turned.shape[0], 16))
    assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)[..., ::-1], turned)
