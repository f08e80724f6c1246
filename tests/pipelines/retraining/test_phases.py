"""A retraining that is killed in any phase leaves the champion; the next run goes on from what is finished.

The phases are the real ones; stand-ins replace preprocessing, training and scoring, which take long. A run is killed
in a forked child, by SIGKILL.
"""

import json
import math
import os
import shutil
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import config as configs
from pipelines import registry, retrain, status
from pipelines.evaluate import Evaluation
from pipelines.loader import index_split, pair_names, with_new
from pipelines.retraining import phases, report, state
from pipelines.train import TrainError, TrainResult
from pipelines.training import run_folder
from pipelines.training.run_folder import PROGRESS, RunShards, StoredRun
from preprocessing.plan import QuarantineEntry
from preprocessing.shards import PreprocessOptions, PreprocessReport
from sdan import checkpoint
from sdan.network import SDAN

CONFIG = replace(configs.smoke(), train=replace(configs.smoke().train, epochs=10))
NEW = "split=train/00006_00005-00001_0123456789abcdef.parquet"


class StandIns:
    """Stand-ins for the slow parts; `moment` names the place where the process kills itself."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.moment = folder, ""
        self.gain_db, self.start_db, self.fails = 0.3, 20.0, False
        self.damaged: list[QuarantineEntry] = []

    def at(self, moment: str) -> None:
        with (self.folder / "moments.txt").open("a") as file:
            file.write(moment + "\n")
        if moment == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def count(self, moment: str) -> int:
        path = self.folder / "moments.txt"
        return path.read_text().split("\n").count(moment) if path.exists() else 0

    def preprocess(self, raw: str, shards: str, options: object, **_: object) -> PreprocessReport:
        self.at("preprocess")
        return PreprocessReport(pairs=5, todo=len(self.damaged), quarantined=self.damaged)

    def train(self, shards, config, *, data, name, resume, init_from, seen, register, **_) -> TrainResult:
        assert register is None
        folder = run_folder.run_folder(data, name)
        assert run_folder.is_run(folder) == resume
        self.at("resumed" if resume else "started")
        if self.fails:
            raise TrainError("the training: expected to finish, got a crash")
        if not resume:
            uri = registry.default_tracking_uri(data)
            run_id = registry.create_run(uri, registry.EXPERIMENT, name)
            StoredRun(configs.to_dict(config), shards, run_id, init_from and str(init_from), 1).write(folder)
            index = with_new(index_split(shards, "train"), seen)
            RunShards(index, index_split(shards, "val")).write(folder)
        self.at("training")
        first = {"val_psnr": self.start_db, "val_bicubic_aligned_psnr": 25.0, "epoch": 0, "epochs": 2}
        best = {"val_psnr": 30.0, "val_self_aligned_psnr": 30.0, "epoch": 2, "epochs": 2}
        lines = [first | {"val_self_aligned_psnr": self.start_db}, best]
        (folder / PROGRESS).write_text("".join(json.dumps(line) + "\n" for line in lines))
        tuned = run_folder.read_run(folder).init_from is not None
        scores = {"val_psnr": 30.0, "gain": self.gain_db if tuned else 0.0}
        checkpoint.save(folder / run_folder.MODEL, SDAN(config.model), config=configs.to_dict(config), scores=scores)
        self.at("trained")
        return phases.finished_run(folder)

    def evaluate(self, index, folder: Path, **_: object) -> Evaluation:
        self.at("evaluate")
        stored = json.loads((folder / "config.json").read_text())
        gain = stored["scores"]["gain"]
        tiles = [
            {
                "method": "SDAN (self)",
                "sequence": f"{n % 4}",
                "pair": "p",
                "row": n,
                "col": 0,
                "aligned_psnr": 30 + gain,
            }
            for n in range(12)
        ]
        return Evaluation({"SDAN (self)": {}}, (), 12, 16, "val", False, 1.0, math.nan, {}, tiles=tiles)


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """DATA with an empty database, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("empty") / "data"
    registry.prepare_database(registry.default_tracking_uri(folder))
    return folder


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_shards, empty):
    """(DATA with champion 1, SHARDS) after a first retraining; made once."""
    folder = tmp_path_factory.mktemp("first")
    shutil.copytree(empty, folder / "data")
    shutil.copytree(tiny_shards, folder / "shards")
    with pytest.MonkeyPatch.context() as patch:
        stand_ins = StandIns(folder)
        put(patch, stand_ins)
        result = run(folder)
    assert result.promoted and result.reason == "the first model is the champion" and result.trained.version == "1"
    return folder


