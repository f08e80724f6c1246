"""Known counts and levels are decoded exactly, in RGGB phase and at the right place; others are refused in one line."""

from types import SimpleNamespace

import numpy as np
import pytest
import rawpy
from known_scene import BLACK, WB, WHITE, Scene, frame_to_scene, to_8_bit, to_mosaic

from preprocessing.raw import decode
from preprocessing.raw.dng import ShotTags, write_arw, write_dng
from preprocessing.raw.rendering import render_options

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
    same = to_mosaic(shown, cfa)[row : row + height, col : col + width]
    for plane, (r, c) in zip(image.packed, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        assert np.array_equal(plane, same[r::2, c::2])
    # Each plane holds its colour of the picture, at the right pixels.
    for plane, (r, c), channel in zip(image.packed, ((0, 0), (0, 1), (1, 0), (1, 1)), (0, 1, 1, 2), strict=True):
        linear = (plane.astype(float) - BLACK) / (WHITE - BLACK) * WB[channel]
        expected = shown[row + r : row + height : 2, col + c : col + width : 2, channel]
        assert np.abs(linear.clip(0) ** (1 / 2.2) - expected).max() < 0.01
    # The rendering matches the picture best unshifted.
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
        shot=ShotTags(focal_mm=50, iso=400, exposure_s=0.005),
    )
    image = decode.load(tmp_path / "x.dng")
    assert image.black_level.tolist() == [300, 301, 302, 303]  # R, G1, G2, B
    assert image.white_level == 4000
    assert image.wb.tolist() == pytest.approx([2.5, 1, 1, 1.25], rel=1e-5)
    assert (image.focal_mm, image.iso, image.exposure_s) == (50, 400, pytest.approx(0.005))


def test_arw_is_decoded_as_the_sony_it_states(tmp_path):
    mosaic = to_mosaic(picture())
    write_arw(tmp_path / "x.ARW", mosaic, wb=WB, shot=ShotTags(focal_mm=240))
    image = decode.load((tmp_path / "x.ARW").read_bytes(), name="x.ARW")
    assert np.array_equal(image.packed[3], mosaic[1::2, 1::2])
    assert image.camera == "SONY ILCE-7SM2" and image.focal_mm == 240
    assert (image.black_level == BLACK).all() and image.white_level == WHITE
    assert image.wb.tolist() == pytest.approx([2, 1, 1, 1.5], rel=1e-3)


