"""Tiles of a scene with known content: all picture columns show the same place."""

from itertools import cycle

import numpy as np
import pytest
from known_scene import WB, Scene, frame_to_scene, jpg_bytes, to_8_bit, to_mosaic

from preprocessing import tiles
from preprocessing.raw import decode
from preprocessing.raw.dng import write_dng
from preprocessing.registration import affine
from preprocessing.registration.lens import LensMap, sample_through
from preprocessing.registration.register import RegistrationError

SIZE = (256, 384)
SCALE, TILE_PX = 4, 24
ZOOM = 4.8


def picture(reduction, size=SIZE, shift_px=(0, 0)):
    return Scene(8).view(frame_to_scene(reduction, size, shift_px), size)


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """RAW files of all phases, and both JPGs as decoded."""
    folder = tmp_path_factory.mktemp("frames")
    raws = {}
    for cfa in ("RGGB", "GRBG", "GBRG", "BGGR"):
        write_dng(folder / f"{cfa}.dng", to_mosaic(picture(ZOOM), cfa), cfa=cfa, wb=WB)
        raws[cfa] = decode.load(folder / f"{cfa}.dng")
    return raws, tiles.Jpg(to_8_bit(picture(ZOOM)), None), tiles.Jpg(to_8_bit(picture(1)), None)


def cut(image, lr, hr, **options):
    values = {"scale": SCALE, "tile_px": TILE_PX, "stride_px": 16, "ecc": False} | options
    return tiles.cut_tiles(image, lr, hr, ZOOM, tiles.Cutting(**values))


def seen(row, factor, reduction=ZOOM):
    """The scene as the tile must show it, [C, side, side] in [0, 255], `factor` pixels per packed pixel."""
    place = affine.translation(row["origin_col"] + 2 * row["col"], row["origin_row"] + 2 * row["row"])
    to_scene = affine.compose(frame_to_scene(reduction, SIZE), affine.compose(place, affine.scaling(2 / factor)))
    side = factor * TILE_PX
    return Scene(8).view(to_scene, (side, side)).transpose(2, 0, 1) * 255


@pytest.mark.parametrize("cfa", ["RGGB", "GRBG", "GBRG", "BGGR"])
def test_all_columns_show_the_same_place(frames, cfa):
    raws, lr, hr = frames
    rows = cut(raws[cfa], lr, hr)
    assert len(rows) >= 4
    for row in (rows[0], rows[-1]):
        assert np.abs(row["lr_rgb"] - seen(row, 2)).max() <= 1
        # The scene seen at 4x has a softer PSF than the true long frame, so compare the mean difference.
        difference = row["hr_rgb"].astype(float) - seen(row, 2 * SCALE)
        assert np.abs(difference).mean() < 1.5
        for plane, (r, c), channel in zip(row["lr_raw"], ((0, 0), (0, 1), (1, 0), (1, 1)), (0, 1, 1, 2), strict=True):
            shown = ((plane.astype(float) - 512) / (16383 - 512) * WB[channel]).clip(0) ** (1 / 2.2) * 255
            assert np.abs(shown - row["lr_rgb"][channel, r::2, c::2]).max() <= 2
        assert np.corrcoef(row["lr_render"].ravel(), row["lr_rgb"].ravel())[0, 1] > 0.92
        assert row["align_score"] > 0.96  # the short frame aliases a little
        assert row["residual_px"] < 0.25


@pytest.mark.parametrize("ecc", [False, True])
def test_the_stored_map_reproduces_the_target(frames, ecc):
    raws, lr, hr = frames
    rows = cut(raws["GBRG"], lr, hr, ecc=ecc)
    assert {row["aligned_by"] for row in rows} == {"ecc" if ecc else "scale"}
    for row in rows[::3]:
        corner = affine.translation(row["origin_col"] + 2 * row["col"], row["origin_row"] + 2 * row["row"])
        to_mosaic = affine.compose(corner, affine.scaling(1 / SCALE))
        size = (2 * SCALE * TILE_PX, 2 * SCALE * TILE_PX)
        if ecc:
            again = sample_through(hr.pixels_HWC, LensMap.from_numbers(row["lr_to_hr_lens"]).after(to_mosaic), size)
        else:
            to_hr = affine.compose(row["lr_to_hr"].reshape(2, 3), to_mosaic)
            again = affine.sample(hr.pixels_HWC, to_hr, size)
        assert np.abs(again.transpose(2, 0, 1).astype(int) - row["hr_rgb"]).max() <= 1


