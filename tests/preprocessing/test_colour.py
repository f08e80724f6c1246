"""Transfer curves invert each other and meet published values; matrices keep white; exposure gain acts on light."""

import math

import numpy as np
import pytest

from preprocessing import colour

BYTES = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("encoded, linear", [(0.0, 0.0), (0.04, 0.0030960), (0.5, 0.2140411), (1.0, 1.0)])
def test_srgb_meets_published_values(encoded, linear):
    assert colour.srgb_to_linear(np.array(encoded)) == pytest.approx(linear, abs=1e-7)
    assert colour.linear_to_srgb(np.array(linear)) == pytest.approx(encoded, abs=1e-6)


@pytest.mark.parametrize("encoded, linear", [(0.0, 0.0), (0.0450, 0.01), (0.4090077, 0.18), (1.0, 1.0)])
def test_bt709_meets_published_values(encoded, linear):
    assert colour.bt709_to_linear(np.array(encoded)) == pytest.approx(linear, abs=1e-6)


def test_tables_hold_the_curves():
    codes = BYTES / 255
    np.testing.assert_allclose(colour.SRGB_BYTE_TO_LINEAR, colour.srgb_to_linear(codes), rtol=1e-6)
    np.testing.assert_allclose(colour.BT709_BYTE_TO_LINEAR, colour.bt709_to_linear(codes), rtol=1e-6)
    assert colour.linear_to_gamma(colour.GAMMA_BYTE_TO_LINEAR) == pytest.approx(BYTES, abs=1e-3)


def test_bytes_survive_linear_light():
    assert np.abs(colour.linear_to_srgb_bytes(colour.SRGB_BYTE_TO_LINEAR).astype(int) - BYTES).max() <= 1  # 4096 steps
    assert colour.linear_to_srgb_bytes(np.array([0.0, 0.2158605, 1.0, 3.0])).tolist() == [0, 128, 255, 255]


def test_negative_light_is_encoded_without_nan():
    assert colour.linear_to_srgb(np.array(-0.01)) == pytest.approx(-0.1292)
    assert colour.linear_to_gamma(np.array(-0.01, np.float32)) == 0


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.25, 2.0])
def test_exposure_divides_linear_light(ratio):
    light = colour.srgb_to_linear(BYTES / 255)
    shown = colour.srgb_to_linear(colour.divide_exposure(BYTES, ratio) / 255)
    expected = np.minimum(light / ratio, 1)
    assert np.abs(colour.linear_to_srgb(shown) - colour.linear_to_srgb(expected)).max() <= 0.5001 / 255


@pytest.mark.parametrize("ratio", [None, math.nan, 1.0])
def test_unknown_exposure_ratio_changes_nothing(ratio):
    assert np.array_equal(colour.divide_exposure(BYTES, ratio), BYTES)


def test_matrices_agree_on_srgb_primaries():
    assert np.abs(colour.SRGB_TO_XYZ - colour.LIBRAW_SRGB_TO_XYZ).max() < 1e-4
    assert colour.SRGB_TO_XYZ.sum(axis=1) == pytest.approx([0.950456, 1.0, 1.088754], abs=2e-6)  # D65


def test_white_stays_white_in_camera_colours():
    matrix = colour.srgb_to_camera(colour.ILCE_7SM2_XYZ_TO_CAMERA)
    assert matrix.sum(axis=1) == pytest.approx(1)
    # Rows of a camera's matrix are free in scale.
    scaled = colour.srgb_to_camera(np.diag([2.0, 1.0, 0.5]) @ colour.ILCE_7SM2_XYZ_TO_CAMERA)
    assert scaled == pytest.approx(matrix)
    assert (matrix.argmax(axis=1) == [0, 1, 2]).all() and matrix.diagonal().max() < 0.95
    assert np.array_equal(colour.srgb_to_camera(None), np.eye(3))
