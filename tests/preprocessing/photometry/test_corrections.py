"""Known exposure, distortion and vignetting are measured back from the pictures."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from known_scene import Scene

from preprocessing import colour, tiles
from preprocessing.photometry.corrections import COLUMNS, Pictures, measure
from preprocessing.raw import decode
from preprocessing.registration.affine import about_centres, compose, translation, units_per_px
from preprocessing.simulator import sequences
from preprocessing.simulator.sensor import tone_curve
from preprocessing.truth.reader import load_truth

FRAME = (944, 1416)
"""The LR frame; the pair's area is its central half, as at 2x."""
AREA = (472, 704)
ZOOM = 2.0
TOLERANCE = {
    "exposure_ratio": 0.02,
    "exposure_falloff": 0.02,
    "jpg_scale": 3e-4,
    "jpg_k1": 0.005,
    "jpg_shift_x": 0.05,
    "jpg_shift_y": 0.05,
    "jpg_falloff": 0.03,
}


def grid():
    """(q [H, W, 2], map): the area's pixels in half diagonals of the LR frame, and the map from pixels to them."""
    corner = translation((FRAME[1] - AREA[1]) / 2, (FRAME[0] - AREA[0]) / 2)
    to_units = compose(about_centres(units_per_px(FRAME), FRAME, (0, 0)), corner)
    x, y = np.meshgrid(np.arange(AREA[1]) + 0.5, np.arange(AREA[0]) + 0.5)
    return np.stack([to_units[0, 0] * x + to_units[0, 2], to_units[1, 1] * y + to_units[1, 2]], -1), to_units


def pictures(
    seed=1,
    *,
    ratio=1.0,
    falloff=0.0,
    scale=1.0,
    k1=0.0,
    shift=(0.0, 0.0),
    jpg_falloff=0.0,
    hr_shift=(0, 0),
    curve="srgb",
):
    """A pair with exactly these distortions and exposures; the tone curve is the simulator's."""
    margin = 24
    size = (AREA[0] + 2 * margin, AREA[1] + 2 * margin)
    light = Scene(seed).view(about_centres(1.3, size, (0, 0)), size) ** 2.2 * 0.7
    q, to_units = grid()
    px = 1 / to_units[0, 0]

    def at(points):  # light at q, in half diagonals
        x, y = ((points - q[0, 0]) * px + margin).transpose(2, 0, 1).astype(np.float32)
        return cv2.remap(light.astype(np.float32), x, y, cv2.INTER_CUBIC)

    source = q.copy()
    for _ in range(20):  # what the RAW shows at `source`, the JPG shows at q
        source = (q - np.array(shift) / px) / (scale * (1 + k1 * (source**2).sum(-1, keepdims=True)))
    camera = at(source) * (1 - jpg_falloff * (source**2).sum(-1, keepdims=True))
    other = q + np.array(hr_shift) / px
    long = at(other) * ratio * (1 - falloff * ZOOM**2 * (other**2).sum(-1, keepdims=True))
    encoded = (ENCODE[curve](np.clip(at(q), 0, 1)), tone_curve(camera), tone_curve(long))
    coded = (np.rint(255 * p).astype(np.uint8) for p in encoded)
    to_hr_units = compose(np.array([[ZOOM, 0, 0], [0, ZOOM, 0]]), to_units)
    return Pictures(*coded, True, True, to_units, to_hr_units, curve)


def bt709(linear):
    return np.where(linear < 0.018, 4.5 * linear, 1.099 * linear**0.45 - 0.099)


ENCODE = {"srgb": colour.linear_to_srgb, "bt709": bt709}


@pytest.mark.parametrize(
    "done",
    [
        {},
        {"ratio": 1.4, "falloff": 0.3},
        {"ratio": 1.4, "falloff": 0.3, "curve": "bt709"},
        {"ratio": 0.75, "hr_shift": (6, -9)},
        {"k1": 0.06, "shift": (0.7, -1.3)},
        {"k1": -0.04, "scale": 1.004, "jpg_falloff": -0.4},
        {"scale": 0.997, "ratio": 1.1, "jpg_falloff": 0.3},
    ],
)
def test_applied_corrections_are_measured(done):
    found = measure(pictures(**done))
    shift = done.get("shift", (0, 0))
    expected = {
        "exposure_ratio": done.get("ratio", 1.0),
        "exposure_falloff": done.get("falloff", 0.0),
        "jpg_scale": done.get("scale", 1.0),
        "jpg_k1": done.get("k1", 0.0),
        "jpg_shift_x": shift[0],
        "jpg_shift_y": shift[1],
        "jpg_falloff": done.get("jpg_falloff", 0.0),
    }
    assert tuple(found) == COLUMNS
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=TOLERANCE[name]), name


def test_dark_and_unrelated_pictures_are_not_measurable():
    _, to_units = grid()
    dark = np.zeros((*AREA, 3), np.uint8)
    found = measure(Pictures(dark, dark, dark, True, True, to_units, to_units))
    assert np.isnan(list(found.values())).all()
    noise = np.random.default_rng(0).integers(0, 256, (3, *AREA, 3)).astype(np.uint8)
    found = measure(Pictures(*noise, True, True, to_units, to_units))
    assert np.isnan([found[name] for name in COLUMNS if name.startswith("jpg")]).all()


@pytest.mark.parametrize("curve", ["srgb", "bt709"])
def test_renderings_need_no_camera_curve(curve):
    done = pictures(ratio=1.2, curve=curve)
    light = colour.RENDERING_BYTE_TO_LINEAR[curve][done.rendering]
    rendered = np.rint(255 * ENCODE[curve](np.clip(1.2 * light, 0, 1))).astype(np.uint8)
    both = replace(done, lr=done.rendering, hr=rendered, lr_is_jpg=False, hr_is_jpg=False)
    found = measure(both)
    assert found["exposure_ratio"] == pytest.approx(1.2, abs=0.01) and np.isnan(found["jpg_scale"])
    # The camera's curve is not known where the LR frame has no JPG.
    mixed = replace(done, lr=done.rendering, lr_is_jpg=False)
    assert np.isnan(list(measure(mixed).values())).all()


def test_simulated_exposures_are_measured(tmp_path):
    """Gain and vignetting that the simulator gave each frame, through RAW, JPG and real misalignment."""
    folder = sequences.simulate(tmp_path, sequences=1, width_px=768, preset="default", seed=3)[0]
    truth = load_truth(folder)
    for lr, hr in (("00005", "00001"), ("00006", "00002"), ("00007", "00003")):
        jpgs = [tiles.decode_jpg((folder / f"{stem}.JPG").read_bytes(), stem) for stem in (lr, hr)]
        zoom = truth.frames[hr].focal_mm / truth.frames[lr].focal_mm
        row = tiles.cut_tiles(decode.load(folder / f"{lr}.dng"), *jpgs, zoom, tiles.Cutting(4, 40, 40, ecc=False))[0]
        exposures = truth.exposures
        assert row["exposure_ratio"] == pytest.approx(exposures[hr].gain / exposures[lr].gain, rel=0.04)
        assert row["exposure_falloff"] == pytest.approx(exposures[hr].vignetting, abs=0.08)
