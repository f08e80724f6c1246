"""How the options of `sdan train` are combined, and that a refused run starts nothing and writes nothing."""

import json
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.train.v2._internal.callbacks.user_callback import UserCallbackHandler
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.controller.state import RunningState
from ray.train.v2.torch.torch_trainer import TorchTrainer
from safetensors.torch import save_file

from pipelines import cluster
from pipelines import config as configs
from pipelines.retrain import fine_tuning
from pipelines.train import TrainError, _Trainer, choose, kept, train, with_network_of
from pipelines.training import run_folder
from pipelines.training.run_folder import RunFolderError, StoredRun
from preprocessing.storage import held
from sdan import checkpoint, starter_folder
from sdan.baselines import SRResNet
from sdan.network import SDAN, SDANConfig


@pytest.fixture
def data(tmp_path, tiny_shards):
    """A data folder with one unfinished run, named "cut", as left by a kill."""
    folder = tmp_path / "runs" / "cut"
    run = StoredRun(configs.to_dict(configs.smoke()), str(tiny_shards), "0" * 32, None, 1)
    run.write(folder)
    return tmp_path


def test_a_refused_run_writes_nothing(tmp_path, tiny_shards):
    with pytest.raises(ValueError, match=r"train\.crop_px.*expected tiles of at least 64"):
        train(str(tiny_shards), configs.srraw_4x(), data=tmp_path, name="a", progress=False)
    with pytest.raises(TrainError, match="--name: expected letters, digits"):
        train(str(tiny_shards), configs.smoke(), data=tmp_path, name="../a", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_trains_is_not_trained_twice(data, tiny_shards, resume, monkeypatch):
    monkeypatch.setattr(cluster, "start_ray", lambda: pytest.fail("Ray was started"))
    name = "cut" if resume else "new"
    with held(data / "runs" / name), pytest.raises(TrainError, match=f"--name {name}: expected a run that no other"):
        train(str(tiny_shards), configs.smoke(), data=data, name=name, resume=resume, progress=False)


def test_runs_of_one_second_train_in_folders_of_their_own(data, tiny_shards, monkeypatch):
    """The other command has not recorded its run yet, or records it while this one waits."""
    used = []

    def stop():
        used.append(sorted(folder.name for folder in (data / "runs").iterdir()))
        raise cluster.ClusterError("stop")

    monkeypatch.setattr(cluster, "start_ray", stop)
    monkeypatch.setattr("pipelines.train.time.strftime", lambda *_: "now")
    with held(data / "runs" / "smoke-now"), pytest.raises(cluster.ClusterError):
        train(str(tiny_shards), configs.smoke(), data=data, progress=False)
    assert used == [["cut", "smoke-now", "smoke-now-2"]]
    assert [folder.name for folder in (data / "runs").iterdir()] == ["cut"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.features": 16}, "model.features: expected 8"),
        ({"train.batch_per_worker": 1}, "train.batch_per_worker: expected 2"),
        ({"train.seed": 1}, "train.seed: expected 0"),
    ],
)
def test_a_resumed_run_may_not_change_its_crops(data, tiny_shards, changes, said):
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


def test_a_resumed_run_keeps_its_feature_network(data, tiny_shards, vgg_weights, tmp_path):
    config = configs.override(configs.smoke(), {"loss.perceptual_weight": 0.1})
    run = StoredRun(configs.to_dict(config), str(tiny_shards), "0" * 32, None, 1, features="VGG16")
    run.write(data / "runs" / "cut")
    save_file(vgg_weights, tmp_path / "vgg.safetensors")
    with pytest.raises(TrainError, match="feature network: expected VGG16, as when the run started, got VGG19"):
        train(str(tiny_shards), config, data=data, name="cut", resume=True, vgg_weights=tmp_path / "vgg.safetensors")


def test_resume_without_a_name_takes_the_newest_unfinished(data):
    assert choose(data, resume=True).name == "cut"
    older = data / "runs" / "older"
    run_folder.read_run(data / "runs" / "cut").write(older)
    os.utime(older / "run.json", (0, 0))
    assert choose(data, resume=True).name == "cut"
    assert choose(data, resume=True, name="older").name == "older"


def test_resuming_a_damaged_or_finished_run_gets_one_line(data):
    (data / "runs" / "cut" / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"run\.json: expected JSON as SDAN writes it"):
        choose(data, resume=True)
    (data / "runs" / "cut" / "model").mkdir()
    with pytest.raises(RunFolderError, match="expected an unfinished run, got none"):
        choose(data, resume=True)


def test_fine_tunings_do_not_shrink_each_other():
    base = configs.srraw_4x()
    base = replace(base, train=replace(base.train, epochs=100))
    once = fine_tuning(base)
    assert once.train.epochs == 20
    assert fine_tuning(configs.from_dict(json.loads(json.dumps(configs.to_dict(once))))) == once


def save_model(folder, features=12):
    """A checkpoint of an untrained network with `features` features."""
    torch.manual_seed(0)
    config = configs.override(configs.smoke(), {"model.features": features})
    return checkpoint.save(folder, SDAN(config.model), config=configs.to_dict(config), scores={})


def test_a_new_run_takes_config_then_set_then_seed(tmp_path):
    assert choose(tmp_path).config == configs.srraw_4x()
    assert choose(tmp_path, config="smoke").config == configs.smoke()
    changed = choose(tmp_path, config="smoke", assignments=["train.epochs=7", "train.seed=1"], seed=5)
    assert changed.config == configs.override(configs.smoke(), {"train.epochs": 7, "train.seed": 5})
    assert (changed.name, changed.init_from) == (None, None)
    assert choose(tmp_path, name="mine").name == "mine"
    assert list(tmp_path.iterdir()) == []


