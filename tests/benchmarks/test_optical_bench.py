"""The optical bench's measures on pictures whose answers are known, and short forms of its limits on the starters."""

import cv2
import numpy as np
import peers
import pytest
import torch
from optical_bench import charts, measures

from preprocessing.colour import linear_to_srgb

SCALE = 4


def shown(chart):
    """The chart itself, without camera, as an enlarged picture."""
    return np.asarray(linear_to_srgb(chart.truth(SCALE)), np.float32)


def blurred(picture, sigma_px):
    return cv2.GaussianBlur(picture, (0, 0), sigma_px * SCALE)


@pytest.mark.parametrize("dark", [True, False])
def test_a_perfect_line_does_not_vary_and_keeps_contrast(dark):
    chart = charts.lines(2.0, dark=dark)
    contrasts = measures.line_contrasts(shown(chart), chart, SCALE)
    assert contrasts.shape[0] == len(charts.ANGLES)
    assert np.all(contrasts.mean(axis=1) < 0 if dark else contrasts.mean(axis=1) > 0)
    assert measures.line_variation(contrasts) < 0.03
    assert measures.line_contrast(contrasts, contrasts) == pytest.approx(1)
    assert measures.line_contrast(measures.line_contrasts(blurred(shown(chart), 2), chart, SCALE), contrasts) < 0.6


def test_dashes_along_a_line_are_measured():
    chart = charts.lines(1.4, dark=True)
    picture = shown(chart)
    x = np.arange(picture.shape[1]) / SCALE
    dashes = 0.5 + 0.5 * np.sign(np.sin(2 * np.pi * x / 3))  # every other 1.5 px of a line is missing
    ropes = picture + (picture.max() - picture) * dashes[:, None]
    contrasts = measures.line_contrasts(np.asarray(ropes, np.float32), chart, SCALE)
    assert np.abs(contrasts[0]).std() / np.abs(contrasts[0]).mean() == pytest.approx(1, abs=0.2)  # along x
    assert measures.line_variation(contrasts) > 0.5


@pytest.mark.parametrize("sigma_px", [0.8, 1.5])
def test_the_width_of_a_blurred_edge(sigma_px):
    chart = charts.edges()
    width, overshoot = measures.edges(blurred(shown(chart), sigma_px), chart, SCALE)
    # 10 to 90 % of an edge blurred by a Gaussian, and by the pixel's own box
    assert width == pytest.approx(2.563 * np.hypot(sigma_px, 1 / SCALE / 12**0.5), rel=0.08)
    assert overshoot < 0.01


def test_overshoot_of_a_sharpened_edge():
    chart = charts.edges()
    soft = blurred(shown(chart), 1.0)
    sharp = soft + 0.5 * (soft - blurred(soft, 2.0))
    _, overshoot = measures.edges(sharp, chart, SCALE)
    distances = np.linspace(-12, 12, 1000)
    step = np.array([1.5 * _gaussian_step(d, 1.0) - 0.5 * _gaussian_step(d, 5**0.5) for d in distances])
    assert overshoot == pytest.approx(step.max() - 1, rel=0.15)


def _gaussian_step(distance, sigma):
    return 0.5 * (1 + float(torch.erf(torch.tensor(distance / sigma / 2**0.5))))


def test_chroma_is_zero_for_greys_only():
    grey = np.full((32, 32, 3), 0.4, np.float32)
    assert measures.chroma(grey) < 0.1
    assert measures.chroma(grey + np.array([0.05, 0, -0.05], np.float32)) > 5


def test_noise_and_tones_of_flat_patches():
    chart = charts.patches()
    count = len(charts.GREYS) + len(charts.COLOURS)
    picture = shown(chart)
    means = 255 * measures.patch_means(picture, chart, count, SCALE)
    assert np.abs(means - np.array([(grey,) * 3 for grey in charts.GREYS] + list(charts.COLOURS))).max() < 0.05
    noise = np.random.default_rng(0).normal(0, 4 / 255, picture.shape[:2])[..., None]
    assert measures.noise(picture + np.asarray(noise, np.float32), chart, count, SCALE) == pytest.approx(4, rel=0.05)


def test_the_camera_takes_the_chart():
    """Flat patches keep their colours through mosaic, levels, white balance and LibRaw's rendering."""
    chart = charts.patches()
    photo = charts.expose(chart, charts.LENSES[1], iso=100, seed=0)
    greys = len(charts.GREYS)
    means = 255 * measures.patch_means(np.asarray(photo.rendering / 255, np.float32), chart, greys, 1)
    assert np.abs(means - np.array(charts.GREYS)[:, None]).max() < 2
    lateral = [charts.expose(charts.lines(2.0, dark=True), lens, 100, 0).rendering for lens in charts.LENSES[1:]]
    plain, coloured = (measures.chroma(np.asarray(picture / 255, np.float32), 4) for picture in lateral)
    assert coloured > 1.3 * plain


@pytest.mark.parametrize("method", [peers.by_bicubic, peers.by_lanczos])
def test_interpolations_keep_size_and_tones(method):
    chart = charts.patches()
    photo = charts.expose(chart, charts.LENSES[0], iso=100, seed=0)
    zoomed = method(peers.Subject.from_raw(photo))
    assert zoomed.shape == (*(SCALE * side for side in chart.size), 3) and zoomed.dtype == np.float32
    before = measures.patch_means(np.asarray(photo.rendering / 255, np.float32), chart, 16, 1)
    assert np.abs(measures.patch_means(zoomed, chart, 16, SCALE) - before).max() < 0.5 / 255
