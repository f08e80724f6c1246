"""Simulated sequences as files: layout, EXIF, exact RAW, reproducibility, wrong inputs."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rawpy
from PIL import Image

from preprocessing.raw import dng
from preprocessing.simulator import sequences, truth_files
from preprocessing.simulator.optics import FOCALS_MM
from preprocessing.simulator.sequences import SimulateError, frame_size, simulate
from preprocessing.storage import held
from preprocessing.truth.reader import load_truth

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


def test_layout_and_tags_are_those_of_sr_raw(two: Path) -> None:
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


def test_libraw_decodes_the_sensors_exact_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_sequence_depends_only_on_seed_and_index(two: Path, tmp_path: Path) -> None:
    one = simulate(tmp_path / "one", sequences=1, width_px=WIDTH, seed=11)
    assert digests(one[0]) == digests(two / "00001")
    other = simulate(tmp_path / "other", sequences=1, width_px=WIDTH, seed=12)
    assert digests(other[0])["00003.JPG"] != digests(two / "00001")["00003.JPG"]


def test_complete_sequences_are_kept_and_partial_ones_redone(two: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in two.rglob("*")}
    (two / "00003.partial").mkdir()
    (two / "00003.partial" / "00001.JPG").write_bytes(b"killed here")
    seen = []
    folders = simulate(
        two, sequences=3, width_px=WIDTH, seed=11, progress=lambda done, total: seen.append((done, total))
    )
    assert [folder.name for folder in folders] == ["00001", "00002", "00003"]
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items() if path != two)
    assert not (two / "00003.partial").exists()
    assert len(list((two / "00003").glob("*.JPG"))) == 7


def test_an_interrupted_sequence_leaves_no_complete_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(truth_files, "write", die)
    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path, sequences=1, width_px=WIDTH)
    assert not (tmp_path / "00001").exists()


def test_other_parameters_are_an_error(two: Path) -> None:
    with pytest.raises(SimulateError, match=r"00001: expected a sequence with seed 99, got seed 11; remove it"):
        simulate(two, sequences=1, width_px=WIDTH, seed=99)


def test_a_folder_of_real_data_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "00001").mkdir()
    (tmp_path / "00001" / "00001.ARW").write_bytes(b"mine")
    with pytest.raises(SimulateError, match="00001: expected a simulated sequence, got other files"):
        simulate(tmp_path, sequences=1, width_px=WIDTH)
    assert (tmp_path / "00001" / "00001.ARW").read_bytes() == b"mine"


@pytest.mark.parametrize("damage", [b"\xff\xfe{", b"[]", b"7", b'{"job": 5}', b'{"job": "x"}', b"[" * 10**6])
def test_a_damaged_record_of_a_sequence_is_an_error(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "00001" / "truth").mkdir(parents=True)
    (tmp_path / "00001" / "truth" / "geometry.json").write_bytes(damage)
    with pytest.raises(SimulateError, match="00001: expected a simulated sequence, got other files"):
        simulate(tmp_path, sequences=1, width_px=WIDTH)
    with pytest.raises(
        ValueError, match=r"geometry\.json: expected .*, got a damaged file \(.*\); simulate the sequence"
    ):
        load_truth(tmp_path / "00001")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "drunk"}, "preset: expected one of perfect, tripod, default, handheld, wide, got 'drunk'"),
        ({"raw_format": "cr2"}, "RAW format: expected one of dng, arw, got 'cr2'"),
        ({"width_px": 385}, "width: expected an even number from 384 to 8192, got 385 px"),
        ({"width_px": 100}, "got 100 px"),
        ({"width_px": 8194}, "got 8194 px"),
        ({"sequences": 0}, "sequences: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"scenes": "nowhere"}, "nowhere: expected a folder of photographs .*, got none"),
    ],
)
def test_wrong_values_raise_one_line_errors(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(SimulateError, match=message) as caught:
        simulate(tmp_path / "out", **change)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_readable_photographs_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(SimulateError, match="photos: expected JPG or PNG photographs, got none; add some"):
        simulate(tmp_path / "out", scenes=tmp_path / "photos")
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"nothing")
    with pytest.raises(SimulateError, match="got 1 unreadable ones"):
        simulate(tmp_path / "out", scenes=tmp_path / "photos")


def test_a_folder_in_use_is_an_error(tmp_path: Path) -> None:
    """Else the second command would remove the sequence that the first one is writing."""
    with held(tmp_path), pytest.raises(SimulateError, match="expected a folder in which no other command works"):
        simulate(tmp_path, sequences=1, width_px=WIDTH)


def test_an_output_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(SimulateError, match="out: expected a writable folder, got 'Not a directory'"):
        simulate(tmp_path / "file" / "out", sequences=1)


def test_photographs_become_scenes_and_are_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.jpg", "b.png"):
        Image.fromarray(rng.integers(40, 200, (300, 450, 3), dtype=np.uint8)).save(photos / name)
    (photos / "c.jpg").write_bytes(b"not a photograph")
    folders = simulate(tmp_path / "out", scenes=photos, sequences=1, width_px=WIDTH)
    assert "skipped 1 unreadable photographs, using 2" in caplog.text
    stored = json.loads((folders[0] / "truth" / "geometry.json").read_text())
    assert stored["subject"] == "photographs"
    assert len(stored["job"]["photos"]) == 2
    (photos / "b.png").unlink()
    with pytest.raises(SimulateError, match="expected a sequence with these photographs, got other photographs"):
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


def test_libraw_crops_no_simulated_arw_width() -> None:
    for width in range(sequences.MIN_WIDTH_PX, sequences.MAX_WIDTH_PX + 1, 2):
        assert frame_size(width, "arw")[1][0] not in dng.SONY_CROPPED_WIDTHS


def test_arw_and_jpg_have_the_same_centre(tmp_path: Path) -> None:
    (folder,) = simulate(tmp_path, sequences=1, width_px=800, raw_format="arw", preset="tripod")
    with rawpy.imread(str(folder / "00006.ARW")) as raw:
        assert raw.raw_image_visible.shape == (538, 804)
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


def test_preset_perfect_has_no_misalignment(tmp_path: Path) -> None:
    (folder,) = simulate(tmp_path, sequences=1, width_px=WIDTH, preset="perfect")
    loaded = load_truth(folder)
    assert loaded is not None
    top, left, *_ = loaded.ideals["00005", 4]
    assert np.abs(loaded.true_flow("00005", "00001", (top + 8, left + 8, 32, 48))).max() < 0.001


@pytest.mark.slow
def test_full_size_sony_frames_in_bounded_memory(tmp_path: Path) -> None:
    """4240 px wide, like the ILCE-7SM2; simulated in a new process, whose peak memory is measured."""
    code = (
        "import sys; from pathlib import Path; from preprocessing.simulator.sequences import simulate\n"
        "simulate(sys.argv[1], sequences=1, width_px=4240, raw_format='arw')\n"
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    with rawpy.imread(str(tmp_path / "00001" / "00001.ARW")) as raw:
        assert raw.raw_image_visible.shape == (2848, 4256)
        assert raw.raw_image.shape == (2848, 4288)
    assert int(done.stdout) / 2**20 < 4.5  # GiB
