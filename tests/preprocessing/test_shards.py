"""The whole job on small sequences: what is written, skipped, rejected and quarantined, and killed workers."""

import hashlib
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from known_scene import Scene, frame_to_scene, jpg_bytes, to_8_bit, write_sequence

from preprocessing import shards
from preprocessing.schema import SchemaError, decode, list_shards, read_info
from preprocessing.shards import PreprocessError, PreprocessOptions, preprocess
from preprocessing.simulator.sequences import simulate

OPTIONS = PreprocessOptions(tile_px=24, stride_px=16, val=("00002",))
PAIRS = ("00005-00001", "00006-00002", "00007-00003")


@pytest.fixture(scope="module", autouse=True)
def running_ray():
    mine = not ray.is_initialized()
    if mine:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    if mine:
        ray.shutdown()


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Two sequences of seven frames, 384x256: DNG and Sony ARW."""
    raw = tmp_path_factory.mktemp("originals")
    write_sequence(raw / "00001", seed=1)
    write_sequence(raw / "00002", seed=2, raw_format="arw")
    return raw


@pytest.fixture
def folders(originals, tmp_path):
    shutil.copytree(originals, tmp_path / "raw")
    return tmp_path / "raw", tmp_path / "shards"


def run(folders, options=OPTIONS, **arguments):
    return preprocess(*map(str, folders), options, progress=False, **arguments)


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, except _rate.json, which holds the time taken."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "_rate.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def reasons(report):
    return {(entry.sequence, entry.pair): entry.reason for entry in report.quarantined}


def test_repeated_runs_process_only_new_sequences(folders):
    first = run(folders)
    assert (first.pairs, first.todo, first.written, first.skipped, first.quarantined) == (6, 6, 6, 0, [])
    assert first.splits == {"train": 3, "val": 3, "test": 0}
    assert first.new_sequences == ["00001", "00002"] and first.rows == _num_rows(folders[1]) > 6
    names = [Path(path).name.rpartition("_")[0] for path in list_shards(str(folders[1]), "val")]
    assert names == [f"00002_{pair}" for pair in PAIRS]
    before = content(folders[1])
    assert not any(Path(name).name.startswith(".") for name in before)

    again = run(folders)
    assert (again.todo, again.written, again.skipped, again.new_sequences) == (0, 0, 6, [])
    assert content(folders[1]) == before

    shutil.copytree(folders[0] / "00001", folders[0] / "00003")
    more = run(folders)
    assert (more.written, more.skipped, more.new_sequences) == (3, 6, ["00003"])
    assert _finished_of(content(folders[1])).items() >= _finished_of(before).items()


def _num_rows(folder):
    return sum(pq.read_metadata(path).num_rows for path in list_shards(str(folder)))


def _finished_of(files):
    return {name: digest for name, digest in files.items() if name.endswith(".parquet")}


def test_rows_have_the_documented_content(folders):
    run(folders)
    info = read_info(str(folders[1]))
    assert (info.tile_px, info.scale) == (24, 4) and info.options["align"] == "scale"
    row = decode(pq.read_table(list_shards(str(folders[1]), "val")[0]).to_pylist()[0], info)
    assert (row["sequence"], row["pair"], row["camera"]) == ("00002", PAIRS[0], "SONY ILCE-7SM2")
    assert (row["focal_lr_mm"], row["focal_hr_mm"], row["scale"], row["iso_lr"], row["iso_hr"]) == (
        50,
        240,
        4,
        100,
        100,
    )
    assert row["true_rgb"] is None and row["true_flow"] is None
    to_scene = np.array([[1.2, 0, 0], [0, 1.2, 0]])
    to_scene[:, 2] = (np.array([row["col"], row["row"]]) * 2 * 4.8) - np.array([384, 256]) * 2.4
    expected = Scene(2).view(to_scene, (192, 192)).transpose(2, 0, 1) * 255
    assert np.abs(row["hr_rgb"] - expected).mean() < 2


def test_two_runs_give_the_same_bytes(folders, tmp_path):
    options = PreprocessOptions(tile_px=24, stride_px=16, align="ecc")
    run(folders, options)
    run((folders[0], tmp_path / "again"), options)
    assert content(folders[1]) == content(tmp_path / "again")


def test_dry_run_writes_nothing(folders):
    # Small tiles: whether a large tile fits into these small frames can depend on one pixel.
    fine = PreprocessOptions(tile_px=12, stride_px=5, val=("00002",))
    report = run(folders, fine, dry_run=True)
    assert (report.pairs, report.todo, report.written) == (6, 6, 0) and not folders[1].exists()
    assert report.estimate.tiles > 0 and report.estimate.seconds is None  # no earlier run has measured a rate
    made = run(folders, fine)
    assert report.estimate.tiles == pytest.approx(made.rows, rel=0.3)
    shutil.copytree(folders[0] / "00001", folders[0] / "00003")
    again = run(folders, fine, dry_run=True)
    assert (again.todo, again.skipped) == (3, 6)
    assert again.estimate.seconds == pytest.approx(made.task_seconds / 2 / again.estimate.cpus, rel=0.3)


def test_other_options_are_rejected_naming_both_values(folders):
    run(folders)
    with pytest.raises(
        PreprocessError, match=r"expected the options of its shards, tile_px=24, got tile_px=32; use the same options"
    ):
        run(folders, PreprocessOptions(tile_px=32, stride_px=16))
    with pytest.raises(PreprocessError, match=r"scale=4, .*scale=8, "):
        run(folders, PreprocessOptions(scale=8, align="ecc", tile_px=24, stride_px=16))


@pytest.mark.parametrize(
    "wrong", [{"scale": 1}, {"scale": 4.0}, {"align": "sift"}, {"tile_px": 0}, {"stride_px": 97}, {"tile_px": True}]
)
def test_wrong_options_are_rejected_in_one_line(wrong):
    ((name, value),) = wrong.items()
    option = name.removesuffix("_px")
    with pytest.raises(PreprocessError, match=f"^--{option}: expected [^\n]+, got {value!r}$"):
        PreprocessOptions(**wrong)


def test_folders_without_sequences_are_rejected(tmp_path):
    with pytest.raises(PreprocessError, match=r"expected folders like 00001/00001.ARW .*, got none"):
        run((tmp_path / "absent", tmp_path / "shards"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PreprocessError, match=r"expected folders like 00001/00001.ARW .*, got no zoom sequence"):
        run((tmp_path / "empty", tmp_path / "shards"))
    assert not (tmp_path / "shards").exists()


def test_unwritable_shards_folder_is_an_error(folders):
    folders[1].write_text("a file where the folder should be")
    with pytest.raises(PreprocessError, match=r"expected a folder that can be (read|written), got"):
        run(folders)


def test_unusable_pairs_are_quarantined_and_the_rest_written(folders):
    raw, out = folders
    sequence = raw / "00001"
    data = (sequence / "00005.dng").read_bytes()
    (sequence / "00005.dng").write_bytes(data[: len(data) // 2])
    (sequence / "00002.JPG").write_bytes((sequence / "00002.JPG").read_bytes()[:-500])
    (sequence / "00004.dng").unlink()
    shutil.copytree(raw / "00002", raw / "00004")
    for path in (raw / "00004").iterdir():
        if path.stem != "00003":
            path.unlink()
    lone = to_8_bit(Scene(1).view(frame_to_scene(1, (64, 64)), (64, 64)))
    (raw / "00005").mkdir()
    for stem in ("00001", "00002"):
        (raw / "00005" / f"{stem}.JPG").write_bytes(jpg_bytes(lone))
        shutil.copy(sequence / "00001.dng", raw / "00005" / f"{stem}.nef")
    _remove_focal_length(raw / "00005")

    report = run(folders)
    found = reasons(report)
    assert report.written == 4 and report.pairs == 6
    assert "00005.dng: " in found.pop(("00001", PAIRS[0]))
    assert "00002.JPG: expected a readable JPG, got" in found.pop(("00001", PAIRS[1]))
    assert "expected a RAW file beside 00004.JPG, got none" in found.pop(("00001", "00004"))
    assert "at least two frames of different focal lengths, got one" in found.pop(("00004", "-"))
    for frame in ("00001", "00002"):
        assert "expected EXIF FocalLength in JPG or RAW, got none" in found.pop(("00005", frame))
    assert "expected a focal length in at least two frames, got 0 of 2" in found.pop(("00005", "-")) and not found
    notes = {path.name: json.loads(path.read_text()) for path in (out / "_quarantine").iterdir()}
    assert {(note["sequence"], note["pair"]) for note in notes.values()} == set(reasons(report))
    assert notes[f"00001_{PAIRS[0]}.json"]["reason"] == reasons(report)["00001", PAIRS[0]]

    again = run(folders)  # inputs unchanged: reported again, but not tried again
    assert (again.todo, again.skipped, reasons(again)) == (0, 4, reasons(report))

    (sequence / "00005.dng").write_bytes(data)
    shutil.rmtree(raw / "00005")
    repaired = run(folders)
    assert (repaired.todo, repaired.written) == (1, 1) and ("00001", PAIRS[0]) not in reasons(repaired)
    left = {path.name for path in (out / "_quarantine").iterdir()}
    assert f"00001_{PAIRS[0]}.json" not in left and f"00001_{PAIRS[1]}.json" in left


def _remove_focal_length(folder):
    for path in folder.glob("*.nef"):
        data = path.read_bytes()
        tag = bytes.fromhex("0a92 0500 01000000")  # FocalLength, one RATIONAL
        assert data.count(tag) == 1
        path.write_bytes(data.replace(tag, bytes.fromhex("0b92 0500 01000000")))


def test_changed_inputs_replace_the_older_shard(folders):
    run(folders)
    old = {Path(path).name for path in list_shards(str(folders[1]))}
    image = to_8_bit(Scene(1).view(frame_to_scene(1.01, (256, 384)), (256, 384)))
    (folders[0] / "00001" / "00001.JPG").write_bytes(jpg_bytes(image, 240))
    report = run(folders)
    new = {Path(path).name for path in list_shards(str(folders[1]))}
    assert (report.written, report.skipped, len(new)) == (1, 5, 6)
    (gone,), (come,) = old - new, new - old
    assert gone.rpartition("_")[0] == come.rpartition("_")[0] == f"00001_{PAIRS[0]}"


def test_pairs_that_do_not_show_the_same_thing(folders):
    """Set aside with their score; the summary counts them; --keep-unaligned tries them again and flags them."""
    image = to_8_bit(Scene(7).view(frame_to_scene(1, (256, 384)), (256, 384)))
    (folders[0] / "00001" / "00001.JPG").write_bytes(jpg_bytes(image, 240))
    report = run(folders)
    assert (report.written, report.unaligned) == (5, 0)
    assert "expected two pictures of one scene" in reasons(report)["00001", PAIRS[0]]
    kept = run(folders, replace(OPTIONS, keep_unaligned=True))
    assert (kept.todo, kept.written, kept.unaligned, kept.quarantined) == (1, 1, 1, [])
    assert (run(folders).skipped, run(folders).todo) == (6, 0)


def test_when_everything_is_set_aside_other_options_may_follow(folders, monkeypatch):
    monkeypatch.setattr("preprocessing.estimate._MARGIN_PX", 1000)  # as if the tags had promised more room
    large = PreprocessOptions(tile_px=64, stride_px=16, val=("00002",))
    report = run(folders, large)
    assert report.written == 0 and len(report.quarantined) == 6 and report.notes == []
    with pytest.raises(SchemaError, match="got none: 6 are set aside, most often because: expected a shared area of"):
        read_info(str(folders[1]))
    monkeypatch.undo()
    with pytest.raises(PreprocessError, match=r"--tile: expected at most .* got 64; use --tile 24"):
        run(folders, large)
    assert run(folders).written == 6
    with pytest.raises(PreprocessError, match="expected the options of its shards, tile_px=24"):
        run(folders, large)


def test_excluded_and_known_bad_frames_have_no_shards(folders):
    run(folders)
    shutil.copytree(folders[0] / "00001", folders[0] / "00350")
    options = PreprocessOptions(tile_px=24, stride_px=16, exclude=("00001/00005", "00002"))
    report = run(folders, options)
    names = {Path(path).name.rpartition("_")[0] for path in list_shards(str(folders[1]))}
    assert names == {f"00001_{PAIRS[1]}", f"00001_{PAIRS[2]}"}
    assert "00350/00001: excluded" in report.notes and "00001/00005: excluded" in report.notes
    assert ("00350", "-") in reasons(report)


def test_val_moves_a_sequence_permanently(folders):
    report = run(folders, PreprocessOptions(tile_px=24, stride_px=16))
    assert report.splits["val"] == 0 and any("--val 0000" in note for note in report.notes)
    before = {Path(path).name for path in list_shards(str(folders[1]))}
    moved = run(folders)
    assert moved.written == 0 and {Path(path).name for path in list_shards(str(folders[1]))} == before
    assert len(list_shards(str(folders[1]), "val")) == 3
    later = run(folders, PreprocessOptions(tile_px=24, stride_px=16))  # without --val
    assert later.splits["val"] == 3
    unknown = run(folders, PreprocessOptions(tile_px=24, stride_px=16, val=("00099",)))
    assert "--val: expected a sequence in RAW, got 00099" in unknown.notes


def test_split_folders_in_raw_are_honoured(folders):
    raw, _ = folders
    for split, name in (("train", "00002"), ("test", "00001")):
        (raw / split).mkdir()
        (raw / name).rename(raw / split / name)
    report = run(folders, PreprocessOptions(tile_px=24, stride_px=16))
    assert report.splits == {"train": 3, "val": 0, "test": 3}
    shutil.copytree(raw / "test" / "00001", raw / "train" / "00001")
    with pytest.raises(PreprocessError, match="expected one folder 00001, got test/00001 and train/00001"):
        run(folders)


def test_rows_contain_the_simulators_truth(tmp_path):
    simulate(tmp_path / "raw", sequences=1, width_px=480, preset="perfect", seed=3)
    assert run((tmp_path / "raw", tmp_path / "shards")).written == 3
    info = read_info(str(tmp_path / "shards"))
    for path in list_shards(str(tmp_path / "shards")):
        row = decode(pq.read_table(path).to_pylist()[0], info)
        assert np.abs(row["true_flow"].astype(float)).max() * 2 * 4 < 0.05  # HR pixels; the nominal map is exact here
        assert np.corrcoef(row["true_rgb"].ravel(), row["hr_rgb"].ravel())[0, 1] > 0.95
        assert row["true_near"].shape == row["true_flow"].shape and row["true_near"].max() <= 1
    (tmp_path / "raw" / "00001" / "truth" / "geometry.json").write_text("{}")
    report = run((tmp_path / "raw", tmp_path / "shards"))
    assert len(report.quarantined) == 3 and all("truth" in reason for reason in reasons(report).values())


def test_pairs_of_killed_workers_are_retried_by_the_next_run(folders, monkeypatch):
    task = shards._task

    def killed(row, source, target, options):
        if '"lr": "00006"' in row["job"] and '"sequence": "00001"' in row["job"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return task(row, source, target, options)

    monkeypatch.setattr(shards, "_task", killed)
    for todo, written in ((6, 5), (1, 0), (1, 0)):  # a kill is not the files' fault: tried again in each run
        report = run(folders)
        assert (report.todo, report.written) == (todo, written)
        ((where, reason),) = reasons(report).items()
        assert where == ("00001", PAIRS[1]) and "worker died in 3 attempts" in reason
    monkeypatch.undo()
    report = run(folders)
    assert (report.todo, report.written, report.quarantined) == (1, 1, [])
    assert not list((folders[1] / "_quarantine").iterdir())


def test_workers_without_this_package_end_the_run(folders, monkeypatch):
    def not_installed(row, source, target, options):
        import preprocessing.not_installed  # noqa: F401

    monkeypatch.setattr(shards, "_task", not_installed)
    with pytest.raises(PreprocessError, match=r"Ray workers: expected tasks to run, got .*not_installed"):
        run(folders)
    assert not list(folders[1].glob("_quarantine/*"))
