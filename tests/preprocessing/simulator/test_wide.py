"""The preset wide: drawn cameras stay in their ranges, and optics, noise and files are as drawn."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import rawpy

from preprocessing.colour import srgb_to_linear
from preprocessing.raw.decode import load
from preprocessing.raw.dng import CFA_CODES, write_dng
from preprocessing.simulator import wide, wide_sensor
from preprocessing.simulator.camera_jpg import draw_look
from preprocessing.simulator.optics import PRESETS
from preprocessing.simulator.scenery.canvas import Canvas
from preprocessing.simulator.scenes import Scene
from preprocessing.simulator.sequences import simulate
from preprocessing.simulator.wide_sensor import WideCamera
from preprocessing.truth.frame import Exposure, FrameGeometry
from preprocessing.truth.reader import load_truth

SIZE = 384, 256
EXPOSURE = Exposure(
    iso=800, exposure_s=0.01, f_number=8.0, gain=1.0, wb=(2.0, 1.0, 1.5), psf_px=0.6, vignetting=0.0
)  # fmt: skip


def ideal_camera(**changes: object) -> wide.CameraModel:
    """A drawn camera without aberrations, on the axis."""
    drawn = wide.draw_camera(np.random.default_rng(1))
    plain = {"psf_rise": 0.0, "halo": 0.0, "lateral_px": (0.0, 0.0), "axis": (0.0, 0.0), "motion_px": 0.0}
    return replace(drawn, **{**plain, "hot_share": 0.0, **changes})  # type: ignore[arg-type]


def frame(size: tuple[int, int] = SIZE) -> FrameGeometry:
    """A 240 mm frame without distortion: pixels are scene units."""
    return FrameGeometry(240.0, 240.0, *size, *size, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, (0.0, 0.0, 0.0), (3e4, 9e3))


def scene_of(pixels_HW3: np.ndarray) -> Scene:
    """A scene whose far plane is a picture, 1.5 pixels per unit, centred on the axis."""
    height, width = pixels_HW3.shape[:2]
    return Scene([Canvas(pixels_HW3, -width / 3, -height / 3, 1.5)], [], "test")


def test_draws_are_seeded_and_stay_in_their_ranges() -> None:
    assert wide.draw_camera(np.random.default_rng(5)) == wide.draw_camera(np.random.default_rng(5))
    cameras = [wide.draw_camera(np.random.default_rng(seed)) for seed in range(300)]
    for camera in cameras:
        for value, (low, high) in (
            (camera.psf_px, wide.PSF_PX),
            (camera.psf_rise, wide.PSF_RISE),
            (camera.halo, wide.HALO),
            (camera.full_well_e, wide.FULL_WELL_E),
            (camera.read_e, wide.READ_E),
            (camera.row_share, wide.ROW_SHARE),
            (camera.hot_share, wide.HOT_SHARE),
        ):
            assert low <= value <= high
        assert max(map(abs, camera.lateral_px)) <= wide.LATERAL_PX
        assert np.hypot(*camera.axis) <= wide.AXIS
    assert {camera.cfa for camera in cameras} == set(CFA_CODES)
    assert {camera.colours for camera in cameras} == set(wide.MATRICES)
    assert {(camera.black_level, camera.white_level) for camera in cameras} == set(wide.LEVELS)


def test_exposures_stay_in_their_ranges() -> None:
    isos = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        camera = wide.draw_camera(rng)
        exposures = wide.draw_exposures(rng, PRESETS["wide"], camera)
        isos.append(exposures[0].iso)
        assert len({exposure.iso for exposure in exposures}) == 1
        for exposure in exposures:
            assert camera.full_well_e * 100 / exposure.iso >= 0.99 * wide.LEAST_WHITE_E
            # LibRaw scales by the least gain, which must be green's.
            assert exposure.wb[1] == 1 < min(exposure.wb[0], exposure.wb[2])
    assert wide.ISO[0] <= min(isos) < 120
    assert 5000 < max(isos) <= wide.ISO[1]


@pytest.mark.parametrize("iso", [100, 1600, 12800])
def test_noise_variance_follows_the_model(iso: int) -> None:
    """Variance = signal x gain + read noise + row noise + rounding, in counts, within 10 %."""
    camera = ideal_camera(row_share=0.25, black_level=512, white_level=16383, read_counts=1.5)
    exposure = replace(EXPOSURE, iso=iso)
    counts = camera.electrons_per_count(iso)
    green = {"RGGB": (0, 1), "BGGR": (0, 1), "GRBG": (0, 0), "GBRG": (0, 0)}[camera.cfa]
    for level in (0.0, 0.05, 0.4):
        light = np.full((512, 512, 3), level, np.float32)
        mosaic = wide_sensor.read_out(light, camera, exposure, np.random.default_rng(3))
        seen = mosaic[green[0] :: 2, green[1] :: 2].astype(np.float64)
        signal = level * (camera.white_level - camera.black_level)
        read = camera.read_noise_counts(iso) ** 2 * (1 + camera.row_share**2)
        assert seen.mean() == pytest.approx(camera.black_level + signal, abs=0.02 * signal + 1)
        assert seen.var() == pytest.approx(signal / counts + read + 1 / 12, rel=0.10)


@pytest.mark.parametrize("shift_px", [1.5, -0.7])
def test_lateral_colour_is_the_drawn_shift(shift_px: float) -> None:
    """With the axis half a diagonal to the left, red lies `shift_px` further right than green in the frame's centre."""
    rng = np.random.default_rng(2)
    grey = cv2.GaussianBlur(rng.normal(0.5, 1.2, (480, 720)).astype(np.float32), (0, 0), 3)
    pixels = np.repeat((255 * np.clip(grey, 0, 1)).astype(np.uint8)[..., None], 3, axis=2)
    camera = ideal_camera(lateral_px=(shift_px, 0.0), axis=(1.0, 0.0))
    light = wide_sensor.seen_light(scene_of(pixels), frame(), EXPOSURE, camera, 1, (64, 128, 128, 128))
    green, red = light[8:-8, 8:-8, 1], light[8:-8, 8:-8, 0]
    window = np.outer(np.hanning(112), np.hanning(112))
    (found_x, found_y), _ = cv2.phaseCorrelate(green.astype(np.float64), red.astype(np.float64), window)
    assert found_x == pytest.approx(shift_px, abs=0.08)
    assert found_y == pytest.approx(0, abs=0.15)
    assert np.array_equal(light[8:-8, 8:-8, 2], green)  # blue was drawn with no shift


