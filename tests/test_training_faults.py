"""Training resumes from the last checkpoint, as one run, after a worker, a machine or the driver is killed. It does not
restart after an error that would occur again."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import boto3
import psutil
import pytest
import ray
from mlflow.tracking import MlflowClient
from ray.cluster_utils import Cluster
from ray.train import UserCallback

from pipelines import cluster, registry
from pipelines import config as configs
from pipelines import train as training
from pipelines.train import TrainError, train
from pipelines.training import progress, run_folder
from sdan.checkpoint import WEIGHTS

pytestmark = pytest.mark.slow
SDAN = str(Path(sys.executable).with_name("sdan"))
SETTINGS = {"train.epochs": 10, "train.crops_per_epoch": 16, "train.learning_rate": 3e-3, "train.ema_decay": 0.9}
CONFIG = configs.override(configs.smoke(), SETTINGS)
NOISE_DB = 0.5
"""Largest difference between runs that see the same crops, but sum in another order or take larger steps."""


def reports(folder):
    """The lines of progress.jsonl, one dict per validation."""
    return [json.loads(line) for line in (folder / run_folder.PROGRESS).read_text().splitlines()]


def scores(folder):
    """epoch -> reported self PSNR; each epoch was reported once."""
    found = reports(folder)
    assert max(Counter(line["epoch"] for line in found).values()) == 1
    return {line["epoch"]: line[progress.SELECT_BY] for line in found}


def assert_one_run(data, run_id, epochs):
    """Check that MLflow has one run, with one point per epoch of every metric."""
    client = MlflowClient(registry.default_tracking_uri(data))
    (run,) = client.search_runs([client.get_experiment_by_name("sdan").experiment_id])
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    for name in run.data.metrics:
        if not name.startswith("system/"):
            steps = [point.step for point in client.get_metric_history(run_id, name)]
            assert len(steps) == len(set(steps)), name
    assert {point.step for point in client.get_metric_history(run_id, "main/train_loss")} == set(range(1, epochs + 1))


class At:
    """Call `strike` when the run has reported an epoch of `moments` and a random part of the next one has passed."""

    def __init__(self, folder, moments, strike):
        self.folder, self.moments, self.strike = folder, moments, strike
        self.struck = []
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.thread.join(1)

    def _watch(self):
        for moment in self.moments:
            while run_folder.last_report(self.folder).get("epoch", -1) < moment:
                time.sleep(0.05)
            time.sleep(random.Random(moment).random())
            self.struck.append((run_folder.last_report(self.folder)["epoch"], self.strike()))


def kill_a_train_worker():
    """Send SIGKILL to one of the Ray Train workers that this process started."""
    found = [
        child for child in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(child.cmdline())
    ]
    victim = random.Random(len(found)).choice(found)
    os.kill(victim.pid, signal.SIGKILL)
    return victim.pid


@pytest.fixture(scope="module")
def undisturbed_run(tiny_shards, tmp_path_factory):
    """The folder of an uninterrupted run with one worker."""
    data = tmp_path_factory.mktemp("undisturbed")
    cluster.start_ray()
    train(str(tiny_shards), CONFIG, data=data, workers=1, name="run", progress=False)
    return data / "runs" / "run"


@pytest.fixture(scope="module")
def undisturbed(undisturbed_run):
    """The scores of that run."""
    return scores(undisturbed_run)


def weights(folder):
    """The bytes of the weights of a run's model."""
    return (folder / "model" / WEIGHTS).read_bytes()


def test_a_killed_worker_does_not_change_the_scores(tiny_shards, tmp_path, undisturbed):
    folder = tmp_path / "runs" / "run"
    cluster.start_ray()
    with At(folder, [4], kill_a_train_worker) as kills:
        result = train(str(tiny_shards), CONFIG, data=tmp_path, workers=1, name="run", progress=False)
    assert len(kills.struck) == 1
    assert scores(folder) == undisturbed  # bit-exact with one CPU worker
    assert_one_run(tmp_path, result.run_id, 10)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.learning_rate": 1e30, "train.grad_clip": 0.0}, r"NotFiniteError: .*NaN or infinity.* lower train"),
        (
            {"loss.self_target": "truth", "loss.self_reference_weight": 1.0},
            r"ShardsError: .* expected a simulated shard",
        ),
    ],
)
def test_a_permanent_error_is_not_retried(tmp_path, tiny_shards, shards_without_truth, changes, said):
    shards = shards_without_truth if "loss.self_target" in changes else str(tiny_shards)
    cluster.start_ray()
    config = configs.override(CONFIG, changes)
    with pytest.raises(TrainError, match=said):
        train(
            shards,
            config,
            data=tmp_path,
            workers=1,
            name="run",
            progress=False,
            callbacks=[attempts(tmp_path / "attempts")],
        )
    assert len((tmp_path / "attempts").read_text().splitlines()) == 1
    client = MlflowClient(registry.default_tracking_uri(tmp_path))
    (run,) = client.search_runs([client.get_experiment_by_name("sdan").experiment_id])
    assert run.info.status == "FAILED"