def test_a_smaller_jpg_is_centred_on_the_visible_area(frames):
    raws, lr, hr = frames
    smaller = tiles.Jpg(lr.pixels_HWC[4:-4, 4:-4], None)
    here, there = cut(raws["RGGB"], lr, hr)[0], cut(raws["RGGB"], smaller, hr)[0]
    assert (here["row"], here["col"]) == (there["row"], there["col"])
    assert np.array_equal(here["lr_rgb"], there["lr_rgb"])


@pytest.mark.parametrize("flip", [3, 5, 6])
def test_rotated_jpgs_are_rotated_back(frames, flip):
    from dataclasses import replace

    raws, lr, hr = frames
    straight = cut(raws["RGGB"], lr, hr)
    image = replace(raws["RGGB"], flip=flip)
    turned = [tiles.Jpg(decode.upright(jpg.pixels_HWC, flip), 1) for jpg in (lr, hr)]
    for ours, theirs in zip(cut(image, *turned), straight, strict=True):
        assert np.array_equal(ours["lr_rgb"], theirs["lr_rgb"])
        assert np.abs(ours["hr_rgb"].astype(int) - theirs["hr_rgb"]).max() <= 1
        assert not np.allclose(ours["lr_to_hr"], theirs["lr_to_hr"])  # the map ends at the stored pixels
    stored = [tiles.Jpg(jpg.pixels_HWC, {3: 3, 5: 8, 6: 6}[flip]) for jpg in (lr, hr)]
    for ours, theirs in zip(cut(image, *stored), straight, strict=True):
        assert np.array_equal(ours["hr_rgb"], theirs["hr_rgb"])


def test_ecc_recovers_a_shift_and_a_wrong_focal_length(frames):
    raws, lr, _ = frames
    # The HR frame is shifted by (30, -18) of its pixels, and its focal length is 1 % longer than its tags say.
    moved = tiles.Jpg(to_8_bit(picture(1 / 1.01, shift_px=(30, -18))), None)
    by_scale, by_ecc = cut(raws["RGGB"], lr, moved), cut(raws["RGGB"], lr, moved, ecc=True)
    assert {row["aligned_by"] for row in by_scale} == {"scale"} and {row["aligned_by"] for row in by_ecc} == {"ecc"}
    assert min(row["residual_px"] for row in by_scale) > 25
    assert max(row["residual_px"] for row in by_ecc) < 0.5
    true = affine.compose(
        affine.invert(frame_to_scene(1 / 1.01, SIZE, (30, -18))), frame_to_scene(ZOOM, SIZE)
    )  # LR mosaic -> scene -> long frame
    corners = np.array([[150.0, 90.0], [230.0, 90.0], [150.0, 165.0], [230.0, 165.0]])
    found = affine.apply(by_ecc[0]["lr_to_hr"].reshape(2, 3), corners)
    assert np.abs(found - affine.apply(true, corners)).max() < 0.5
    assert np.abs(by_ecc[0]["hr_rgb"] - seen(by_ecc[0], 2 * SCALE)).mean() < 2


def fail(*arguments):
    raise RegistrationError("too little detail")


def test_failed_ecc_falls_back_to_scale(frames, monkeypatch):
    raws, lr, hr = frames
    by_scale = cut(raws["RGGB"], lr, hr)
    monkeypatch.setattr(tiles, "register_raw", fail)
    rows = cut(raws["RGGB"], lr, hr, ecc=True)
    assert {row["aligned_by"] for row in rows} == {"scale_fallback"}
    assert np.array_equal(rows[0]["lr_to_hr"], by_scale[0]["lr_to_hr"])