def test_blur_grows_with_the_field() -> None:
    pixels = np.zeros((384, 576, 3), np.uint8)
    pixels[:, ::24] = 255
    middle, corner = (
        wide_sensor.seen_light(
            scene_of(pixels), frame(), EXPOSURE, ideal_camera(psf_rise=0.5, axis=axis), 1, (96, 160, 64, 64)
        )
        for axis in ((0.0, 0.0), (0.8, 0.3))
    )
    assert corner[..., 1].max() < 0.9 * middle[..., 1].max()


def test_libraw_gives_all_phases_the_same_colours(tmp_path: Path) -> None:
    """Four flat colours, one camera, four phases and several levels: one rendering, that of the light itself."""
    light = np.zeros((128, 128, 3), np.float32)
    light[:64, :64], light[:64, 64:], light[64:, :64], light[64:, 64:] = (
        (0.5, 0.5, 0.5), (0.4, 0.2, 0.1), (0.1, 0.3, 0.15), (0.1, 0.15, 0.4),
    )  # fmt: skip
    expected = np.array([[188, 188, 188], [170, 124, 89], [89, 149, 108], [89, 108, 170]])
    for cfa, (black, white) in zip(CFA_CODES, wide.LEVELS, strict=False):
        camera = ideal_camera(cfa=cfa, black_level=black, white_level=white, full_well_e=9e6, read_e=0.1, read_counts=0)
        mosaic = wide_sensor.read_out(light, camera, replace(EXPOSURE, iso=100), np.random.default_rng(0))
        path = tmp_path / f"{cfa}.dng"
        levels, matrix = (float(black),) * 4, camera.xyz_to_camera
        write_dng(path, mosaic, cfa=cfa, black_level=levels, white_level=white, wb=EXPOSURE.wb, xyz_to_camera_33=matrix)
        raw = load(path)
        shown = raw.sensor.render(0, 0, 128, 128).astype(int)
        seen = [shown[row : row + 16, col : col + 16].mean((0, 1)) for row in (24, 88) for col in (24, 88)]
        assert np.abs(np.array(seen) - expected).max() <= 2, cfa


@pytest.fixture(scope="module")
def sequence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("wide"), sequences=1, width_px=480, preset="wide", seed=4)[0]


