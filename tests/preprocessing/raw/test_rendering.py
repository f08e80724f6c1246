"""A window's rendering equals that part of the whole rendering, which equals LibRaw's rendering of the file."""

import io

import numpy as np
import pytest
import rawpy
from known_scene import BLACK, WB, WHITE, Scene, frame_to_scene, to_mosaic

from preprocessing import colour
from preprocessing.raw import decode
from preprocessing.raw.dng import ShotTags, bare_dng, cfa_channels, write_arw, write_dng
from preprocessing.raw.rendering import render_options, xyz_to_camera_from_libraw

SIZE = (590, 1140)
"""Wider and higher than 512, the side of the squares in which LibRaw's AHD works."""
PHASES = ("RGGB", "GRBG", "GBRG", "BGGR")


def noisy_mosaic(cfa="RGGB"):
    """A scene with noise, so that AHD's decisions depend on every bit."""
    mosaic = to_mosaic(Scene(3).view(frame_to_scene(2.0, SIZE), SIZE), cfa).astype(int)
    noise = np.random.default_rng(0).normal(0, 120, mosaic.shape)
    return np.clip(mosaic + noise.round().astype(int), BLACK - 300, WHITE).astype(np.uint16)


def by_libraw(path, wb, **changed):
    """The file's rendering by LibRaw alone; wb in its order R, G, B, G2."""
    with rawpy.imread(str(path)) as opened:
        return opened.postprocess(user_wb=list(wb), **(render_options("srgb") | changed))


def write(path, cfa="RGGB", **arguments):
    if path.suffix == ".ARW":
        write_arw(path, noisy_mosaic(), **arguments)
    else:
        write_dng(path, noisy_mosaic(cfa), cfa=cfa, **arguments)
    return decode.load(path)


@pytest.mark.parametrize("cfa", PHASES)
def test_a_window_is_a_part_of_the_whole_rendering(tmp_path, cfa):
    image = write(tmp_path / "x.dng", cfa, wb=WB, black_level=(500, 505, 510, 515))
    whole = image.rendering
    height, width = image.size
    assert whole.shape == (2 * height, 2 * width, 3)
    random = np.random.default_rng(1)
    windows = [(0, 0, 20, 30), (height - 33, width - 41, 33, 41), (0, width - 1, 1, 1), (100, 200, 150, 300)]
    for _ in range(6):
        rows, cols = random.integers(1, height), random.integers(1, width)
        windows.append((random.integers(height - rows + 1), random.integers(width - cols + 1), rows, cols))
    for top, left, rows, cols in windows:
        part = whole[2 * top : 2 * (top + rows), 2 * left : 2 * (left + cols)]
        assert np.array_equal(image.render(top, left, rows, cols), part), (top, left, rows, cols)
        counts = image.packed[:, top : top + rows, left : left + cols]
        assert np.array_equal(image.counts(top, left, rows, cols), counts)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("name", ["x.dng", "x.ARW"])
def test_the_whole_equals_libraws_rendering(tmp_path, name, orientation):
    image = write(tmp_path / name, wb=(2.25, 1.0, 1.5), shot=ShotTags(orientation=orientation))
    assert image.flip == {1: 0, 3: 3, 6: 6, 8: 5}[orientation]
    direct = by_libraw(tmp_path / name, (2.25, 1.0, 1.5, 1.0))
    assert np.array_equal(image.rendering, direct)
    assert np.array_equal(decode.render(tmp_path / name), direct)
    assert np.array_equal(image.render(64, 128, 96, 96), direct[128:320, 256:448])


@pytest.mark.parametrize("cfa", PHASES)
def test_each_channel_may_have_another_black_level(tmp_path, cfa):
    image = write(tmp_path / "x.dng", cfa, wb=WB, black_level=(480, 520, 560, 600), white_level=15000)
    gains = np.ones(4)
    with rawpy.imread(str(tmp_path / "x.dng")) as opened:
        gains[opened.raw_colors_visible[:2, :2].ravel()] = image.wb[cfa_channels(cfa)]
    top, left = image.origin
    rows, cols = image.rendering.shape[:2]
    direct = by_libraw(tmp_path / "x.dng", gains)
    assert np.array_equal(image.rendering, direct[top : top + rows, left : left + cols])


def test_a_colour_matrix_survives_a_dng():
    """Matrices of any camera, values above 2 included, come back from LibRaw's float32 to within a bit."""
    random = np.random.default_rng(2)
    mosaic = noisy_mosaic()[:64, :64]
    for _ in range(20):
        matrix = np.eye(3) + random.normal(0, 0.25, (3, 3))
        matrix = (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)
        file = bare_dng(mosaic, "RGGB", [BLACK] * 4, WHITE, xyz_to_camera_from_libraw(matrix))
        with rawpy.imread(io.BytesIO(file)) as opened:
            assert (np.abs(opened.color_matrix[:, :3] - matrix) <= np.spacing(np.abs(matrix))).all()


@pytest.mark.parametrize("curve", ["srgb", "bt709"])
def test_the_rendering_has_the_curve_asked_for(tmp_path, curve):
    write(tmp_path / "x.dng", wb=(2.25, 1.0, 1.5))
    linear = by_libraw(tmp_path / "x.dng", (2.25, 1.0, 1.5, 1.0), gamma=(1, 1), output_bps=16)
    encode = {"srgb": colour.linear_to_srgb, "bt709": bt709}[curve]
    expected = 255 * encode(linear / 65535)
    got = decode.load(tmp_path / "x.dng", curve=curve).rendering
    assert np.abs(got - expected).max() <= 1
    assert np.array_equal(decode.render(tmp_path / "x.dng", curve=curve), got)


def bt709(linear):
    return np.where(linear < 0.018, 4.5 * linear, 1.099 * linear**0.45 - 0.099)