def test_init_takes_only_the_network_of_the_model(tmp_path):
    model = save_model(tmp_path / "m")
    choice = choose(tmp_path, config="smoke", assignments=["train.epochs=7"], seed=5, init=str(model), name="mine")
    expected = configs.override(configs.smoke(), {"train.epochs": 7, "train.seed": 5, "model.features": 12})
    assert (choice.config, choice.name, choice.init_from) == (expected, "mine", model)
    same = choose(tmp_path, config="smoke", assignments=["model.features=12"], init=str(model))
    assert same.config.model.features == 12
    starter = choose(tmp_path, init="starter")
    assert starter.init_from == starter_folder()
    curve = starter.config.model.rendering_curve  # the stored model's own
    assert starter.config.model == replace(configs.starter().model, rendering_curve=curve)
    assert starter.config.train == configs.srraw_4x().train


def test_a_resumed_run_takes_its_stored_config_then_set(data, tiny_shards):
    stored = configs.override(configs.smoke(), {"train.epochs": 9, "train.seed": 3})
    StoredRun(configs.to_dict(stored), str(tiny_shards), "0" * 32, None, 1).write(data / "runs" / "cut")
    choice = choose(data, resume=True)
    assert (choice.config, choice.name, choice.init_from) == (stored, "cut", None)
    assert choose(data, config="smoke", resume=True, name="cut").config == stored
    longer = choose(data, assignments=["train.epochs=12"], seed=4, resume=True)
    assert longer.config == configs.override(stored, {"train.epochs": 12, "train.seed": 4})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": "nosuch"}, "--config: expected one of"),
        ({"assignments": ["train.epochs"]}, "--set: expected KEY=VALUE"),
        ({"assignments": ["train.epoch=3"]}, "did you mean train.epochs"),
        ({"assignments": ["train.epochs=0"]}, "train.epochs: expected at least 1"),
        ({"seed": -1}, "train.seed: expected 0 or more"),
        ({"init": "starter", "resume": True}, "--init: expected no --init with --resume"),
        ({"init": "nosuch"}, "nosuch: expected a checkpoint folder"),
        ({"init": "models:/sdan@champion"}, "expected an MLflow database"),
        ({"init": "starter", "assignments": ["model.features=8"]}, "--set model.features: expected 48"),
        ({"config": "srraw_4x", "resume": True}, "--config: expected the run's own config smoke, got srraw_4x"),
        ({"resume": True, "name": "nosuch"}, "--resume --name nosuch: expected a run"),
    ],
)
def test_contradicting_options_get_one_line(data, options, message):
    before = sorted(data.rglob("*"))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        choose(data, **options)
    assert type(caught.value).__module__.startswith("pipelines.") and "\n" not in str(caught.value)
    assert sorted(data.rglob("*")) == before


def test_with_network_of_takes_the_network_of_a_checkpoint(tmp_path):
    smoke = configs.override(configs.smoke(), {"model.features": 12})
    model = save_model(tmp_path / "m")
    config = with_network_of(model, configs.smoke(), {"train.epochs": "3"})
    assert config.model == smoke.model and config.name == "smoke"
    with pytest.raises(configs.ConfigError, match=r"--set model\.features: expected 12.*got 8.*--init"):
        with_network_of(model, configs.smoke(), {"model.features": "8"})
    other = checkpoint.save(tmp_path / "o", SRResNet(SDANConfig(features=8, blocks=1)), config={}, scores={})
    with pytest.raises(configs.ConfigError, match="expected an SDAN"):
        with_network_of(other, configs.smoke(), {})


def test_what_is_kept_is_of_this_command(tmp_path):
    assert kept(tmp_path, None, 0.0) == kept(tmp_path, "a", 0.0) == "no run was started; run the command again"
    for name in ("a", "b"):
        StoredRun(configs.to_dict(configs.smoke()), "shards", "id", None, 1).write(tmp_path / "runs" / name)
    os.utime(tmp_path / "runs" / "a" / run_folder.RUN, (1000, 1000))
    assert kept(tmp_path, "a", 1001.0) == "no run was started; run the command again"  # an earlier command's
    assert kept(tmp_path, "a", 999.0) == "run a has no checkpoint yet; add --resume --name a to go on"
    (tmp_path / "runs" / "b" / run_folder.PROGRESS).write_text('{"epoch": 3, "epochs": 8}\n')
    expected = "run b has its checkpoint of epoch 3 of 8; add --resume --name b to go on"
    assert kept(tmp_path, None, 1001.0) == expected


@pytest.mark.parametrize(("actor", "ran_by"), [(None, "an actor of its own"), ("a1", "this process")])
def test_a_trial_needs_no_second_process_to_control_its_run(monkeypatch, actor, ran_by):
    class Controller:
        async def run(self):
            self.ran_by = "this process"

        def get_result(self):
            return self.ran_by

    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: actor))
    monkeypatch.setattr("pipelines.train.TrainController", Controller)
    monkeypatch.setattr(TorchTrainer, "_initialize_and_run_controller", lambda self, **rest: "an actor of its own")
    assert object.__new__(_Trainer)._initialize_and_run_controller() == ran_by


def test_a_stopped_trials_run_ends_with_it(monkeypatch):
    """ASHA's decision comes as SystemExit from the report, which Ray Train's controller passes on."""

    def stop(**arguments):
        raise SystemExit(0)

    class Controller(TrainController):
        def __init__(self):
            self._state = RunningState()

        async def _step(self):
            handler = UserCallbackHandler([SimpleNamespace(after_report=stop)], None)
            handler.after_report(SimpleNamespace(checkpoint=None), [])

    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: "a1"))
    monkeypatch.setattr("pipelines.train.TrainController", Controller)
    with pytest.raises(SystemExit):
        object.__new__(_Trainer)._initialize_and_run_controller()
