"""Simulated sequences as files: layout, exact RAW, EXIF, noise, repeatability, wrong inputs."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import rawpy
from PIL import Image

from preprocessing.colour import linear_to_srgb_bytes
from preprocessing.raw import dng
from preprocessing.simulator import sensor
from preprocessing.simulator import sequences as simulator
from preprocessing.simulator.optics import FOCALS_MM, PRESETS, draw_geometries
from preprocessing.simulator.scenery.painter import Canvas
from preprocessing.simulator.scenes import Scene
from preprocessing.simulator.sequences import SimulateError, frame_size, simulate
from preprocessing.truth.frame import Exposure

WIDTH = 384


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    simulate(out, sequences=2, width_px=WIDTH, seed=11)
    return out


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_layout_is_sr_raws(two: Path) -> None:
    for sequence in ("00001", "00002"):
        names = sorted(path.name for path in (two / sequence).iterdir() if path.is_file())
        assert names == sorted(f"0000{number}.{kind}" for number in range(1, 8) for kind in ("dng", "JPG"))
        for number, focal in enumerate(FOCALS_MM, start=1):
            with Image.open(two / sequence / f"0000{number}.JPG") as image:
                assert image.size == (WIDTH, 256)
                exif = image.getexif()
                details = exif.get_ifd(0x8769)
                assert details[37386] == focal
                assert exif[274] == 1
                iso, exposure, aperture = details[34855], float(details[33434]), float(details[33437])
            with rawpy.imread(str(two / sequence / f"0000{number}.dng")) as raw:
                assert raw.other.focal_length == focal
                assert raw.other.iso_speed == iso
                assert raw.other.shutter_speed == pytest.approx(exposure, rel=1e-3)
                assert raw.other.aperture == pytest.approx(aperture)
                assert raw.raw_image_visible.shape == (256, WIDTH)
                assert list(raw.black_level_per_channel) == [512] * 4
                assert raw.white_level == 16383


def test_libraw_decodes_exactly_what_the_sensor_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, write, suffix in (("dng", dng.write_dng, "dng"), ("arw", dng.write_arw, "ARW")):
        counted: dict[str, np.ndarray] = {}

        def spy(path, mosaic, *, write=write, counted=counted, **more):
            counted[Path(path).name] = mosaic.copy()
            write(path, mosaic, **more)

        monkeypatch.setattr(dng, write.__name__, spy)
        (folder,) = simulate(tmp_path / kind, sequences=1, width_px=WIDTH, raw_format=kind)
        assert len(counted) == 7
        for name, mosaic in counted.items():
            assert name.endswith(suffix)
            with rawpy.imread(str(folder / name)) as raw:
                assert np.array_equal(raw.raw_image_visible, mosaic)


def test_bit_for_bit_whatever_is_simulated_beside_it(two: Path, tmp_path: Path) -> None:
    one = simulate(tmp_path / "one", sequences=1, width_px=WIDTH, seed=11)
    assert digests(one[0]) == digests(two / "00001")
    other = simulate(tmp_path / "other", sequences=1, width_px=WIDTH, seed=12)
    assert digests(other[0])["00003.JPG"] != digests(two / "00001")["00003.JPG"]


def test_what_is_there_is_kept_and_what_is_half_there_is_redone(two: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in two.rglob("*")}
    (two / "00003.partial").mkdir()
    (two / "00003.partial" / "00001.JPG").write_bytes(b"killed here")
    seen = []
    folders = simulate(
        two, sequences=3, width_px=WIDTH, seed=11, progress=lambda done, total: seen.append((done, total))
    )
    assert [folder.name for folder in folders] == ["00001", "00002", "00003"]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items() if path != two)
    assert not (two / "00003.partial").exists()
    assert len(list((two / "00003").glob("*.JPG"))) == 7


def test_a_killed_sequence_leaves_no_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulator.truth, "write", die)
    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path, sequences=1, width_px=WIDTH)
    assert not (tmp_path / "00001").exists()


def test_other_parameters_are_refused_not_mixed(two: Path) -> None:
    with pytest.raises(SimulateError, match=r"00001: was simulated with seed 11"):
        simulate(two, sequences=1, width_px=WIDTH, seed=99)


def test_a_folder_of_real_data_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "00001").mkdir()
    (tmp_path / "00001" / "00001.ARW").write_bytes(b"mine")
    with pytest.raises(SimulateError, match="was not simulated"):
        simulate(tmp_path, sequences=1, width_px=WIDTH)
    assert (tmp_path / "00001" / "00001.ARW").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "drunk"}, "perfect, tripod, default, handheld"),
        ({"raw_format": "cr2"}, "dng, arw"),
        ({"width_px": 385}, "even number from 384"),
        ({"width_px": 100}, "even number from 384"),
        ({"sequences": 0}, "at least 1"),
        ({"seed": -1}, "0 or more"),
        ({"scenes": "nowhere"}, "expected a folder of photographs"),
    ],
)
def test_wrong_values_are_one_clear_line(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(SimulateError, match=message) as caught:
        simulate(tmp_path / "out", **change)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_folders_without_photographs_and_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(SimulateError, match="no readable JPG or PNG"):
        simulate(tmp_path / "out", scenes=tmp_path / "photos")
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"nothing")
    with pytest.raises(SimulateError, match="1 unreadable"):
        simulate(tmp_path / "out", scenes=tmp_path / "photos")
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(SimulateError, match="cannot be written"):
        simulate(tmp_path / "file" / "out", sequences=1)


def test_photographs_as_scenes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.jpg", "b.png"):
        Image.fromarray(rng.integers(40, 200, (300, 450, 3), dtype=np.uint8)).save(photos / name)
    (photos / "c.jpg").write_bytes(b"not a photograph")
    folders = simulate(tmp_path / "out", scenes=photos, sequences=1, width_px=WIDTH)
    assert "1 unreadable photographs left out, 2 used" in caplog.text
    stored = json.loads((folders[0] / "truth" / "geometry.json").read_text())
    assert stored["subject"] == "photographs"
    assert len(stored["job"]["photos"]) == 2
    (photos / "b.png").unlink()
    with pytest.raises(SimulateError, match="other photographs"):
        simulate(tmp_path / "out", scenes=photos, sequences=1, width_px=WIDTH)


@pytest.mark.parametrize(
    ("width", "raw_format", "jpg", "raw"),
    [
        (1536, "dng", (1536, 1024), (1536, 1024)),
        (4240, "arw", (4240, 2832), (4256, 2848)),
        (1536, "arw", (1536, 1024), (1542, 1030)),
        (3970, "arw", (3970, 2646), (3986, 2662)),
    ],
)
def test_frame_sizes(width: int, raw_format: str, jpg: tuple[int, int], raw: tuple[int, int]) -> None:
    assert frame_size(width, raw_format) == (jpg, raw)


def test_no_even_width_meets_a_size_that_libraw_crops() -> None:
    for width in range(simulator.MIN_WIDTH_PX, simulator.MAX_WIDTH_PX + 1, 2):
        assert frame_size(width, "arw")[1][0] not in dng.SONY_CROPPED_WIDTHS


def test_arw_and_its_jpg_lie_centre_to_centre(tmp_path: Path) -> None:
    (folder,) = simulate(tmp_path, sequences=1, width_px=800, raw_format="arw", preset="tripod")
    with rawpy.imread(str(folder / "00006.ARW")) as raw:
        assert raw.raw_image_visible.shape == (538, 804) if frame_size(800, "arw")[1] == (804, 538) else True
        rendering = raw.postprocess(use_camera_wb=True, no_auto_bright=True, user_flip=0).astype(np.float64).mean(-1)
    jpg = np.asarray(Image.open(folder / "00006.JPG")).astype(np.float64).mean(-1)
    border = (rendering.shape[1] - jpg.shape[1]) // 2
    assert border > 0

    def correlation(dy: int, dx: int) -> float:
        part = rendering[border + dy :, border + dx :][: jpg.shape[0] - 4, : jpg.shape[1] - 4]
        return float(np.corrcoef(part.ravel(), jpg[: part.shape[0], : part.shape[1]].ravel())[0, 1])

    scores = {(dy, dx): correlation(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    assert max(scores, key=lambda shift: scores[shift]) == (0, 0)
    assert scores[0, 0] > 0.97


def test_noise_is_photon_and_read_noise() -> None:
    """A grey wall: the variance of the counts is what the full well, ISO and read noise say."""
    frame = draw_geometries(np.random.default_rng(0), PRESETS["perfect"], jpg_size=(384, 256), raw_size=(384, 256))[0]
    wall = Canvas(linear_to_srgb_bytes(np.full((600, 900, 3), 0.3, np.float32)), -300.0, -200.0, 1.5)
    exposure = Exposure(400, 0.01, 8.0, 0.8, (2.0, 1.0, 1.5), 0.6, vignetting=0.0)
    mosaic = sensor.expose(Scene([wall], [], "wall"), frame, exposure, np.random.default_rng(1)).astype(np.float64)
    electrons_per_count = sensor.FULL_WELL_E / 4 / (sensor.WHITE_LEVEL - sensor.BLACK_LEVEL)
    for plane, gain in ((mosaic[0::2, 0::2], 2.0), (mosaic[0::2, 1::2], 1.0), (mosaic[1::2, 1::2], 1.5)):
        signal = plane.mean() - sensor.BLACK_LEVEL
        assert signal == pytest.approx(0.3 * 0.8 / gain * (sensor.WHITE_LEVEL - sensor.BLACK_LEVEL), rel=0.02)
        variance = (signal * electrons_per_count + sensor.READ_NOISE_E**2) / electrons_per_count**2
        assert plane.var() == pytest.approx(variance, rel=0.05)


def test_perfect_preset_keeps_noise_but_no_misalignment(tmp_path: Path) -> None:
    (folder,) = simulate(tmp_path, sequences=1, width_px=WIDTH, preset="perfect")
    loaded = simulator.truth.load_truth(folder)
    assert loaded is not None
    top, left, *_ = loaded.ideals["00005", 4]
    assert np.abs(loaded.true_flow("00005", "00001", (top + 8, left + 8, 32, 48))).max() < 0.001


@pytest.mark.slow
def test_full_size_sony_frames_in_bounded_memory(tmp_path: Path) -> None:
    """4240 px wide as the ILCE-7SM2; run alone, since it measures this process."""
    import resource

    (folder,) = simulate(tmp_path, sequences=1, width_px=4240, raw_format="arw")
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with rawpy.imread(str(folder / "00001.ARW")) as raw:
        assert raw.raw_image_visible.shape == (2848, 4256)
        assert raw.raw_image.shape == (2848, 4288)
    assert peak_gib < 4.5 or os.environ.get("PYTEST_XDIST_WORKER")
