"""DNGs that are not 16-bit Bayer: each is decoded exactly or refused with a reason."""

import struct

import numpy as np
import pytest
from known_scene import WB, Scene, frame_to_scene, to_mosaic
from mutants import entries, with_field

from preprocessing.raw import decode
from preprocessing.raw.dng import write_dng

SIZE = (96, 144)
XTRANS = bytes.fromhex("010100010102 010102010100 020001000201 010102010100 010100010102 000201020001")
KINDS = {1: "B", 3: "H", 4: "I"}


@pytest.fixture
def mosaic():
    return to_mosaic(Scene(3).view(frame_to_scene(2.0, SIZE), SIZE))


@pytest.fixture
def good(tmp_path, mosaic):
    write_dng(tmp_path / "good.dng", mosaic, wb=WB)
    return (tmp_path / "good.dng").read_bytes()


def retagged(data: bytes, tag: int, kind: int, *values: int, instead_of: int | None = None) -> bytes:
    """The file with a new value of the mosaic's `tag`, which replaces the tag `instead_of` if given."""
    entry = [entry for entry in entries(data) if entry.tag == (instead_of or tag)][-1]
    packed = struct.pack(f"<{len(values)}{KINDS[kind]}", *values)
    if len(packed) > 4:
        data, packed = data + packed + bytes(-len(packed) % 4), struct.pack("<I", len(data))
    head = struct.pack("<HHI", tag, kind, len(values))
    return data[: entry.at] + head + packed.ljust(4, b"\0") + data[entry.at + 12 :]


def with_samples(data: bytes, samples: np.ndarray, *, photometric: int) -> bytes:
    """The file with new picture data, [H, W] or [H, W, channels]."""
    channels = samples.shape[2] if samples.ndim == 3 else 1
    strip = [entry for entry in entries(data) if entry.tag == 273][-1]
    data = with_field(data, strip.at + 8, "<I", len(data)) + samples.tobytes()
    data = retagged(data, 279, 4, samples.nbytes)
    data = retagged(retagged(data, 262, 3, photometric), 277, 3, channels)
    return retagged(data, 258, 3, *[8 * samples.itemsize] * channels)


def refusal(data: bytes) -> str:
    with pytest.raises(decode.RawError) as caught:
        decode.load(data, name="x.dng")
    message = str(caught.value)
    assert message.startswith("x.dng: ") and "\n" not in message
    return message


def test_a_linear_dng_is_refused(good, mosaic):
    picture = np.repeat(mosaic[:, :, None], 3, axis=2)
    assert "got demosaiced or layered data" in refusal(with_samples(good, picture, photometric=34892))


def test_a_monochrome_dng_is_refused(good, mosaic):
    assert "monochrome sensor" in refusal(with_samples(good, mosaic, photometric=34892))


