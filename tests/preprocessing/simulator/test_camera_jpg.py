"""The looks of camera JPGs: what is drawn is what the picture shows."""

import io
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image

from preprocessing.colour import linear_to_srgb
from preprocessing.simulator import camera_jpg, sensor, wide, wide_sensor
from preprocessing.truth.frame import Exposure, FrameGeometry

EXPOSURE = Exposure(iso=100, exposure_s=0.01, f_number=8.0, gain=1.0, wb=(2.0, 1.0, 1.5), psf_px=0.6, vignetting=0.0)
CAMERA = replace(wide.draw_camera(np.random.default_rng(1)), full_well_e=9e6, read_e=0.1, read_counts=0, hot_share=0)
PLAIN = replace(
    camera_jpg.draw_look(np.random.default_rng(0)),
    brighten=1.0, contrast=0.0, gamma=1.0, saturation=1.0, chroma_px=0.3, luma=0.0, sharpen=0.0, earlier_quality=0,
)  # fmt: skip


def edge_mosaic() -> np.ndarray:
    light = np.full((96, 96, 3), 0.1, np.float32)
    light[:, 48:] = 0.4
    return wide_sensor.read_out(cv2.GaussianBlur(light, (0, 0), 1), CAMERA, EXPOSURE, np.random.default_rng(0))


def test_looks_are_seeded_and_stay_in_their_ranges() -> None:
    assert camera_jpg.draw_look(np.random.default_rng(5)) == camera_jpg.draw_look(np.random.default_rng(5))
    looks = [camera_jpg.draw_look(np.random.default_rng(seed)) for seed in range(400)]
    for look in looks:
        assert camera_jpg.QUALITY[0] <= look.quality <= camera_jpg.QUALITY[1]
        assert camera_jpg.SHARPEN_RADIUS_PX[0] <= look.sharpen_px <= camera_jpg.SHARPEN_RADIUS_PX[1]
        assert 0 <= look.sharpen <= camera_jpg.SHARPEN_AMOUNT
        curve = look.curve()
        assert (np.diff(curve) > -1e-6).all()
        assert curve[[0, -1]] == pytest.approx([0, 1], abs=1e-4)
    assert {look.subsampling for look in looks} == set(camera_jpg.SUBSAMPLINGS)
    assert {look.kind for look in looks} == set(camera_jpg.KINDS)
    assert np.mean([look.resized > 1 for look in looks]) == pytest.approx(camera_jpg.RESIZED_SHARE, abs=0.07)
    assert min(look.quality for look in looks) < 65
    assert max(look.quality for look in looks) == 98


def test_a_plain_look_is_srgb() -> None:
    picture = camera_jpg.develop(edge_mosaic(), CAMERA, EXPOSURE, PLAIN)
    for column, light in ((20, 0.1), (76, 0.4)):
        assert np.abs(picture[20:60, column] - 255 * linear_to_srgb(np.array(light))).max() <= 1.5


def test_sharpening_overshoots_as_drawn() -> None:
    overshoots = []
    for amount in (0.0, 0.5, 1.5):
        look = replace(PLAIN, sharpen=amount, sharpen_px=1.2, halo=0.4)
        row = camera_jpg.develop(edge_mosaic(), CAMERA, EXPOSURE, look)[48, 20:76, 1].astype(int)
        overshoots.append(row.max() - row[-1])
    assert overshoots[0] <= 1 < overshoots[1] < overshoots[2]
    limited = replace(PLAIN, sharpen=1.5, sharpen_px=1.2, halo=0.02)
    row = camera_jpg.develop(edge_mosaic(), CAMERA, EXPOSURE, limited)[48, 20:76, 1].astype(int)
    assert row.max() - row[-1] <= 0.02 * 255 + 1


def test_denoising_removes_noise() -> None:
    noisy = replace(CAMERA, full_well_e=2e3)
    flat = np.full((96, 96, 3), 0.2, np.float32)
    mosaic = wide_sensor.read_out(flat, noisy, EXPOSURE, np.random.default_rng(0))
    kept = camera_jpg.develop(mosaic, noisy, EXPOSURE, PLAIN).std()
    assert camera_jpg.develop(mosaic, noisy, EXPOSURE, replace(PLAIN, luma=0.12, chroma_px=3.0)).std() < 0.6 * kept


def test_saturation_moves_colours_and_keeps_grey() -> None:
    colours = np.array([[[0.3, 0.3, 0.3], [0.4, 0.2, 0.2]]], np.float32)
    matrix = CAMERA.rgb_to_camera
    camera = cv2.transform(colours, matrix.astype(np.float32))
    plain, vivid = (camera_jpg.toned(camera, matrix, replace(PLAIN, saturation=s))[0] for s in (1.0, 1.4))
    assert vivid[0] == pytest.approx(plain[0], abs=0.002)
    assert vivid[1, 0] - vivid[1, 1] > 1.2 * (plain[1, 0] - plain[1, 1])


def test_quality_and_subsampling_are_those_drawn() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    frame = FrameGeometry(240, 240, 96, 64, 96, 64, 0, 0, 0, 0, 0, 0, (0, 0, 0), (3e4, 9e3))
    for quality, subsampling, layer in ((60, "4:2:0", (2, 2)), (98, "4:4:4", (1, 1)), (90, "4:2:2", (2, 1))):
        data = sensor.encode_jpg(picture, frame, EXPOSURE, "A", "B", quality=quality, subsampling=subsampling)
        with Image.open(io.BytesIO(data)) as image:
            assert image.layer[0][1:3] == layer  # type: ignore[attr-defined]
            found = image.quantization  # type: ignore[attr-defined]
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
        with Image.open(buffer) as image:
            assert found == image.quantization  # type: ignore[attr-defined]


def test_earlier_compression_loses_detail() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    same = camera_jpg.compressed_before(picture, PLAIN)
    assert np.array_equal(same, picture)
    lossy = camera_jpg.compressed_before(picture, replace(PLAIN, earlier_quality=70, earlier_shift=(3, 5)))
    assert lossy.shape == picture.shape
    assert lossy.std() < 0.9 * picture.std()
