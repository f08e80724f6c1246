"""What a trial measures besides its training, without Ray: crops, cost, per-crop scores of a checkpoint."""

import json
import pickle
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from ray.train import ControllerError, UserCallback

from pipelines import cluster
from pipelines import config as configs
from pipelines.loader import index_split
from pipelines.registry import RegistryError
from pipelines.scoring.held_out import held_out
from pipelines.sweeping.trainer import Reporter, TrialTrainer, cost, register_winner, save_crops, tiles_of
from pipelines.train import TrainError
from pipelines.training.progress import SELECT_BY
from pipelines.training.run_folder import HELD_OUT
from pipelines.training.worker import TrainWorker
from sdan import checkpoint
from sdan.network import SDAN
from sdan.ops.precision import compute_plan


@pytest.fixture(scope="module")
def held(tiny_shards):
    return held_out(index_split(str(tiny_shards), "val"), configs.smoke(), limit=2, align=False)


def test_a_trials_crops_are_one_picture(held, tmp_path):
    config = configs.smoke()
    saved = checkpoint.save(tmp_path / "model", SDAN(config.model), config=configs.to_dict(config), scores={})
    save_crops(saved, held, tmp_path / "crops" / "t1.jpg")
    with Image.open(tmp_path / "crops" / "t1.jpg") as picture:
        assert picture.format == "JPEG" and picture.width > 3 * 128 and picture.height > 2 * 128


def test_the_cost_is_positive_and_grows_with_the_network(held):
    def of(blocks):
        return cost(SDAN(configs.override(configs.smoke(), {"model.blocks": blocks, "model.features": 32}).model), held)

    assert 0 < of(1) < of(24)


def test_per_crop_scores_come_from_the_checkpoint(tmp_path):
    class Saved:
        @contextmanager
        def as_directory(self):
            yield str(tmp_path)

    assert tiles_of(None) is None and tiles_of(Saved()) is None
    (tmp_path / HELD_OUT).write_text(json.dumps({"00001/a@0,0": 21.5}))
    assert tiles_of(Saved()) == {"00001/a@0,0": 21.5}


def test_train_workers_get_no_report():
    """Ray Train sends them its callbacks; a report would start a process there that nobody uses."""
    unpicklable = Reporter(lambda metrics, tiles: None)
    assert type(pickle.loads(pickle.dumps(unpicklable))) is UserCallback


def test_a_stopped_winner_cannot_be_registered(tmp_path):
    with pytest.raises(RegistryError, match=r"--register, .*: expected the model of trial t1, got none") as caught:
        register_winner(tmp_path, "sweep", "t1", "run")
    assert "\n" not in str(caught.value)


def test_the_crops_of_a_validation_average_to_its_score(tiny_shards):
    """What the worker writes beside each checkpoint, which sweeps compare trials by."""
    config, index = configs.smoke(), index_split(str(tiny_shards), "val")
    worker = TrainWorker.__new__(TrainWorker)
    worker.rank, worker.world, worker.config = 0, 1, config
    worker.job = SimpleNamespace(shards=SimpleNamespace(val=index))
    plan = compute_plan(torch.device("cpu"), "fp32", "contiguous")
    worker.training = SimpleNamespace(averaged=SDAN(config.model), plan=plan)
    scores = worker._validate()
    assert list(worker.per_crop) == list(worker.validation.names) and len(worker.per_crop) > 1
    assert scores[SELECT_BY] == pytest.approx(sum(worker.per_crop.values()) / len(worker.per_crop))


@pytest.mark.parametrize("repeat", [0, 2])
def test_a_trial_trains_its_setting_with_its_seed(tiny_shards, tmp_path, monkeypatch, repeat):
    seen = {}

    def stand_in(shards, config, **options):
        seen.update(options, config=config)
        model = checkpoint.save(tmp_path / "model", SDAN(config.model), config=configs.to_dict(config), scores={})
        return SimpleNamespace(model=model, scores={"val_psnr": 20.0, "val_self_raw_psnr": 19.0})

    monkeypatch.setattr("pipelines.sweeping.trainer.train", stand_in)
    plan = cluster.WorkerPlan(1, False, 0.5, 1, 1)
    trainer = TrialTrainer(str(tiny_shards), configs.smoke(), tmp_path, plan, "s", None, tmp_path / "crops")
    report = SimpleNamespace(trial_id="t1", run_id="run", repeat=repeat)
    scores = trainer({"model.packing_kernel": 8}, report)
    assert scores == {"val_psnr": 20.0, "val_self/raw_psnr": 19.0}
    assert (seen["config"].model.packing_kernel, seen["config"].train.seed) == (8, repeat)
    assert (seen["name"], seen["resume"], seen["plan"], seen["run_id"]) == ("s-t1", False, plan, "run")
    assert (tmp_path / "crops" / "t1.jpg").is_file()


def test_a_trial_waits_for_mlflow_and_goes_on(tmp_path, monkeypatch):
    calls = []

    def stand_in(shards, config, **options):
        calls.append(options["resume"])
        if len(calls) == 1:
            raise TrainError("run s-t1: expected to register") from RegistryError("no answer")
        if len(calls) == 2:  # of a report
            raise TrainError("run s-t1: expected to finish") from ControllerError(MlflowException("no answer"))
        return "result"

    monkeypatch.setattr("pipelines.sweeping.trainer.train", stand_in)
    monkeypatch.setattr("pipelines.sweeping.trainer._WAIT_S", 0.0)
    plan = cluster.WorkerPlan(1, False, 0.5, 1, 1)
    trainer = TrialTrainer("shards", configs.smoke(), tmp_path, plan, "s", None, tmp_path / "crops")
    report = SimpleNamespace(trial_id="t1", run_id="run", repeat=0)
    assert trainer._train(configs.smoke(), report) == "result" and len(calls) == 3

    def diverges(shards, config, **options):
        calls.append(0)
        raise TrainError("run s-t1: the loss is not finite")

    monkeypatch.setattr("pipelines.sweeping.trainer.train", diverges)
    with pytest.raises(TrainError):
        trainer._train(configs.smoke(), report)
    assert len(calls) == 4