@pytest.mark.parametrize(
    ("repeat", "pattern", "reason"),
    [
        ((6, 6), XTRANS, "colour pattern X-Trans"),
        ((4, 4), bytes([0, 0, 1, 1] * 2 + [1, 1, 2, 2] * 2), "colour pattern RRGG"),  # quad Bayer
        ((2, 4), bytes([0, 1, 0, 1, 1, 2, 1, 2]), "colour pattern 4x4"),
        ((2, 2), bytes([1, 1, 1, 1]), "colour pattern GGGG"),
    ],
)
def test_other_colour_patterns_are_refused(good, repeat, pattern, reason):
    assert reason in refusal(retagged(retagged(good, 33421, 3, *repeat), 33422, 1, *pattern))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_floating_point_counts_are_decoded(good, mosaic, dtype):
    samples = (mosaic // 16 * 16).astype(dtype)  # exact as half floats
    data = retagged(with_samples(good, samples, photometric=32803), 339, 3, 3, instead_of=284)
    image = decode.load(data, name="x.dng")
    assert np.array_equal(image.packed[0], samples[::2, ::2]) and image.white_level == 16383


def test_8_bit_counts_are_decoded(good, mosaic):
    samples = (mosaic >> 6).astype(np.uint8)
    data = retagged(with_samples(good, samples, photometric=32803), 50717, 4, 255)
    data = retagged(data, 50714, 4, 8, 8, 8, 8)
    image = decode.load(data, name="x.dng")
    assert np.array_equal(image.packed[3], samples[1::2, 1::2]) and image.white_level == 255


def test_white_level_comes_from_the_file(good):
    assert decode.load(retagged(good, 50717, 4, 65535)).white_level == 65535
    assert decode.load(retagged(good, 50717, 4, 0)).white_level == 65535  # not stated: the 16-bit maximum
    assert "expected a white level above the black level 512, got 1;" in refusal(retagged(good, 50717, 4, 1))


CELL = (500, 501, 502, 503)  # by place in the 2x2 cell
FOUR = [CELL[2 * (row % 2) + col % 2] for row in range(4) for col in range(4)]


@pytest.mark.parametrize(
    ("repeat", "levels", "expected"),
    [
        ((2, 2), CELL, CELL),
        ((4, 4), FOUR, CELL),
        ((4, 2), [*CELL, *CELL], CELL),
        ((2, 4), (500, 501, 500, 501, 502, 503, 502, 503), CELL),
        ((3, 3), [512] * 9, (512,) * 4),
        ((1, 2), (500, 600), (500, 600, 500, 600)),
    ],
)
@pytest.mark.parametrize("cfa", ["RGGB", "GBRG"])
def test_black_level_patterns_are_exact(tmp_path, mosaic, cfa, repeat, levels, expected):
    """LibRaw gives the least of a pattern larger than 2x2 for all colours: a colour cast in the shadows."""
    write_dng(tmp_path / "x.dng", mosaic, cfa=cfa, wb=WB)
    data = retagged(retagged((tmp_path / "x.dng").read_bytes(), 50713, 3, *repeat), 50714, 4, *levels)
    row, col = divmod(cfa.index("R"), 2)
    wanted = [expected[2 * ((row + r) % 2) + (col + c) % 2] for r, c in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert decode.load(data).black_level.tolist() == wanted


def test_an_irregular_black_level_pattern_is_refused(good):
    data = retagged(retagged(good, 50713, 3, 4, 4), 50714, 4, *range(500, 516))
    assert refusal(data) == ("x.dng: expected one black level per colour, got 4x4 levels from 500 to 515; exclude it")
    nearly = [level + row % 2 for row in range(4) for level in (512, 512, 512, 512)]
    assert decode.load(retagged(retagged(good, 50713, 3, 4, 4), 50714, 4, *nearly)).black_level.max() == 513


def test_missing_black_levels_of_a_pattern_are_refused(good):
    """LibRaw would take 0 for all: a grey veil over the shadows."""
    data = retagged(retagged(good, 50713, 3, 4, 4), 50714, 4, 500, 501)
    assert "expected 16 black levels for its 4x4 pattern, got 2; " in refusal(data)
    one_for_all = retagged(retagged(good, 50713, 3, 0, 0), 50714, 4, 500)
    assert decode.load(one_for_all).black_level.tolist() == [500] * 4


@pytest.mark.parametrize("area", [(1, 0, 95, 144), (0, 1, 96, 143), (3, 3, 91, 141)])
def test_a_black_level_pattern_starts_at_the_active_area(good, area):
    data = retagged(good, 50829, 4, *area, instead_of=284)
    image = decode.load(retagged(retagged(data, 50713, 3, 4, 4), 50714, 4, *FOUR))
    # The pattern's place of each colour: the sensor's red lies on even rows and columns.
    wanted = [CELL[2 * ((row + area[0]) % 2) + (col + area[1]) % 2] for row in (0, 1) for col in (0, 1)]
    assert image.black_level.tolist() == wanted


def test_a_black_level_of_zero_is_kept(tmp_path, mosaic):
    write_dng(tmp_path / "x.dng", mosaic, wb=WB, black_level=(0, 0, 0, 0))
    assert decode.load(tmp_path / "x.dng").black_level.tolist() == [0, 0, 0, 0]


def test_odd_sizes_lose_their_last_row_and_column(good):
    height, width = (next(entry for entry in entries(good)[::-1] if entry.tag == tag) for tag in (257, 256))
    data = with_field(with_field(good, height.at + 8, "<I", 95), width.at + 8, "<I", 143)
    assert decode.load(data).size == (47, 71)


@pytest.mark.parametrize("side", [8_000, 30_000])
def test_implausible_declared_sizes_are_refused(good, side):
    message = refusal(retagged(retagged(good, 256, 4, side), 257, 4, side))
    assert f"pixels in {len(good)} bytes, got {side}x{side} declared" in message