def test_files_have_the_drawn_levels_and_phase(sequence: Path) -> None:
    stored = json.loads((sequence / "truth" / "geometry.json").read_text())
    camera = stored["camera"]
    with rawpy.imread(str(sequence / "00005.dng")) as raw:
        assert list(raw.black_level_per_channel) == [camera["black_level"]] * 4
        assert raw.white_level == camera["white_level"]
        names = bytes(raw.color_desc)
        assert "".join(chr(names[at]) for at in raw.raw_colors_visible[:2, :2].ravel()) == camera["cfa"]
    assert stored["look"].keys() == asdict(draw_look(np.random.default_rng(0))).keys()


def test_the_truth_has_the_view_and_tones_of_the_jpg(sequence: Path) -> None:
    truth = load_truth(sequence)
    assert truth is not None
    top, left, height, width = truth.ideals["00005", 4]
    ideal = truth.true_rgb("00005", (top, left, height, width), 4)
    jpg = cv2.imread(str(sequence / "00005.JPG"))[top : top + height, left : left + width, ::-1]
    # In linear light, because the mean of encoded values falls with sharpness.
    fine, seen = (srgb_to_linear(picture / 255) for picture in (ideal, jpg))
    small = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    assert small.mean((0, 1)) == pytest.approx(seen.mean((0, 1)), rel=0.06)
    assert np.corrcoef(small.ravel(), seen.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_flat_colours_of_truth_and_jpg_are_equal(seed: int) -> None:
    """Any look, clipped highlights and strong colours included; within the roundings."""
    colours = np.array([[40, 40, 40], [128, 128, 128], [255, 255, 255], [250, 60, 40], [30, 90, 200], [200, 190, 60]])
    pixels = np.repeat(np.repeat(colours.reshape(2, 3, 3), 240, axis=0), 240, axis=1).astype(np.uint8)
    camera = ideal_camera(full_well_e=9e6, read_e=0.1, read_counts=0, colours=list(wide.MATRICES)[3 * seed])
    seen = WideCamera(camera, replace(draw_look(np.random.default_rng(seed)), resized=1, earlier_quality=0))
    exposure = replace(EXPOSURE, iso=100, gain=1.4)
    mosaic = seen.expose(scene_of(pixels), frame(), exposure, np.random.default_rng(1))
    jpg = seen.picture(mosaic, scene_of(pixels), frame(), exposure, np.random.default_rng(2), None)
    ideal = seen.ideal_picture(scene_of(pixels), frame(), exposure, 1, (0, 0, 256, 384))
    for row in (64, 192):
        for col in (50, 192, 330):
            part = (slice(row - 16, row + 16), slice(col - 16, col + 16))
            assert jpg[part].mean((0, 1)) == pytest.approx(ideal[part].mean((0, 1)), abs=2.0)


def test_a_wide_arw_is_what_libraw_expects(tmp_path: Path) -> None:
    (folder,) = simulate(tmp_path, sequences=1, width_px=384, preset="wide", seed=6, raw_format="arw")
    camera = json.loads((folder / "truth" / "geometry.json").read_text())["camera"]
    assert (camera["cfa"], camera["colours"]) == ("RGGB", "Sony ILCE-7SM2")
    assert load(folder / "00001.ARW").white_level == 16383


def test_wide_depends_only_on_seed_and_index(sequence: Path, tmp_path: Path) -> None:
    (again,) = simulate(tmp_path, sequences=1, width_px=480, preset="wide", seed=4)
    for name in ("00005.dng", "00005.JPG", "truth/geometry.json"):
        assert (again / name).read_bytes() == (sequence / name).read_bytes()


def test_a_resized_look_changes_the_used_window() -> None:
    rng = np.random.default_rng(8)
    pixels = rng.integers(0, 256, (480, 720, 3), dtype=np.uint8)
    look = replace(draw_look(rng), resized=1, earlier_quality=0, sharpen=0.0, luma=0.0)
    camera = ideal_camera()
    pictures = []
    for resized in (1, 3):
        seen = WideCamera(camera, replace(look, resized=resized, resize_by="area"))
        mosaic = seen.expose(scene_of(pixels), frame(), EXPOSURE, np.random.default_rng(1))
        shown = seen.picture(mosaic, scene_of(pixels), frame(), EXPOSURE, np.random.default_rng(2), (96, 128, 64, 96))
        pictures.append(shown.astype(int))
    changed = np.abs(pictures[0] - pictures[1]).max(-1) > 0
    assert changed[96:160, 128:224].mean() > 0.9
    changed[96:160, 128:224] = False
    assert not changed.any()
