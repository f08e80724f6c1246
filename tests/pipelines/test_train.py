"""What training refuses, it refuses before anything has started, and leaves nothing behind."""

import json
from dataclasses import replace

import pytest
import torch

from pipelines import config as configs
from pipelines.retrain import fine_tuning
from pipelines.train import TrainError, choose, train, with_network_of
from pipelines.training import run_folder
from pipelines.training.run_folder import RunFolderError, StoredRun
from sdan import checkpoint
from sdan.baselines import SRResNet
from sdan.network import SDAN, SDANConfig


@pytest.fixture
def data(tmp_path, tiny_shards):
    """A data folder with one unfinished run, as a kill leaves it."""
    folder = tmp_path / "runs" / "cut"
    run = StoredRun(configs.to_dict(configs.smoke()), str(tiny_shards), "0" * 32, None, 1)
    run.write(folder)
    return tmp_path


def test_a_refused_run_leaves_nothing(tmp_path, tiny_shards):
    with pytest.raises(ValueError, match="train.crop_px.*expected tiles of at least 64"):
        train(str(tiny_shards), configs.srraw_4x(), data=tmp_path, name="a", progress=False)
    with pytest.raises(TrainError, match="--name: expected letters, digits"):
        train(str(tiny_shards), configs.smoke(), data=tmp_path, name="../a", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.features": 16}, "model.features: expected 8"),
        ({"train.batch_per_worker": 1}, "train.batch_per_worker: expected 2"),
        ({"train.seed": 1}, "train.seed: expected 0"),
    ],
)
def test_a_resumed_run_keeps_what_its_crops_depend_on(data, tiny_shards, changes, said):
    config = configs.override(configs.smoke(), changes)
    with pytest.raises(TrainError, match=said):
        train(str(tiny_shards), config, data=data, name="cut", resume=True, progress=False)


def test_a_range_of_workers_is_stored(tmp_path, tiny_shards):
    run = StoredRun(configs.to_dict(configs.smoke()), str(tiny_shards), "0" * 32, None, (1, 4))
    run.write(tmp_path)
    assert run_folder.read_run(tmp_path).workers == (1, 4)


def test_a_resumed_run_keeps_its_shards(data, tiny_shards, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "shards"
    elsewhere.symlink_to(tiny_shards)
    stored = json.loads((data / "runs" / "cut" / "run.json").read_text())
    (data / "runs" / "cut" / "run.json").write_text(json.dumps(stored | {"shards": "s3://bucket/shards"}))
    with pytest.raises(TrainError, match="SHARDS: expected s3://bucket/shards"):
        train(str(elsewhere), configs.smoke(), data=data, name="cut", resume=True, progress=False)


def test_the_newest_unfinished_run_is_found_and_a_damaged_one_is_said(data):
    assert choose(data, resume=True).name == "cut"
    (data / "runs" / "cut" / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"run\.json: expected a run's description"):
        choose(data, resume=True)
    (data / "runs" / "cut" / "model").mkdir()
    with pytest.raises(RunFolderError, match="expected an unfinished run, got none"):
        choose(data, resume=True)


def test_fine_tunings_do_not_shrink_one_another():
    base = configs.srraw_4x()
    base = replace(base, train=replace(base.train, epochs=100))
    once = fine_tuning(base)
    assert once.train.epochs == 20
    assert fine_tuning(configs.from_dict(json.loads(json.dumps(configs.to_dict(once))))) == once


def test_a_run_that_starts_from_a_model_has_its_network(tmp_path):
    torch.manual_seed(0)
    smoke = configs.override(configs.smoke(), {"model.features": 12})
    model = checkpoint.save(tmp_path / "m", SDAN(smoke.model), config=configs.to_dict(smoke), scores={})
    config = with_network_of(model, configs.smoke(), {"train.epochs": "3"})
    assert config.model == smoke.model and config.name == "smoke"
    with pytest.raises(configs.ConfigError, match=r"--set model.features: expected 12.*got 8.*--init"):
        with_network_of(model, configs.smoke(), {"model.features": "8"})
    other = checkpoint.save(tmp_path / "o", SRResNet(SDANConfig(features=8, blocks=1)), config={}, scores={})
    with pytest.raises(configs.ConfigError, match="expected an SDAN"):
        with_network_of(other, configs.smoke(), {})
