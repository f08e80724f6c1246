import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
from mlflow import MlflowClient
from ray import cloudpickle

from tuning.search import SLOT
from tuning.space import SweepError, choice, uniform
from tuning.sweep import SweepOptions, run_sweep
from tuning.tracking import PARENT_TAG, STATUS_TAG

EPOCHS = 4
SEED = 2949


@pytest.fixture(scope="module")
def slots():
    """One local Ray with trial slots and eight GPUs that do not exist, shared by all tests of this module."""
    ray.shutdown()
    fake = {"num_cpus": 2, "num_gpus": 8, "resources": {SLOT: 8.0}}
    ray.init(address="local", log_to_driver=False, _node_ip_address="127.0.0.1", **fake)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


@ray.remote(num_cpus=0)
class Elsewhere:
    """Reports from a process that is not the trial's, as a Ray Train controller does."""

    def train(self, report, level):
        for epoch in range(1, EPOCHS + 1):
            report({"epoch": epoch, "val_psnr": level + epoch, "loss": 1 / epoch})
            time.sleep(0 if level > 20 else 5)  # as long as a real epoch, so that ASHA can stop it


def train(overrides, report):
    kind, shift = overrides["kind"], overrides["model.shift"]
    with Path("processes").open("a") as file:
        file.write(f"{report.trial_id} {os.getpid()}\n")
    if kind == "raises":
        raise RuntimeError("packing kernel 4 does not divide 62\nsecond line")
    if kind == "dies":
        os._exit(1)  # like the out-of-memory killer
    if kind == "elsewhere":
        ray.get(Elsewhere.remote().train.remote(report, 30.0))
        return {"val_psnr": 30.0 + EPOCHS, "ssim": 0.9}
    if kind == "weak":
        ray.get(Elsewhere.remote().train.remote(report, 10.0))
    report({"epoch": 0, "val_psnr": 99.0})  # the untrained network, which is not a result
    for epoch in range(1, EPOCHS + 1):
        psnr = 20.0 + shift + epoch
        if kind == "diverges":
            psnr = 25.0 if epoch == 1 else float("nan")
        report({"val_psnr": psnr, "loss": 1 / epoch})
    MlflowClient(tracking_uri=overrides_uri(report)).set_tag(report.run_id, "after_the_last_epoch", "reached")
    return {"val_psnr": 20.0 + shift + EPOCHS, "ssim": 0.8}


def overrides_uri(report):
    return Path("uri").read_text()  # relative: trials keep the caller's working folder


