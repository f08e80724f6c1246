"""RAW files written with known counts and levels come back as they were, phase RGGB, unmoved against the picture."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import rawpy
from known_scene import BLACK, WB, WHITE, Scene, frame_to_scene, to_8_bit, to_mosaic

from preprocessing.raw import decode
from preprocessing.raw.dng import write_arw, write_dng
from preprocessing.raw.rendering import RENDER_OPTIONS

SIZE = (96, 144)
PHASES = ("RGGB", "GRBG", "GBRG", "BGGR")


def picture(size=SIZE):
    return Scene(3).view(frame_to_scene(2.0, size), size)


@pytest.mark.parametrize("cfa", PHASES)
def test_every_phase_becomes_rggb_and_stays_in_place(tmp_path, cfa):
    shown = picture()
    write_dng(tmp_path / "x.dng", to_mosaic(shown, cfa), cfa=cfa, wb=WB)
    image = decode.load(tmp_path / "x.dng")
    row, col = image.origin
    height, width = 2 * image.packed.shape[1], 2 * image.packed.shape[2]
    assert image.visible_size == SIZE and (row, col) == divmod(cfa.index("R"), 2)
    assert (height, width) == (SIZE[0] - 2 * row, SIZE[1] - 2 * col)
    same = to_mosaic(shown, "RGGB" if cfa == "RGGB" else cfa)[row : row + height, col : col + width]
    for plane, (r, c) in zip(image.packed, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        assert np.array_equal(plane, same[r::2, c::2])
    # The red plane holds red, green green, blue blue of the picture, at its own places.
    for plane, (r, c), channel in zip(image.packed, ((0, 0), (0, 1), (1, 0), (1, 1)), (0, 1, 1, 2), strict=True):
        linear = (plane.astype(float) - BLACK) / (WHITE - BLACK) * WB[channel]
        expected = shown[row + r : row + height : 2, col + c : col + width : 2, channel]
        assert np.abs(linear.clip(0) ** (1 / 2.2) - expected).max() < 0.01
    # So does the rendering: best in place where it is, not a pixel aside.
    here = image.rendering.astype(float).mean(-1)[8:-8, 8:-8]
    errors = {
        shift: np.abs(
            to_8_bit(shown)
            .astype(float)
            .mean(-1)[row + 8 + shift[0] :, col + 8 + shift[1] :][: here.shape[0], : here.shape[1]]
            - here
        ).mean()
        for shift in ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))
    }
    assert min(errors, key=errors.get) == (0, 0), errors


def test_levels_and_gains_come_from_the_file(tmp_path):
    write_dng(
        tmp_path / "x.dng",
        to_mosaic(picture(), "GBRG", black=300, white=4000),
        cfa="GBRG",
        black_level=(300, 301, 302, 303),
        white_level=4000,
        wb=(2.5, 1.0, 1.25),
        focal_mm=50,
        iso=400,
        exposure_s=0.005,
    )
    image = decode.load(tmp_path / "x.dng")
    assert image.black_level.tolist() == [300, 301, 302, 303]  # R, G1, G2, B
    assert image.white_level == 4000
    assert image.wb.tolist() == pytest.approx([2.5, 1, 1, 1.25], rel=1e-5)
    assert (image.focal_mm, image.iso, image.exposure_s) == (50, 400, pytest.approx(0.005))


def test_sony_arw(tmp_path):
    mosaic = to_mosaic(picture())
    write_arw(tmp_path / "x.ARW", mosaic, wb=WB, focal_mm=240)
    image = decode.load((tmp_path / "x.ARW").read_bytes(), name="x.ARW")
    assert np.array_equal(image.packed[3], mosaic[1::2, 1::2])
    assert image.camera == "SONY ILCE-7SM2" and image.focal_mm == 240
    assert (image.black_level == BLACK).all() and image.white_level == WHITE
    assert image.wb.tolist() == pytest.approx([2, 1, 1, 1.5], rel=1e-3)


def test_a_missing_second_green_is_the_first():
    assert decode._per_channel([512, 513, 514, 0]).tolist() == [512, 513, 514, 513]
    assert decode._per_channel([0, 0, 0, 0]).tolist() == [0, 0, 0, 0]


def test_one_bright_pixel_does_not_change_the_rendering(tmp_path):
    dark = to_mosaic(picture() * 0.5)
    write_dng(tmp_path / "dark.dng", dark, wb=WB)
    dark[40, 60] = WHITE
    write_dng(tmp_path / "bright.dng", dark, wb=WB)
    a, b = (decode.load(tmp_path / name).rendering for name in ("dark.dng", "bright.dng"))
    far = np.ones(SIZE, bool)
    far[30:51, 50:71] = False
    assert np.array_equal(a[far], b[far])


@pytest.mark.parametrize(("orientation", "flip"), [(1, 0), (3, 3), (6, 6), (8, 5)])
def test_upright_is_libraws_own_turn(tmp_path, orientation, flip):
    write_dng(tmp_path / "x.dng", to_mosaic(picture()), wb=WB, orientation=orientation)
    image = decode.load(tmp_path / "x.dng")
    assert image.flip == flip and image.rendering.shape == (*SIZE, 3)
    with rawpy.imread(str(tmp_path / "x.dng")) as opened:
        options = {name: value for name, value in RENDER_OPTIONS.items() if name != "user_flip"}
        turned = opened.postprocess(user_wb=[float(image.wb[channel]) for channel in (0, 1, 3, 2)], **options)
    assert np.array_equal(decode.upright(image.rendering, image.flip), turned)


@pytest.fixture
def good(tmp_path):
    write_dng(tmp_path / "good.dng", to_mosaic(picture()), wb=WB)
    return (tmp_path / "good.dng").read_bytes()


def test_unknown_corrupt_and_half_written_files_are_one_clear_line(tmp_path, good):
    cases = {
        "empty": b"",
        "garbage": np.random.default_rng(0).bytes(5000),
        "text": b"not a picture\n" * 100,
        "a sixth": good[: len(good) // 6],
        "half": good[: len(good) // 2],
        "all but 1000 bytes": good[:-1000],
    }
    for case, data in cases.items():
        with pytest.raises(decode.RawError) as caught:
            decode.load(data, name="00007/00003.dng")
        message = str(caught.value)
        assert message.startswith("00007/00003.dng: ") and "\n" not in message, (case, message)
    with pytest.raises(decode.RawError, match="no such file"):
        decode.load(tmp_path / "absent.dng")


def test_linear_dng_is_refused(good):
    # PhotometricInterpretation (0x0106, SHORT) 32803 "colour filter array" -> 34892 "linear RAW".
    tag = bytes.fromhex("0601 0300 01000000")
    assert good.count(tag + (32803).to_bytes(4, "little")) == 1
    linear = good.replace(tag + (32803).to_bytes(4, "little"), tag + (34892).to_bytes(4, "little"))
    with pytest.raises(decode.RawError, match="Bayer"):
        decode.load(linear, name="x.dng")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"raw_pattern": np.zeros((6, 6), int)}, "X-Trans"),
        ({"raw_pattern": None}, "monochrome"),
        ({"num_colors": 1}, "monochrome"),
        ({"raw_type": rawpy.RawType.Stack}, "demosaiced or layered"),
    ],
)
def test_other_sensors_are_refused(change, reason):
    sizes = SimpleNamespace(pixel_aspect=1.0, iheight=4, iwidth=4, height=4, width=4)
    opened = {"raw_type": rawpy.RawType.Flat, "raw_image": np.ones((4, 4)), "num_colors": 3, "sizes": sizes}
    opened["raw_pattern"] = np.array([[0, 1], [3, 2]])
    decode._require_bayer(SimpleNamespace(**opened), "x.raf")
    with pytest.raises(decode.RawError, match=reason):
        decode._require_bayer(SimpleNamespace(**opened | change), "x.raf")


def test_a_cyan_sensor_is_refused():
    with pytest.raises(decode.RawError, match="CYGM"):
        decode._rggb_origin(np.array([[0, 1], [2, 3]]), b"CYGM", "x.raw")


def test_bytes_and_path_decode_alike(tmp_path, good):
    (tmp_path / "y.dng").write_bytes(good)
    a, b = decode.load(good), decode.load(tmp_path / "y.dng")
    assert np.array_equal(a.packed, b.packed) and np.array_equal(a.rendering, b.rendering)
    assert io.BytesIO(good).read(2) == b"II"
