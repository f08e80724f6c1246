"""A run keeps the pairs that it was started with when SHARDS changes afterwards."""

import shutil
from dataclasses import replace

import pytest

from pipelines import config as configs
from pipelines.loader import CropStream, ShardsError, index_split, read_tile, require_unchanged
from pipelines.train import train
from pipelines.training import run_folder
from pipelines.training.run_folder import RunFolderError, RunShards, StoredRun


@pytest.fixture
def shards(tiny_shards, tmp_path):
    """A copy of the tiny shards that a test may change."""
    return shutil.copytree(tiny_shards, tmp_path / "shards")


def index_both(shards):
    return RunShards(index_split(str(shards), "train"), index_split(str(shards), "val"))


def add_pair(shards, split="train"):
    """Add a pair that sorts before all others, so that it would shift every index."""
    source = next((shards / f"split={split}").glob("*.parquet"))
    shutil.copy(source, source.with_name("00000_00005-00001_fedcba9876543210.parquet"))


def test_the_stored_index_is_read_back_unchanged(shards, tmp_path):
    stored = index_both(shards)
    stored.write(tmp_path)
    assert RunShards.read(tmp_path) == stored


def test_a_new_name_is_free_in_every_folder(tmp_path):
    runs, reports = tmp_path / "runs", tmp_path / "retraining"
    assert run_folder.new_name("demo-1.5", runs, reports) == "demo-1.5"
    (runs / "demo-1.5").mkdir(parents=True)
    reports.mkdir()
    (reports / "demo-1.5-2.md").touch()
    assert run_folder.new_name("demo-1.5", runs, reports) == "demo-1.5-3"
    assert run_folder.new_name("demo-1", runs, reports) == "demo-1"


def test_a_run_of_version_0_1_has_no_stored_index(tmp_path):
    """Version 0.1 wrote no shards.json."""
    assert RunShards.read(tmp_path) is None


def test_a_damaged_index_gets_one_line(tmp_path):
    (tmp_path / run_folder.SHARDS).write_text("{")
    with pytest.raises(RunFolderError, match=r"shards\.json: expected JSON as SDAN writes it.*list of shards"):
        RunShards.read(tmp_path)


def test_added_shards_do_not_change_any_crop(shards, tmp_path):
    stored = index_both(shards)
    stored.write(tmp_path)
    before = [CropStream(stored.train, 0, 16, True).crop(number)["hr_rgb"] for number in range(8)]
    add_pair(shards)
    kept = RunShards.read(tmp_path)
    require_unchanged(kept.train)
    after = [CropStream(kept.train, 0, 16, True).crop(number)["hr_rgb"] for number in range(8)]
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
    listed_again = CropStream(index_split(str(shards), "train"), 0, 16, True)
    assert any((a != listed_again.crop(number)["hr_rgb"]).any() for number, a in enumerate(before))


def test_a_missing_shard_gets_one_line(shards):
    index = index_split(str(shards), "train")
    first, second = index.paths[:2]
    shutil.copy(index.paths[2], first)
    require_unchanged(index)  # the same number of tiles
    shutil.move(second, second + ".away")
    with pytest.raises(ShardsError, match="expected the shard that this run started with, got none") as caught:
        require_unchanged(index)
    assert second in str(caught.value)


def test_reading_a_missing_shard_gets_one_line(shards):
    index = index_split(str(shards), "train")
    missing = index.paths[0].replace("00001_", "00009_")  # never opened: open files are cached
    index = replace(index, paths=(missing, *index.paths[1:]))
    with pytest.raises(ShardsError, match="expected the shard that this run started with, got none") as caught:
        read_tile(index, 0, 0)
    assert missing in str(caught.value)


def test_a_shard_with_another_tile_count_gets_one_line(shards):
    index = index_split(str(shards), "train")
    fewer = replace(index, tiles=(3, *index.tiles[1:]))
    for check in (lambda: require_unchanged(fewer), lambda: read_tile(fewer, 0, 0)):
        with pytest.raises(ShardsError, match="got 2 tiles instead of 3; put it back, or start a new run"):
            check()


def test_a_resumed_run_checks_its_shards_before_ray_starts(shards, tmp_path, monkeypatch):
    def no_ray(**options):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("pipelines.cluster.start_ray", no_ray)
    folder = run_folder.run_folder(tmp_path, "cut")
    stored = index_both(shards)
    StoredRun(configs.to_dict(configs.smoke()), str(shards), "0" * 32, None, 1).write(folder)
    stored.write(folder)
    shutil.move(stored.train.paths[0], tmp_path / "elsewhere.parquet")
    with pytest.raises(ShardsError, match="got none"):
        train(str(shards), configs.smoke(), data=tmp_path, name="cut", resume=True, progress=False)


def test_a_network_error_is_not_a_changed_shard(shards, monkeypatch):
    """Ray Train retries an OSError from the last checkpoint; a ShardsError ends the run."""

    def broken(shards, path):
        raise OSError("AWS Error NETWORK_CONNECTION")

    index = index_split(str(shards), "train")
    monkeypatch.setattr("pipelines.loader._open", broken)
    with pytest.raises(OSError, match="NETWORK_CONNECTION") as said:
        read_tile(index, 0, 0)
    assert not isinstance(said.value, ValueError)


def test_shards_that_cannot_be_listed_are_one_line(shards, monkeypatch):
    def broken(shards, split):
        raise OSError("AWS Error ACCESS_DENIED")

    index = index_split(str(shards), "train")
    monkeypatch.setattr("pipelines.loader.schema.list_shards", broken)
    with pytest.raises(ShardsError, match="expected a folder or s3:// URI of readable shards, got AWS Error"):
        require_unchanged(index)


@pytest.mark.slow
def test_shards_added_before_a_restart_change_nothing(shards, tmp_path, monkeypatch):
    """A run that ends before its model is registered and resumes with more shards gets the same weights."""

    def killed(*arguments):
        raise KeyboardInterrupt

    once = configs.override(configs.smoke(), {"train.epochs": 1})
    longer = configs.override(configs.smoke(), {"train.epochs": 2})
    arguments = {"workers": 1, "register": None, "progress": False}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pipelines.train.judge", killed)
        train(str(shards), once, data=tmp_path, name="cut", **arguments)
    assert run_folder.newest_unfinished(tmp_path) == run_folder.run_folder(tmp_path, "cut")
    add_pair(shards)
    add_pair(shards, "val")
    resumed = train(str(shards), longer, data=tmp_path, name="cut", resume=True, **arguments)
    (shards / "split=train" / "00000_00005-00001_fedcba9876543210.parquet").unlink()
    (shards / "split=val" / "00000_00005-00001_fedcba9876543210.parquet").unlink()
    unbroken = train(str(shards), longer, data=tmp_path, name="whole", **arguments)
    weights = [(result.model / "model.safetensors").read_bytes() for result in (resumed, unbroken)]
    assert weights[0] == weights[1]
    assert resumed.scores == unbroken.scores
