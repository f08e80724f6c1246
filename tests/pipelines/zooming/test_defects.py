"""`sdan zoom` of RAW with hot and dead pixels, and with clipped highlights."""

import cv2
import numpy as np
import pytest

from pipelines.zoom import Zoomer, zoom_photos
from preprocessing.raw import decode
from preprocessing.raw.dng import write_dng
from preprocessing.raw.hot_pixels import without_defects
from sdan import starter_folder

BLACK, WHITE = 512, 16383
GAINS = np.array([[2, 1], [1, 1.5]])


@pytest.fixture(scope="module")
def zoomer():
    return Zoomer.load(starter_folder())


def zoomed(path, zoomer):
    """float [4H, 4W, 3] in [0, 255]."""
    out = path.with_suffix(".png")
    zoom_photos([path], out, zoomer, say=print, warn=print)
    return cv2.imread(str(out))[..., ::-1].astype(float)


def grey_counts(light_HW, gains, noise=0.0):
    """RGGB counts, with photon noise, of neutral light that clips at 1."""
    balance = np.array([[gains[0], gains[1]], [gains[1], gains[2]]])
    rows, cols = light_HW.shape
    counts = light_HW * np.tile(1 / balance, (rows // 2, cols // 2)) * min(gains)
    counts = counts + noise * np.sqrt(counts) * np.random.default_rng(0).standard_normal(counts.shape)
    return (BLACK + (WHITE - BLACK) * counts).clip(0, WHITE).round().astype(np.uint16)


def test_hot_and_dead_pixels_leave_no_trace(zoomer, tmp_path):
    """In noise, of every colour, weak and saturated: the zoom equals that of the same RAW without them."""
    light = np.tile(np.linspace(0.15, 0.4, 96), (96, 1))
    counts = grey_counts(light, (2, 1, 1.5), noise=0.01)
    write_dng(tmp_path / "clean.dng", counts, wb=(2, 1, 1.5))
    places = [(20, 20), (20, 51), (51, 20), (71, 71), (40, 70), (71, 40)]
    for place, value in zip(places, (WHITE, WHITE, WHITE, WHITE, 6000, 0), strict=True):
        counts[place] = value
    write_dng(tmp_path / "hot.dng", counts, wb=(2, 1, 1.5))
    off = np.abs(zoomed(tmp_path / "hot.dng", zoomer) - zoomed(tmp_path / "clean.dng", zoomer))
    assert off.max() < 12  # a photosite's own noise
    assert np.array_equal(decode.load(tmp_path / "hot.dng").sensor.mosaic_HW, counts)  # training sees the file's counts


def test_stars_lines_edges_and_noise_stay():
    """A point of light through a sharp lens, one red and one white; thin lines; noise of high sensitivity."""
    rows, cols = np.mgrid[:64, :64].astype(float)
    star = sum(np.exp(-((rows - y) ** 2 + (cols - x) ** 2) / (2 * 0.55**2)) for y, x in ((20, 20), (41.4, 30.7)))
    line = np.exp(-((cols - 50.2) ** 2) / (2 * 0.5**2)) * 0.6
    for light in (0.05 + 0.9 * star, 0.05 + line, 0.8 - line, np.where(cols + rows > 60, 0.9, 0.02)):
        counts = grey_counts(light, (2, 1, 1.5))
        assert without_defects(counts, BLACK, WHITE, GAINS)[0] is counts
    noisy = grey_counts(np.full((512, 512), 0.3), (2, 1, 1.5), noise=0.1)
    assert without_defects(noisy, BLACK, WHITE, GAINS)[1] <= 2


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 7), (64, 33)])
def test_the_corners_and_odd_sizes_are_repaired(height, width):
    counts = np.full((height, width), 3000, np.uint16)
    counts[0, 0] = counts[-1, -1] = WHITE
    repaired, number = without_defects(counts, BLACK, WHITE, GAINS)
    assert number == 2 and (repaired == 3000).all() and counts[0, 0] == WHITE


@pytest.mark.parametrize("gains", [(2.2, 1, 1.6), (0.8, 1, 2.4)])
def test_clipped_highlights_are_white(gains, zoomer, tmp_path):
    """A lamp from dark to far beyond clipping: neutral everywhere, white in its middle, without magenta around it."""
    rows, cols = np.mgrid[:96, :96].astype(float)
    light = 0.05 + 6 * np.exp(-((rows - 48) ** 2 + (cols - 48) ** 2) / (2 * 14**2))
    counts = grey_counts(light, gains)
    assert len({int(counts[row, col]) for row, col in ((48, 48), (48, 49), (49, 49))}) == 1  # all three colours clip
    write_dng(tmp_path / "lamp.dng", counts, wb=gains)
    image = zoomed(tmp_path / "lamp.dng", zoomer)
    assert image[160:224, 160:224].min() > 250
    colour = cv2.GaussianBlur(image - image[..., 1:2], (0, 0), 4)[16:-16, 16:-16]
    assert np.abs(colour).max() < 6
