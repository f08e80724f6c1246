"""A sweep from its options to its page and MLflow runs, with trials that run in this process in place of Ray Tune's."""

import json
from contextlib import suppress
from dataclasses import replace
from random import Random

import pytest
from mlflow import MlflowClient

from tuning import sweep as sweeping
from tuning.folder import LIVE, Live, read_json
from tuning.search import Proposals
from tuning.space import SweepError, choice, uniform
from tuning.sweep import SweepOptions, run_sweep
from tuning.tracking import TrialKey, open_child
from tuning.trial import run_trial


class InProcess:
    """Stands in for Ray Tune: runs trials one after the other; `most` of them before its time is up."""

    def __init__(self, train):
        self.train, self.most, self.proposals, self.started, self.cut = train, 1000, None, [], None

    def make_trial(self, train, run, working_folder, folder):
        return run, folder

    def search(self, trial, space, run, plan, folder, constraint):
        self.proposals = self.proposals or Proposals(space, run, plan, folder, constraint)
        while len(self.started) < plan.num_trials:
            trial_id = f"t{len(self.started)}"
            values = self.cut or self.proposals.suggest(trial_id)
            if values == "FINISHED":
                break
            self.cut = values if len(self.started) >= self.most else None
            if self.cut:  # the time is up during this trial
                open_child(run, TrialKey(trial_id), values)
                return False
            self.started.append(trial_id)
            self._run(run, folder, TrialKey(trial_id), values)
            self.proposals.on_trial_complete(trial_id, {run.metric: 1.0})
        return True

    def repeat(self, trial, missing, run, max_concurrent, folder):
        for of, number, overrides in missing:
            self._run(run, folder, TrialKey(f"{of}-r{number}", number, of), overrides)
        return True

    def _run(self, run, folder, key, overrides):
        with suppress(RuntimeError):  # recorded, as in Ray Tune
            run_trial(self.train, run, folder, key, dict(overrides))


QUALITY = {2: -3.0, 4: 0.0, 8: -1.0, 16: -4.0}


def known(overrides, report):
    """Best at kernel 4, by 1 dB over 8. Scenes differ by more than that; seeds and tiles add a known noise."""
    kernel = overrides["kernel"]
    if kernel == 32:
        raise RuntimeError("out of memory")
    random = Random(f"{report.repeat} {kernel}")
    quality = QUALITY[kernel] + random.gauss(0, 0.02)
    tiles = {
        f"{scene:05}/p@{n},0": 25 + scene + quality + random.gauss(0, 0.05) for scene in range(8) for n in range(4)
    }
    for epoch in (1, 2):
        report({"epoch": epoch, "val_psnr": sum(tiles.values()) / len(tiles) - 2 + epoch}, tiles)
    return {"ms_per_megapixel": 100.0 / kernel}


def equal(overrides, report):
    random = Random(f"{report.repeat} {overrides['kernel']}")
    tiles = {f"{scene:05}/p@0,0": 25 + scene + random.gauss(0, 0.05) for scene in range(8)}
    report({"val_psnr": sum(tiles.values()) / len(tiles)}, tiles)


class Counted:
    """A method that counts its calls."""

    def __init__(self, method):
        self.method, self.calls = method, 0

    def __get__(self, instance, owner):
        def call(*arguments, **options):
            self.calls += 1
            return self.method(instance, *arguments, **options)

        return call


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    return uri, MlflowClient(tracking_uri=uri)


@pytest.fixture
def sweep(database, tmp_path, monkeypatch):
    """Start or resume a sweep in `tmp_path`; `sweep.stand_in` is the InProcess."""
    uri, client = database
    experiment = client.create_experiment(tmp_path.name, artifact_location=(tmp_path / "artifacts").as_uri())
    monkeypatch.setattr("tuning.trial.tune.report", lambda result: None)
    monkeypatch.setattr(sweeping, "require_slots", lambda: None)

    def start(train, space, *, num_trials=10, resume=False, **options):
        stand_in = start.stand_in if resume else InProcess(train)
        start.stand_in = stand_in
        for name in ("make_trial", "search", "repeat"):
            monkeypatch.setattr(sweeping, name, getattr(stand_in, name))
        stand_in.most = options.pop("most", 1000)
        return run_sweep(
            train, space, name="s", storage_path=tmp_path, tracking_uri=uri, experiment_id=experiment,
            num_trials=num_trials, max_epochs=2, resume=resume, options=SweepOptions(**options),
        )  # fmt: skip

    start.runs = lambda: client.search_runs([experiment])
    return start


KERNELS = {"kernel": choice([2, 4, 8, 16, 32])}


def test_a_known_optimum_gives_the_right_sentence(sweep):
    result = sweep(
        known, KERNELS, method="grid", default={"kernel": 16}, repeats=2, command=lambda values: f"train {values}"
    )
    first, second = result.verdict.sentences
    assert first.startswith(("kernel=4 is better than 8 by 0.9", "kernel=4 is better than 8 by 1.0"))
    assert ", 2 seeds, 8 sequences)." in first and second.startswith("The best is better than the default setting by ")
    assert result.chosen.overrides == {"kernel": 4} and result.ended == ""
    assert sorted(row.overrides["kernel"] for row in result.trials if row.repeat) == [2, 4, 8, 16]
    assert [row.reason for row in result.trials if row.status == "failed"] == ["RuntimeError: out of memory"]
    page = (result.folder / "sweep.html").read_text()
    assert first in page and "RuntimeError: out of memory" in page and "train {&#39;kernel&#39;: 4}" in page
    assert read_json(result.folder / LIVE, Live).done