@pytest.mark.parametrize("ecc", [False, True])
@pytest.mark.parametrize("wrong", ["another scene", "turned", "focal length"])
def test_pictures_of_different_things_are_rejected(frames, wrong, ecc):
    raws, lr, hr = frames
    pixels = {
        "another scene": to_8_bit(Scene(99).view(frame_to_scene(1, SIZE), SIZE)),
        "turned": np.ascontiguousarray(hr.pixels_HWC[::-1, ::-1]),
        "focal length": to_8_bit(picture(ZOOM / 2)),  # half of what its tags say
    }[wrong]
    other = tiles.Jpg(pixels, None)
    with pytest.raises(tiles.UnalignedError, match=r"got a correlation of -?0\.[0-6]\d \(at least 0\.65\) and no reg"):
        cut(raws["RGGB"], lr, other, ecc=ecc)
    rows = cut(raws["RGGB"], lr, other, ecc=ecc, keep_unaligned=True)
    assert {row["aligned_by"] for row in rows} == {"unaligned"}


@pytest.mark.parametrize("ecc", [False, True])
def test_a_jpg_that_is_not_of_its_raw_is_rejected(frames, ecc):
    """HR registers to the RAW, but LR's JPG is turned or of another scene."""
    raws, lr, hr = frames
    for pixels in (lr.pixels_HWC[::-1, ::-1], to_8_bit(Scene(99).view(frame_to_scene(ZOOM, SIZE), SIZE))):
        with pytest.raises(tiles.UnalignedError, match="expected a JPG of its RAW in the short frame"):
            cut(raws["RGGB"], tiles.Jpg(np.ascontiguousarray(pixels), None), hr, ecc=ecc)


def test_a_low_score_alone_rejects_nothing(frames, monkeypatch):
    raws, lr, hr = frames
    scores = cycle((0.9, 0.1))  # LR's JPG against its RAW, HR against LR
    monkeypatch.setattr(tiles, "scene_score", lambda first, second: next(scores))
    assert {row["aligned_by"] for row in cut(raws["RGGB"], lr, hr)} == {"scale"}  # it registers
    monkeypatch.setattr(tiles, "register_raw", fail)
    with pytest.raises(tiles.UnalignedError):
        cut(raws["RGGB"], lr, hr)
    monkeypatch.setattr(tiles, "scene_score", lambda first, second: float("nan"))  # flat: nothing can be said
    assert {row["aligned_by"] for row in cut(raws["RGGB"], lr, hr)} == {"scale"}


def test_a_tile_larger_than_the_shared_area_is_rejected(frames):
    raws, lr, hr = frames
    with pytest.raises(tiles.TileError, match=r"of at least 64x64 packed pixels, got 40x2[56]; use a smaller --tile"):
        cut(raws["RGGB"], lr, hr, tile_px=64)


@pytest.mark.parametrize(
    ("length", "tile", "stride", "starts"),
    [
        (95, 96, 64, []),
        (96, 96, 64, [0]),
        (97, 96, 64, [0, 1]),
        (160, 96, 64, [0, 64]),
        (200, 96, 64, [0, 52, 104]),
        (442, 96, 64, [0, 58, 115, 173, 231, 288, 346]),
    ],
)
def test_tiles_cover_the_area_from_end_to_end(length, tile, stride, starts):
    assert tiles.tile_starts(length, tile, stride) == starts


def test_damaged_jpgs_are_rejected_in_one_line():
    good = jpg_bytes(to_8_bit(picture(1)), 240)
    decoded = tiles.decode_jpg(good, "x.JPG")
    assert decoded.size == SIZE and decoded.orientation is None
    for data in (b"", b"text", good[: len(good) // 2], good[:-200], good[:300]):
        with pytest.raises(tiles.TileError, match=r"^00001/00002.JPG: expected a readable JPG, got [^\n]+ again$"):
            tiles.decode_jpg(data, "00001/00002.JPG")


def test_a_jpg_is_decoded_as_stored():
    pixels = to_8_bit(picture(1))
    assert tiles.decode_jpg(jpg_bytes(pixels, orientation=6), "x.JPG").size == SIZE
    assert tiles.decode_jpg(jpg_bytes(pixels, orientation=6), "x.JPG").orientation == 6
