"""Random bytes, other encodings and other JSON in every small file of a run: one line that names the file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import config as configs
from pipelines import registry, status
from pipelines.loader import ShardsError, index_split, read_tile
from pipelines.registered import description
from pipelines.retraining import state
from pipelines.training import run_folder
from pipelines.training.progress import describe
from pipelines.training.run_folder import LIVE, PROGRESS, RUN, SHARDS, RunFolderError, RunShards, StoredRun
from preprocessing import schema
from preprocessing.report.inspect import inspect
from preprocessing.shard_folder.small_json import SmallJsonError, parse_json, read_json
from tuning import sweep

DAMAGE = {
    "empty": b"",
    "random": np.random.default_rng(0).bytes(4000),
    "utf-16": json.dumps({"time": 1.0, "epoch": 1.0, "epochs": 2}).encode("utf-16"),
    "list": b"[]",
    "number": b"7",
    "text": b'"x"',
    "null": b"null",
    "brackets": b"[" * 10**6,
    "braces": b'{"a":' * 10**6,
    "other": b'{"time": "now", "epoch": [], "scores": 3, "config": [], "workers": {}, "train": 1, "reason": null}',
    "nan": b'{"time": NaN, "epoch": NaN, "epochs": null}',
    "cut": b'{"time": 1.0, "epo',
}
damaged = pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)


def one_line(error: Exception, path: Path) -> None:
    assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 600


@pytest.fixture
def data(tmp_path):
    for name in ("good", "bad"):
        StoredRun(configs.to_dict(configs.smoke()), "/shards", "0" * 32, None, (1, 4)).write(tmp_path / "runs" / name)
    return tmp_path


@damaged
def test_a_damaged_run_does_not_hide_the_others(data, content):
    path = data / "runs" / "bad" / RUN
    path.write_bytes(content)
    found = {run.name: run for run in status.status(data).runs}
    assert found["good"].state == "running" and found["bad"].state == "damaged"
    with pytest.raises(RunFolderError) as error:
        run_folder.read_run(path.parent)
    one_line(error.value, path)
    assert str(path) in str(status.status(data))


def test_a_stored_run_is_read_back_unchanged(data):
    assert run_folder.read_run(data / "runs" / "good").workers == (1, 4)
    stored = StoredRun({"a": 1}, "/shards", "0", "init", 2, "s3://bucket/x")
    stored.write(data / "runs" / "other")
    assert run_folder.read_run(data / "runs" / "other") == stored


@damaged
def test_damaged_advisory_files_are_ignored_with_a_line(data, content):
    folder = data / "runs" / "bad"
    (folder / LIVE).write_bytes(content)
    (folder / PROGRESS).write_bytes(content)
    (data / state.PAST).write_bytes(content)
    notes: list[str] = []
    shown = describe(run_folder.live(folder, notes.append), run_folder.last_report(folder, notes.append))
    assert shown == "starting the workers"
    assert len(notes) == (1 if content == b"" else 2) and all(note.startswith("ignored: ") for note in notes)
    screen = status.status(data)
    assert {run.name: run.state for run in screen.runs} == {"good": "running", "bad": "running"}
    for name in (LIVE, state.PAST):
        assert f"ignored: {next(data.rglob(name))}: expected JSON" in str(screen)


def test_a_torn_last_line_leaves_the_reports_before_it(data):
    folder = data / "runs" / "bad"
    line = json.dumps({"time": 5.0, "epoch": 1, "epochs": 2, "val_psnr": float("nan"), "workers": 1.0})
    (folder / PROGRESS).write_text(f"{line}\n" * 20_000 + line[:30])
    notes: list[str] = []
    assert run_folder.last_report(folder, notes.append)["workers"] == 1.0 and len(notes) == 1


@damaged
def test_damaged_shard_lists_and_sweeps_get_one_line(data, content):
    path = data / "runs" / "bad" / SHARDS
    path.write_bytes(content)
    with pytest.raises(RunFolderError) as error:
        RunShards.read(path.parent)
    one_line(error.value, path)
    (data / sweep.RECORD).write_bytes(content)
    with pytest.raises(sweep.SweepError) as told:
        sweep._resume(data, None)
    one_line(told.value, data / sweep.RECORD)


@damaged
def test_a_shard_with_damaged_metadata_is_one_line(content, tmp_path):
    path = tmp_path / "a.parquet"
    with pytest.raises(schema.SchemaError) as error:
        schema.info_of(pa.schema([]).with_metadata({b"sdan": content}), str(path))
    one_line(error.value, path)


@pytest.mark.parametrize("change", [{"tile_px": 0}, {"scale": "4"}, {"scale": 10**20}, {"options": None}])
def test_metadata_with_wrong_values_is_one_line(change, tmp_path):
    described = {"schema_version": schema.SCHEMA_VERSION, "tile_px": 24, "scale": 4, "options": {}, "columns": {}}
    info = schema.info_of(pa.schema([]).with_metadata({b"sdan": json.dumps(described).encode()}), "a.parquet")
    assert (info.tile_px, info.scale, info.options) == (24, 4, {})
    stored = pa.schema([]).with_metadata({b"sdan": json.dumps(described | change).encode()})
    with pytest.raises(
        schema.SchemaError, match=f"a.parquet, metadata: expected JSON .*{next(iter(change))}.*; delete"
    ):
        schema.info_of(stored, "a.parquet")


def test_a_shard_of_another_size_is_named(tiny_shards, tmp_path):
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    other = sorted((shards / "split=train").iterdir())[1]
    table = pq.read_table(other, partitioning=None)
    place = table.schema.get_field_index("hr_rgb")
    cut = pa.array([value.as_py()[:300] for value in table["hr_rgb"]], pa.binary())
    pq.write_table(table.set_column(place, table.schema.field(place), cut), other, row_group_size=1)
    index = index_split(str(shards), "train")
    with pytest.raises(ShardsError, match=f"{other.name}: expected tiles of 24 packed px at scale 4.*; delete it"):
        read_tile(index, 1, 0)
    page = inspect(str(shards))
    assert "Damaged shards" in page and f"{other.name}: expected tiles as in the first shard" in page


@damaged
def test_a_damaged_description_is_not_registered(tmp_path, content):
    content = content.replace(b"time", b"config")
    (tmp_path / registry.DESCRIPTION).write_bytes(content)
    with pytest.raises(SmallJsonError) as error:
        description.described(tmp_path, None)
    one_line(error.value, tmp_path / registry.DESCRIPTION)


def test_large_files_are_refused_before_they_are_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(SmallJsonError, match=r"a\.json: expected at most 1000 bytes, got more"):
        read_json(tmp_path / "a.json", StoredRun, max_bytes=1000)
    with pytest.raises(SmallJsonError, match="expected at most 3 bytes"):
        parse_json(b"1234", "a.json", StoredRun, max_bytes=3)