@pytest.fixture(scope="module")
def sweep(slots, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    (folder / "uri").write_text(uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        space = {
            "kind": choice(["here", "elsewhere", "raises", "diverges", "dies", "weak"]),
            "model.shift": uniform(0, 1),
        }
        result = run_sweep(
            train,
            space,
            name="first",
            storage_path="sweeps",
            tracking_uri=uri,
            experiment_id=experiment_id(uri),
            num_trials=7,
            max_epochs=EPOCHS,
            seed=SEED,
            parent_tags={"commit": "abc"},
        )
    return result, MlflowClient(tracking_uri=uri), folder


def trials_of(sweep, kind):
    rows = [row for row in sweep[0].trials if row.overrides["kind"] == kind]
    assert rows, f"the seed no longer draws a trial of kind {kind!r}: choose another"
    return rows


def test_best_trial_is_the_one_with_the_highest_metric(sweep):
    result, client, _ = sweep
    assert result.best_score == 34.0 and result.best_overrides["kind"] == "elsewhere"
    assert len(result.trials) == 7
    parent = client.get_run(result.parent_run_id)
    assert parent.info.status == "FINISHED" and parent.data.metrics["best_val_psnr"] == 34.0
    assert parent.data.tags["commit"] == "abc"
    assert json.loads(parent.data.tags["sdan.best_overrides"]) == result.best_overrides
    best = [row for row in result.trials if client.get_run(row.run_id).data.tags["sdan.best"] == "true"]
    assert [row.run_id for row in best] == [parent.data.tags["sdan.best_run_id"]]


def test_every_trial_is_a_child_run_with_params_and_ended(sweep):
    result, client, _ = sweep
    for row in result.trials:
        run = client.get_run(row.run_id)
        assert run.data.tags[PARENT_TAG] == result.parent_run_id
        assert run.data.params == {name: str(value) for name, value in row.overrides.items()}
        assert run.info.status == ("FAILED" if row.status == "failed" else "FINISHED")


def test_no_file_of_a_sweep_holds_mlflows_address(sweep):
    """It may hold a password, and Ray Tune pickles what it is given."""
    files = [path for path in (sweep[2] / "sweeps").rglob("*") if path.is_file()]
    assert any(path.name == "tuner.pkl" for path in files)
    assert [str(path) for path in files if b"sqlite:///" in path.read_bytes()] == []


def test_metrics_of_both_processes_have_their_epochs(sweep):
    client = sweep[1]
    for row in trials_of(sweep, "here") + trials_of(sweep, "elsewhere"):
        history = client.get_metric_history(row.run_id, "loss")
        assert [entry.step for entry in history] == list(range(1, row.epochs + 1))
        assert [entry.value for entry in history] == [1 / epoch for epoch in range(1, row.epochs + 1)]


def test_trials_continue_after_their_last_report(sweep):
    client = sweep[1]
    finished = [row for row in trials_of(sweep, "here") if row.status == "finished"]
    assert finished
    for row in finished:
        run = client.get_run(row.run_id)
        assert row.epochs == EPOCHS and run.data.tags["after_the_last_epoch"] == "reached"
        assert run.data.metrics["ssim"] == 0.8  # returned, not reported


def test_a_finished_trials_process_runs_the_next_trial(sweep):
    served = [line.split() for line in (sweep[2] / "processes").read_text().splitlines()]
    finished = {row.trial_id: row.status == "finished" for row in sweep[0].trials}
    kept = [finished[trial] for trial, _ in served[:-1]]
    assert [first == second for (_, first), (_, second) in itertools.pairwise(served)] == kept
    assert True in kept and False in kept


def test_asha_stops_weak_trials_and_they_are_marked(sweep):
    client = sweep[1]
    stopped = [row for row in sweep[0].trials if row.status == "stopped"]
    assert {"here", "weak"} == {row.overrides["kind"] for row in stopped}  # in the trial's process, and elsewhere
    for row in stopped:
        assert row.epochs < EPOCHS
        run = client.get_run(row.run_id)
        assert run.data.tags[STATUS_TAG] == "stopped" and run.info.end_time is not None


def test_failed_trials_have_a_reason_and_do_not_stop_others(sweep):
    assert {row.reason for row in trials_of(sweep, "raises")} == {
        "RuntimeError: packing kernel 4 does not divide 62",
    }
    assert {row.reason for row in trials_of(sweep, "diverges")} == {
        "SweepError: report, val_psnr: expected a finite number, got nan; the trial diverged",
    }
    for row in trials_of(sweep, "dies"):
        assert row.reason.startswith("the trial's process died: ") and "died unexpectedly" in row.reason


def test_summary_is_in_the_folder_and_at_the_parent_run(sweep):
    result, client, folder = sweep
    names = {"trials.txt", "sweep.html"}
    assert result.folder == folder / "sweeps" / "first"
    assert names <= {path.name for path in result.folder.iterdir()}
    logged = client.list_artifacts(result.parent_run_id, "sweep")
    assert {Path(entry.path).name for entry in logged} == names
    assert len((result.folder / "trials.txt").read_text().splitlines()) == 8
    assert not (folder / "mlruns").exists()


@pytest.mark.parametrize("missing", ["Ray", "slot"])
def test_ray_without_a_slot_is_refused_at_once(slots, tmp_path, monkeypatch, missing):
    if missing == "Ray":
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
    else:
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(SweepError, match="expected a running Ray with the resource 'trial_slot', got") as caught:
        run_other(tmp_path, name="no-slots", experiment_id="0")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_all_trials_failed_gives_the_first_reason(slots, sweep):
    def broken(overrides, report):
        raise ValueError("no shards in data/shards")

    with pytest.raises(
        SweepError,
        match=r"expected a trial with a result, got 1 without one; the first: ValueError: no shards in data/shards",
    ):
        run_other(sweep[2], name="broken", train=broken, num_trials=1)
    (parent,) = [run for run in runs(sweep) if run.data.tags.get("mlflow.runName") == "broken"]
    assert parent.info.status == "FAILED"


def test_an_interrupted_sweep_asks_for_resume_and_is_killed(slots, sweep, monkeypatch):
    monkeypatch.setattr("tuning.sweep.search", lambda *arguments: True)  # as if it ended before its first trial
    with pytest.raises(SweepError, match="expected 2 ended trials, got 0 when interrupted; resume it"):
        run_other(sweep[2], name="cut")
    (parent,) = [run for run in runs(sweep) if run.data.tags.get("mlflow.runName") == "cut"]
    assert parent.info.status == "KILLED"


def test_resuming_a_finished_sweep_redoes_nothing(slots, sweep):
    """Here the train function reports nothing, only returns its metrics, and the metric is minimised."""
    folder = sweep[2]

    def returns(overrides, report):
        with (folder / "calls").open("a") as file:
            file.write("x")
        return {"loss": overrides["a"]}

    same = {"name": "again", "train": returns, "metric": "loss", "mode": "min"}
    first = run_other(folder, **same)
    assert first.best_score == min(row.overrides["a"] for row in first.trials)
    assert [row.epochs for row in first.trials] == [1, 1]
    assert run_other(folder, **same, resume=True) == first
    assert (folder / "calls").read_text() == "xx"
    with pytest.raises(SweepError, match=r"num_trials: expected 2 \(as at its start\), got 1"):
        run_other(folder, **same, resume=True, num_trials=1)
    with pytest.raises(SweepError, match=r"space: expected .*uniform\(0, 1\).*, got .*uniform\(0, 2\)"):
        run_other(folder, {"a": uniform(0, 2)}, **same, resume=True)
    with pytest.raises(SweepError, match="expected no sweep 'again', got an existing one"):
        run_other(folder, **same)
    more = run_other(folder, **same, resume=True, num_trials=3)
    assert (folder / "calls").read_text() == "xxx"
    assert len(more.trials) == 3 and {row.trial_id for row in first.trials} < {row.trial_id for row in more.trials}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_trials": 0}, "trials: expected at least 1, got 0"),
        ({"max_epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"max_concurrent": 0}, "concurrent trials: expected at least 1, got 0"),
        ({"mode": "highest"}, "expected 'min' or 'max'"),
        ({"name": "../elsewhere"}, "sweep name"),
        ({"name": "unknown", "resume": True}, r"expected a sweep 'unknown' to resume, got none"),
        ({"space": {}}, "got an empty dict"),
        ({"space": {"a": 1}}, "SPACE, a: expected .*, got 1"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(slots, tmp_path, changed, message):
    arguments = {"name": "s", "num_trials": 2, "space": {"a": uniform(0, 1)}, "experiment_id": "0"} | changed
    with pytest.raises(SweepError, match=message) as caught:
        run_other(tmp_path, **arguments)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_unwritable_storage_is_refused(slots, tmp_path):
    (tmp_path / "sweeps").write_text("a file where the folder should be")
    with pytest.raises(SweepError, match="sweeps/s: expected a writable folder, got"):
        run_other(tmp_path, name="s", experiment_id="0")


@pytest.mark.slow
def test_eight_trials_run_at_once_on_eight_gpus(slots, tmp_path, monkeypatch):
    """Each waits until all eight have a GPU. The plan that says eight is tested in test_plan.py."""
    monkeypatch.chdir(tmp_path)

    @ray.remote(num_gpus=1, num_cpus=0, scheduling_strategy="DEFAULT")
    def on_a_gpu(folder, trial_id):
        (folder / trial_id).touch()
        end = time.monotonic() + 240
        while len(list(folder.iterdir())) < 8 and time.monotonic() < end:
            time.sleep(0.1)
        return len(list(folder.iterdir()))

    def waits(overrides, report):
        folder = Path("started")
        folder.mkdir(exist_ok=True)
        return {"val_psnr": float(ray.get(on_a_gpu.remote(folder.resolve(), report.trial_id)))}

    result = run_other(tmp_path, name="eight", train=waits, num_trials=8, max_epochs=1, max_concurrent=8)
    assert [row.score for row in result.trials] == [8.0] * 8


@pytest.mark.slow
def test_repeats_are_trained_with_other_seeds(slots, tmp_path):
    """What they say together is tested in test_sweep_in_process.py."""

    def seeded(overrides, report):
        report({"val_psnr": overrides["kernel"] + report.repeat / 10}, {"00001/a": float(report.repeat)})

    space, options = {"kernel": choice([2, 4])}, SweepOptions(method="grid", repeats=2)
    result = run_other(tmp_path, space, name="seeds", train=seeded, max_epochs=1, options=options, max_concurrent=2)
    found = {(row.overrides["kernel"], row.repeat, row.score) for row in result.trials}
    assert found == {(2, 0, 2.0), (2, 1, 2.1), (4, 0, 4.0), (4, 1, 4.1)}
    names = {row.trial_id for row in result.trials}
    assert {f"{row.repeat_of}-r1" for row in result.trials if row.repeat} < names
    assert {path.stem for path in (result.folder / "tiles").iterdir()} == names


@pytest.mark.slow
def test_a_time_budget_keeps_what_it_has_and_goes_on(slots, tmp_path):
    """The first budget is shorter than a trial, the second ends within the sweep, the third suffices."""

    def slow(overrides, report):
        for epoch in range(1, 4):
            time.sleep(1.5)
            report({"epoch": epoch, "val_psnr": overrides["a"] + epoch})

    same = {"name": "budget", "train": slow, "num_trials": 3, "max_epochs": 3, "grace_epochs": 3}
    with pytest.raises(SweepError, match=r"expected a finished trial within 2 s, got none .*larger --time-budget"):
        run_other(tmp_path, **same, options=SweepOptions(time_budget_s=2.0))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    every = client.search_runs([client.get_experiment_by_name("sweeps").experiment_id])
    assert {run.info.status for run in every} == {"KILLED"}
    result = run_other(tmp_path, **same, resume=True, options=SweepOptions(time_budget_s=600.0))
    assert result.ended == "" and [row.status for row in result.trials] == ["finished"] * 3
    assert {run.info.run_id for run in every} <= {result.parent_run_id, *(row.run_id for row in result.trials)}


def experiment_id(uri):
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name("sweeps")
    return found.experiment_id if found else client.create_experiment("sweeps", artifact_location=artifacts_of(uri))


def artifacts_of(uri):
    return Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts").as_uri()


def run_other(folder, space=None, *, train=train, num_trials=2, max_epochs=2, **arguments):
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    if "experiment_id" not in arguments:
        arguments["experiment_id"] = experiment_id(uri)
    return run_sweep(
        train,
        {"a": uniform(0, 1)} if space is None else space,
        storage_path=folder / "sweeps",
        tracking_uri=uri,
        num_trials=num_trials,
        max_epochs=max_epochs,
        **arguments,
    )


def runs(sweep):
    experiment = sweep[1].get_experiment_by_name("sweeps")
    return sweep[1].search_runs([experiment.experiment_id])


KILLED = """
import sys, time
from pathlib import Path
import ray
from mlflow import MlflowClient
from tuning.space import uniform
from tuning.sweep import run_sweep

folder = Path(sys.argv[1])

def train(overrides, report):
    with (folder / "calls").open("a") as file:
        file.write(report.trial_id + chr(10))
    for epoch in range(1, 4):
        time.sleep(0.5)
        report({"val_psnr": overrides["a"] + epoch})

uri = f"sqlite:///{folder / 'mlflow.db'}"
resume = len(sys.argv) > 2
client = MlflowClient(tracking_uri=uri)
experiment_id = client.get_experiment_by_name("sweeps").experiment_id if resume else client.create_experiment("sweeps")
ray.init(address="local", resources={"trial_slot": 1}, log_to_driver=False, _node_ip_address="127.0.0.1")
run_sweep(train, {"a": uniform(0, 1)}, name="killed", storage_path=folder / "sweeps", num_trials=4, max_epochs=3,
          grace_epochs=3, tracking_uri=uri, experiment_id=experiment_id, resume=resume)
"""


@pytest.mark.slow
def test_a_killed_sweep_resumes_after_its_finished_trials(tmp_path):
    calls = tmp_path / "calls"
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (calls.exists() and len(calls.read_text().split()) == 3):
            assert process.poll() is None, "the sweep ended before it could be killed"
            time.sleep(0.1)
        time.sleep(0.7)  # during the third trial
    finally:
        kill_tree(process)
    before = calls.read_text().split()
    done = subprocess.run([*command, "resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    after = calls.read_text().split()
    assert after[:3] == before and set(before[:2]).isdisjoint(after[3:])  # the two finished trials were not repeated
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    every = client.search_runs([client.get_experiment_by_name("sweeps").experiment_id])
    children = [run for run in every if PARENT_TAG in run.data.tags]
    assert sum(run.data.tags[STATUS_TAG] in ("finished", "stopped") for run in children) == 4
    assert len(every) - len(children) == 1  # one parent run, reused
    for run in children:
        steps = [entry.step for entry in client.get_metric_history(run.info.run_id, "val_psnr")]
        assert len(steps) == len(set(steps)) and run.info.status in ("FINISHED", "KILLED")


def kill_tree(process):
    """Kill the process and Ray's processes below it, as a power cut would."""
    if process.poll() is None:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


@pytest.mark.slow
def test_sweep_over_a_torch_trainer(slots, tmp_path, monkeypatch):
    """As in `sdan tune`: each trial starts Ray Train, whose controller reports, and ASHA can stop it."""
    monkeypatch.chdir(tmp_path)  # trials run in the caller's working folder
    space = {"lr": choice([0.1, 0.01])}
    result = run_other(tmp_path, space, name="torch", train=torch_train, num_trials=2, max_epochs=3)
    assert {row.status for row in result.trials} <= {"finished", "stopped"}
    assert any(row.status == "finished" and row.epochs == 3 for row in result.trials)
    assert result.best_score == max(value for row in result.trials for _, value in row.history)


def torch_train(overrides, report):
    import ray.train
    from ray.train import RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchTrainer

    class Forward(UserCallback):
        def __init__(self, report):
            self.report = report

        def after_report(self, run_context, metrics, checkpoint):
            self.report(metrics[0])

    def loop(config):
        import torch

        torch.manual_seed(0)
        weight = torch.zeros(1, requires_grad=True)
        for epoch in range(1, 4):
            loss = (weight - 1).square().sum()
            loss.backward()
            weight.data -= config["lr"] * weight.grad
            weight.grad = None
            ray.train.report({"epoch": epoch, "val_psnr": -loss.item()})

    trainer = TorchTrainer(
        loop,
        train_loop_config={"lr": overrides["lr"]},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name=report.trial_id, storage_path=str(Path.cwd() / "train"), callbacks=[Forward(report)]),
    )
    trainer.fit()
    return {}