class OpenedRaw(SimpleNamespace):
    """Replaces an opened rawpy.RawPy, for sensors whose files the tests cannot write."""

    def __init__(self, **changes):
        sizes = {"raw_width": 4, "raw_height": 4, "width": 4, "height": 4, "iwidth": 4, "iheight": 4}
        margins = dict.fromkeys(("crop_top_margin", "top_margin", "crop_left_margin", "left_margin"), 0)
        values = {
            "raw_type": rawpy.RawType.Flat,
            "raw_image": np.full((4, 4), 1000, np.uint16),
            "raw_image_visible": np.full((4, 4), 1000, np.uint16),
            "raw_pattern": np.array([[0, 1], [3, 2]]),
            "raw_colors_visible": np.tile([[0, 1], [3, 2]], (2, 2)),
            "color_desc": b"RGBG",
            "num_colors": 3,
            "sizes": SimpleNamespace(**sizes, **margins, crop_width=4, crop_height=4, pixel_aspect=1.0, flip=0),
            "other": SimpleNamespace(iso_speed=0, shutter_speed=0, focal_length=0),
            "black_level_per_channel": [512, 513, 514, 515],
            "white_level": 16383,
            "camera_whitebalance": [2.0, 1.0, 1.5, 0.0],
            "daylight_whitebalance": [2.2, 1.0, 1.3, 0.0],
            "color_matrix": np.zeros((3, 4)),
            "rgb_xyz_matrix": np.zeros((4, 3)),
        }
        super().__init__(**values | changes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def extract_thumb(self):
        raise rawpy.LibRawNoThumbnailError(b"no thumbnail")


def load_opened(monkeypatch, **changes):
    with monkeypatch.context() as patch:
        patch.setattr(rawpy, "imread", lambda _: OpenedRaw(**changes))
        return decode.load(b"anything", name="x.raf")


@pytest.mark.parametrize(("stated", "expected"), [(515, 515), (0, 513)])
def test_a_missing_black_level_of_g2_is_that_of_g1(monkeypatch, stated, expected):
    image = load_opened(monkeypatch, black_level_per_channel=[512, 513, 514, stated])
    assert image.black_level.tolist() == [512, 513, expected, 514]  # R, G1, G2, B


@pytest.mark.parametrize("camera", [[0.0] * 4, [np.nan] * 4, [2.0, 1.0, 0.0, 1.0]])
def test_a_missing_white_balance_is_daylight(monkeypatch, camera):
    assert load_opened(monkeypatch).wb.tolist() == [2, 1, 1, 1.5]
    image = load_opened(monkeypatch, camera_whitebalance=camera)
    assert image.wb.tolist() == pytest.approx([2.2, 1, 1, 1.3]) and image.wb_source == "daylight"
    assert image.remarks[0] == "no white balance in the file; that of daylight is used"
    with pytest.raises(decode.RawError, match=r"x\.raf: expected white-balance gains .*, got none"):
        load_opened(monkeypatch, camera_whitebalance=camera, daylight_whitebalance=camera)


def test_an_unknown_camera_has_no_colour_matrix(monkeypatch):
    image = load_opened(monkeypatch)
    assert image.sensor.xyz_to_camera is None and image.matrix_source == "none"
    assert image.remarks == ("no colour matrix for this camera; colours stay as the sensor measured them, too grey",)
    assert load_opened(monkeypatch, rgb_xyz_matrix=np.eye(4, 3)).remarks == ()
    singular = np.ones((4, 3))
    with pytest.raises(decode.RawError, match="expected an invertible colour matrix"):
        load_opened(monkeypatch, rgb_xyz_matrix=singular)


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
def test_upright_turns_as_libraw_does(tmp_path, orientation, flip):
    write_dng(tmp_path / "x.dng", to_mosaic(picture()), wb=WB, shot=ShotTags(orientation=orientation))
    image = decode.load(tmp_path / "x.dng")
    assert image.flip == flip and image.rendering.shape == (*SIZE, 3)
    with rawpy.imread(str(tmp_path / "x.dng")) as opened:
        options = {name: value for name, value in render_options("srgb").items() if name != "user_flip"}
        turned = opened.postprocess(user_wb=[float(image.wb[channel]) for channel in (0, 1, 3, 2)], **options)
    assert np.array_equal(decode.upright(image.rendering, image.flip), turned)


@pytest.fixture
def good(tmp_path):
    write_dng(tmp_path / "good.dng", to_mosaic(picture()), wb=WB)
    return (tmp_path / "good.dng").read_bytes()


def test_unreadable_files_are_refused_in_one_line(tmp_path, good):
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
    with pytest.raises(decode.RawError, match=r"absent\.dng: expected a RAW file, got none"):
        decode.load(tmp_path / "absent.dng")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"raw_pattern": np.zeros((6, 6), int)}, "colour pattern X-Trans"),
        ({"raw_pattern": None}, "monochrome sensor"),
        ({"num_colors": 1}, "monochrome sensor"),
        ({"raw_type": rawpy.RawType.Stack}, "demosaiced or layered data"),
        ({"color_desc": b"CYGM"}, "colour pattern CYMG"),
        ({"raw_image_visible": np.ones((1, 4), np.uint16)}, "a visible area of at least 4x4 pixels, got 4x1"),
    ],
)
def test_other_sensors_are_refused(monkeypatch, change, reason):
    with pytest.raises(decode.RawError, match=rf"^x\.raf: expected .*{reason}.*; exclude it$"):
        load_opened(monkeypatch, **change)


def test_a_pattern_unknown_to_rawpy_is_refused(monkeypatch):
    monkeypatch.setattr(OpenedRaw, "__getattribute__", lambda raw, name: pattern_or_attribute(raw, name))
    with pytest.raises(decode.RawError, match=r"got colour pattern unknown \(filters: 148\); exclude it"):
        load_opened(monkeypatch)


def pattern_or_attribute(raw, name):
    if name == "raw_pattern":
        raise NotImplementedError("filters: 148")  # seen once in a fuzz run
    return object.__getattribute__(raw, name)


def test_bytes_and_path_decode_alike(tmp_path, good):
    (tmp_path / "y.dng").write_bytes(good)
    a, b = decode.load(good), decode.load(tmp_path / "y.dng")
    assert np.array_equal(a.packed, b.packed) and np.array_equal(a.rendering, b.rendering)
    assert a.packed.std() > 100