def test_mlflow_has_the_sentence_scores_to_sort_by_and_ends(sweep):
    result = sweep(known, KERNELS, method="grid", repeats=2, command=lambda values: "train it")
    runs = {run.info.run_id: run for run in sweep.runs()}
    parent = runs.pop(result.parent_run_id)
    assert parent.data.tags["mlflow.note.content"] == f"{result.verdict}\n\n`train it`"
    assert "RUNNING" not in {run.info.status for run in [parent, *runs.values()]}
    scored = [row for row in result.trials if row.score is not None]
    assert all(runs[row.run_id].data.metrics["best_val_psnr"] == row.score for row in scored)
    assert len(runs) == 5 + 3


def test_a_resume_writes_to_no_trial_that_has_ended(sweep, monkeypatch):
    result = sweep(known, KERNELS, method="grid")
    calls = []
    monkeypatch.setattr(MlflowClient, "log_batch", lambda self, run_id, **rest: calls.append(run_id))
    monkeypatch.setattr(MlflowClient, "get_metric_history", counted := Counted(MlflowClient.get_metric_history))
    again = sweep(known, KERNELS, method="grid", resume=True)
    assert again == result and calls == [] and counted.calls == len(result.trials)


def test_only_the_best_trials_histories_are_read(sweep, monkeypatch):
    """Of a large sweep; score and last epoch of the others come with the list of runs."""
    whole = sweep(known, KERNELS, method="grid")
    monkeypatch.setattr("tuning.tracking.MOST_HISTORIES", 2)
    monkeypatch.setattr(MlflowClient, "get_metric_history", counted := Counted(MlflowClient.get_metric_history))
    part = sweep(known, KERNELS, method="grid", resume=True)
    assert [len(row.history) for row in part.trials] == [2, 2, 0, 0, 0]
    assert [replace(row, history=()) for row in part.trials] == [replace(row, history=()) for row in whole.trials]
    assert counted.calls == 3  # of the best two, and of the failed one, which has no score


def test_equal_trials_are_not_told_apart(sweep):
    result = sweep(equal, {"kernel": choice([2, 4, 8, 16])}, method="grid", repeats=2)
    assert result.verdict.sentences[0].startswith(
        "The trials cannot be told apart: no difference larger than the noise"
    )


def test_without_tiles_nothing_is_claimed(sweep):
    result = sweep(lambda overrides, report: {"val_psnr": overrides["a"]}, {"a": uniform(0, 1)}, num_trials=2)
    assert str(result.verdict).startswith("Nothing to compare") and result.chosen == result.trials[0]


def test_several_objectives_reach_the_page(sweep):
    result = sweep(known, {"kernel": choice([2, 4, 8, 16])}, also={"ms_per_megapixel": "min"})
    assert {row.values["ms_per_megapixel"] for row in result.trials} == {50.0, 25.0, 12.5, 6.25}
    assert "Pareto front" in (result.folder / "sweep.html").read_text()


def test_what_cannot_be_built_is_counted_not_started(sweep):
    result = sweep(known, KERNELS, constraint=lambda v: "8 does not divide 12" if v["kernel"] == 8 else None)
    assert sorted(row.overrides["kernel"] for row in result.trials) == [2, 4, 16, 32]
    assert "never started: 8 does not divide 12" in (result.folder / "sweep.html").read_text()


def test_a_spent_time_budget_keeps_what_there_is(sweep):
    space = {"kernel": choice([2, 4, 8, 16])}
    with pytest.raises(SweepError, match=r"expected a finished trial within 90 s, got none .*larger --time-budget"):
        sweep(known, space, time_budget_s=90.0, most=0)
    assert {run.info.status for run in sweep.runs()} == {"KILLED"}
    part = sweep(known, space, resume=True, time_budget_s=90.0, most=2)
    assert part.ended == "the time budget of 90 s is spent; --resume goes on"
    assert [row.status for row in part.trials].count("finished") == 2
    assert part.ended in (part.folder / "sweep.html").read_text() and not read_json(part.folder / LIVE, Live).done
    whole = sweep(known, space, resume=True, time_budget_s=9000.0)
    assert whole.ended == "" and [row.status for row in whole.trials] == ["finished"] * 4


def test_trials_and_repeats_may_be_raised_by_a_resume(sweep):
    space = {"kernel": choice([2, 4, 8, 16])}
    assert len(sweep(known, space, num_trials=2).trials) == 2
    more = sweep(known, space, num_trials=4, repeats=2, resume=True)
    assert len([row for row in more.trials if not row.repeat]) == 4 and len(more.trials) == 7
    record = json.loads((more.folder / "sweep.json").read_text())
    assert (record["num_trials"], record["repeats"]) == (4, 2)
    with pytest.raises(SweepError, match=r"repeats: expected 2 \(as at its start\), got 1"):
        sweep(known, space, num_trials=4, resume=True)


def test_tiles_are_those_of_the_best_epoch(sweep):
    def falls(overrides, report):
        for epoch, score in ((1, 5.0), (2, 4.0)):
            report({"epoch": epoch, "val_psnr": score}, {"00001/a": score, "00001/b": float("nan")})

    result = sweep(falls, {"a": uniform(0, 1)}, num_trials=1)
    kept = json.loads((result.folder / "tiles" / "t0.json").read_text())
    assert (kept["score"], kept["tiles"]["00001/a"], result.best_score) == (5.0, 5.0, 5.0)


def test_a_finished_trial_that_runs_again_is_replayed(sweep):
    result = sweep(known, {"kernel": choice([4])}, num_trials=1)
    before = {run.info.run_id: run.data.metrics for run in sweep.runs()}
    stand_in = sweep.stand_in
    stand_in.started.clear()
    stand_in.proposals = None
    again = sweep(known, {"kernel": choice([4])}, num_trials=1, resume=True)
    assert again == result and before == {run.info.run_id: run.data.metrics for run in sweep.runs()}