@pytest.fixture
def place(first, tmp_path, monkeypatch):
    """The stand-ins of a copy of `first` with one new pair."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("data", "shards"):
        shutil.copytree(first / name, tmp_path / name)
    old = tmp_path / "shards" / "split=train" / "00004_00005-00001_0123456789abcdef.parquet"
    shutil.copy(old, tmp_path / "shards" / NEW)
    stand_ins = StandIns(tmp_path)
    put(monkeypatch, stand_ins)
    return stand_ins


def put(patch: pytest.MonkeyPatch, stand_ins: StandIns) -> None:
    patch.setattr(retrain, "preprocess", stand_ins.preprocess)
    patch.setattr(phases, "train", stand_ins.train)
    patch.setattr(phases, "evaluate", stand_ins.evaluate)

    def watched(owner, name):
        real = getattr(owner, name)

        def call(*arguments, **named):
            stand_ins.at(f"before {name}")
            result = real(*arguments, **named)
            stand_ins.at(f"after {name}")
            return result

        patch.setattr(owner, name, call)

    for owner, name in ((registry, "register_model"), (registry, "set_champion"), (report, "log"), (state, "note")):
        watched(owner, name)


def run(folder: Path, **options):
    return retrain.retrain(
        "raw",
        str(folder / "shards"),
        data=folder / "data",
        options=PreprocessOptions(),
        config=CONFIG,
        progress=False,
        **options,
    )


def killed(place: StandIns, moment: str) -> None:
    """Run a retraining in a child that kills itself at that moment."""
    place.moment = moment
    child = os.fork()
    if not child:
        try:
            run(place.folder)
        finally:
            os._exit(7)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    place.moment = ""


def champion(folder: Path) -> str:
    """The alias, read without MLflow, whose connections must not be open when a child is forked."""
    with sqlite3.connect(folder / "data" / "mlflow.db") as database:
        return str(database.execute("SELECT version FROM registered_model_aliases").fetchone()[0])


def test_a_better_model_is_promoted_and_the_run_explains_it(place):
    result = run(place.folder)
    assert result.promoted and result.trained.version == "2" and champion(place.folder) == "2"
    assert "+0.300 dB, 95 % interval +0.300 to +0.300 (self, aligned, val, 12 tiles of 4 sequences)" in result.reason
    shards = RunShards.read(result.trained.folder)
    assert [pair_names(shards.train)[place_of] for place_of in shards.train.new] == [Path(NEW).name]
    text = result.report.read_text()
    for part in (f"- {Path(NEW).name}", "1 new, 4 that", "Replay: 50.0 %", "| aligned_psnr | 30.000 | 30.300 | +0.300"):
        assert part in text
    uri = registry.default_tracking_uri(place.folder / "data")
    client = registry.connect(uri)
    (logged, _) = client.search_runs([client.get_experiment_by_name(report.EXPERIMENT).experiment_id])
    assert logged.info.status == "FINISHED" and logged.data.tags[registry.NOTE] == result.reason
    assert logged.data.metrics["difference_low_db"] == pytest.approx(0.3) and logged.data.params["champion"] == "1"
    assert client.get_model_version("sdan", "2").tags["sdan.outcome"] == result.reason
    assert "nothing new" in run(place.folder).reason and place.count("started") == 1
    shown = str(status.status(place.folder / "data"))
    assert result.reason in shown and "0 of 5 training pairs" in shown and "lock      free" in shown
    assert registry.rollback(uri) == ("2", "1") and champion(place.folder) == "1"
    assert "sdan.rolled_back" in client.get_model_version("sdan", "2").tags
    with pytest.raises(registry.RegistryError, match="version 1 is the first"):
        registry.rollback(uri)


def test_two_retrainings_in_one_second_are_two_runs(place, monkeypatch):
    (earlier,) = (place.folder / "data" / run_folder.RUNS).iterdir()
    second = earlier.name.removeprefix("retrain-").removesuffix("Z")
    monkeypatch.setattr(retrain.time, "strftime", lambda *_: second)
    result = run(place.folder)
    assert result.promoted and place.count("started") == 1
    assert result.trained.folder.name == result.report.stem == f"{earlier.name}-2"


def test_a_worse_model_is_registered_and_not_promoted(place):
    place.gain_db = 0.04
    result = run(place.folder)
    assert not result.promoted and "below the margin of 0.05 dB" in result.reason
    assert champion(place.folder) == "1" and result.trained.version == "2" and not result.trained.champion
    place.damaged = [QuarantineEntry("00007", "00006-00002", "00006.ARW: cut")]
    assert "nothing new" in run(place.folder).reason  # RAW that cannot be used is worth a report all the same
    texts = [path.read_text() for path in (place.folder / "data" / state.FOLDER).glob("*.md")]
    assert any("- 00007 00006-00002: 00006.ARW: cut" in text and "nothing new" in text for text in texts)


@pytest.mark.slow
def test_the_margin_is_an_option(place):
    place.gain_db = 0.04
    with pytest.raises(retrain.RetrainError, match="--margin: expected 0 dB or more, got -1"):
        run(place.folder, margin_db=-1)
    assert run(place.folder, margin_db=0.03).promoted


def test_a_first_model_below_bicubic_is_not_promoted(tmp_path, tiny_shards, monkeypatch, empty):
    shutil.copytree(empty, tmp_path / "data")
    shutil.copytree(tiny_shards, tmp_path / "shards")
    place = StandIns(tmp_path)
    place.start_db = 31.0
    put(monkeypatch, place)
    result = run(tmp_path)
    assert not result.promoted and "version 1, but not the champion: it is not better than before" in result.reason
    assert registry.get_champion(registry.default_tracking_uri(tmp_path / "data")) is None


MOMENTS = [
    *("preprocess", "started", "training", "trained", "after register_model", "evaluate"),
    *("before set_champion", "after set_champion", "after log"),
]


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_in_any_phase_keeps_what_is_finished(place, moment):
    killed(place, moment)
    later = MOMENTS.index(moment) >= MOMENTS.index("after set_champion")
    assert champion(place.folder) == ("2" if later else "1")
    result = run(place.folder)
    assert result.promoted and champion(place.folder) == "2"
    trainings = place.count("started"), place.count("resumed")
    assert trainings == {"started": (2, 0), "training": (1, 1)}.get(moment, (1, 0))
    client = registry.connect(registry.default_tracking_uri(place.folder / "data"))
    assert len(client.search_model_versions("name = 'sdan'")) == 2
    assert state.all_pending(place.folder / "data") == [] and "nothing new" in run(place.folder).reason
    trained = client.search_runs([client.get_experiment_by_name(registry.EXPERIMENT).experiment_id])
    assert len(trained) == 2
    reports = client.search_runs([client.get_experiment_by_name(report.EXPERIMENT).experiment_id])
    assert [found.info.status for found in reports] == ["FINISHED"] * 2


@pytest.mark.slow
def test_a_champion_promoted_meanwhile_is_what_counts(place):
    """Between the comparison and the next run, somebody promotes another version."""
    killed(place, "before set_champion")
    uri = registry.default_tracking_uri(place.folder / "data")
    folder = place.folder / "better"
    shutil.copytree(registry.resolve_model(uri, "models:/sdan/1"), folder)
    described = json.loads((folder / "config.json").read_text())
    described["scores"]["gain"] = 0.9
    (folder / "config.json").write_text(json.dumps(described))
    better = registry.register_model(uri, registry.create_run(uri, "sdan", "other"), folder)
    registry.set_champion(uri, better)
    result = run(place.folder)
    assert not result.promoted and "-0.600 dB" in result.reason and champion(place.folder) == better
    assert (place.count("started"), place.count("resumed")) == (1, 0)


@pytest.mark.slow
def test_a_lost_data_folder_costs_no_second_training(place):
    """The registry is on a server: a version that was registered and never compared is taken up."""
    killed(place, "evaluate")
    shutil.rmtree(place.folder / "data" / state.FOLDER)
    result = run(place.folder)
    assert result.promoted and champion(place.folder) == "2" and place.count("started") == 1


@pytest.mark.slow
def test_a_training_that_always_fails_is_given_up(place):
    place.fails = True
    names = set()
    for _ in range(state.MAX_ATTEMPTS):
        with pytest.raises(TrainError):
            run(place.folder)
        names |= {left.name for left in state.all_pending(place.folder / "data")}
    assert len(names) == 1 and state.all_pending(place.folder / "data") == []
    assert "failed: the training: expected to finish" in str(status.status(place.folder / "data"))
    place.fails = False
    assert run(place.folder).promoted