def attempts(path):
    """A callback that writes one line per failure of the workers."""

    class Attempts(UserCallback):  # defined here, so that Ray pickles it by value
        def after_exception(self, run_context, worker_exceptions):
            with path.open("a") as file:
                file.write(f"{sorted(map(str, map(type, worker_exceptions.values())))}\n")

    return Attempts()


@pytest.fixture
def two_machines(monkeypatch):
    """A Ray cluster of two one-CPU nodes on this machine; yields (cluster, the second node)."""
    ray.shutdown()
    nodes = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": False,
            "_system_config": {
                "health_check_period_ms": 500,
                "health_check_failure_threshold": 4,
                "idle_worker_killing_time_threshold_ms": 60_000,  # as start_ray sets it
            },
        },
    )
    second = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    yield nodes, second
    ray.shutdown()
    nodes.shutdown()


@pytest.mark.timeout(590)
def test_a_run_shrinks_to_one_worker_and_grows_again(two_machines, tiny_shards, tmp_path, undisturbed, monkeypatch):
    """The second machine's raylet is killed, the first continues alone, and a new machine joins."""
    nodes, second = two_machines
    monkeypatch.setattr(training, "RESIZE_CHECK_S", 3.0)
    monkeypatch.setattr(training, "ELASTIC_START_S", 4.0)
    folder = tmp_path / "runs" / "run"
    config = configs.override(CONFIG, {"train.epochs": 30})

    def lose_a_machine():
        os.kill(second.all_processes["raylet"][0].process.pid, signal.SIGKILL)

    started = []

    def come_back():  # not Cluster.add_node: it sets signal handlers, which only the main thread may do
        command = [str(Path(SDAN).with_name("ray")), "start", "--address", nodes.address, "--num-cpus", "1", "--block"]
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    try:
        with At(folder, [2], lose_a_machine), Sized(folder, 1, come_back):
            result = train(str(tiny_shards), config, data=tmp_path, workers=(1, 2), name="run", progress=False)
    finally:
        for node in started:
            node.terminate()
            node.wait()
    lines = reports(folder)
    sizes = [line["workers"] for line in lines]
    changes = [size for number, size in enumerate(sizes) if number == 0 or size != sizes[number - 1]]
    assert changes[:3] == [2, 1, 2], changes
    assert [line["epoch"] for line in lines] == list(range(31))
    assert scores(folder)[10] == pytest.approx(undisturbed[10], abs=NOISE_DB)
    assert_one_run(tmp_path, result.run_id, 30)


class Sized(At):
    """Call `strike` when an epoch with `workers` workers has been reported."""

    def __init__(self, folder, workers, strike):
        super().__init__(folder, [], strike)
        self.workers = workers

    def _watch(self):
        while run_folder.last_report(self.folder).get("workers") != self.workers:
            time.sleep(0.05)
        self.strike()


@pytest.fixture
def s3(monkeypatch):
    """An S3 server on this machine with the bucket `zoom`, named in the environment."""
    server = shutil.which("moto_server", path=str(Path(sys.executable).parent))
    assert server, "moto[server] is a development dependency: make setup"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (names | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}).items():
        monkeypatch.setenv(name, value)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    moto = subprocess.Popen([server, "-H", "127.0.0.1", "-p", str(port)], **quiet)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        client = boto3.client("s3")
        client.create_bucket(Bucket="zoom")
        yield client
    finally:
        moto.terminate()
        moto.wait()


def test_a_killed_driver_resumes_from_s3_as_one_run(s3, tiny_shards, tmp_path, undisturbed, undisturbed_run):
    """The checkpoints are in a bucket, as on a cluster. A run that keeps them in its folder has fewer parts."""
    settings = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    base = [SDAN, "--data", str(tmp_path), "train", str(tiny_shards), "--config", "smoke", *settings, "--workers", "1"]
    environment = {**os.environ, "RAY_ADDRESS": "", "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "runs" / "run"
    driver = subprocess.Popen(
        [*base, "--name", "run", "--storage", "s3://zoom/runs"], env=environment, start_new_session=True
    )
    with At(folder, [4], lambda: os.killpg(driver.pid, signal.SIGKILL)) as kills:
        driver.wait(timeout=300)
    assert driver.returncode == -signal.SIGKILL and len(kills.struck) == 1
    stored = [entry["Key"] for entry in s3.list_objects_v2(Bucket="zoom")["Contents"]]
    assert any(key.startswith("runs/run/") and key.endswith("trainer.pt") for key in stored)
    assert not list(folder.glob("checkpoint*"))
    subprocess.run([*base, "--name", "run", "--resume"], check=True, env=environment, timeout=300)
    found = reports(folder)
    # The controller writes the line before it records the checkpoint, so a kill between the two repeats the line.
    assert all(line[progress.SELECT_BY] == undisturbed[line["epoch"]] for line in found)
    assert len(found) <= 11 + 1
    assert weights(folder) == weights(undisturbed_run)
    client = MlflowClient(registry.default_tracking_uri(tmp_path))
    (run,) = client.search_runs([client.get_experiment_by_name("sdan").experiment_id])
    assert_one_run(tmp_path, run.info.run_id, 10)
