"""A whole cluster on two hosts of one machine: `ray up cluster-local.yaml`, then preprocessing, training on both hosts,
evaluation and zoom as jobs, with RAW, shards and checkpoints on S3 and token authentication. A host is powered off in
the middle of preprocessing and of training.

Made for this: the values marked CHANGE, and the hosts' Python, a virtual environment that sees the tested packages.
Everything else is what a user runs. The tests share one cluster and run in this order.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import bucket
import pytest
from conftest import phase
from lab import BUNDLE, DESK_IP, ROOT, LabError, wait_for

from sdan import checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]
WAIT_S = 1200.0
"""For what takes a minute alone on two cores."""
RAY = f"export RAY_AUTH_MODE=token RAY_UP_enable_autoscaler_v2=0 PATH={Path(sys.executable).parent}:$PATH; ray"
S3 = f"AWS_ENDPOINT_URL=http://{DESK_IP}:{bucket.PORT} {sys.executable} {Path(bucket.__file__)}"
URI = f"s3://{bucket.NAME}"
ADDRESS = "http://127.0.0.1:8265"
HELD_OUT = "00003"
CROPS = 48
"""Of an epoch."""


def configured(lab):
    """cluster-local.yaml with the values marked CHANGE."""
    text = (ROOT / "cluster-local.yaml").read_text()
    for old, new in {
        "https://example.org/sdan.git": f"{BUNDLE}/sdan.git",
        "SDAN_COMMIT=" + "0" * 40: f"SDAN_COMMIT={lab.commit}",
        "s3://BUCKET": URI,
        "# AWS_ENDPOINT_URL=http://192.168.1.9:9000": f"AWS_ENDPOINT_URL=http://{DESK_IP}:{bucket.PORT}",
        "head_ip: 192.168.1.10": f"head_ip: {lab.head.ip}",
        "[192.168.1.11]": f"[{lab.worker.ip}]",
        "ssh_user: sdan": "ssh_user: root",
    }.items():
        assert text.count(old) == 1, f"cluster-local.yaml: {old} occurs {text.count(old)} times"
        text = text.replace(old, new)
    return text


ALIVE = """
import json, pathlib, urllib.request
token = (pathlib.Path.home() / ".ray" / "auth_token").read_text().strip()
ask = urllib.request.Request("http://127.0.0.1:8265/nodes?view=summary", headers={"Authorization": f"Bearer {token}"})
nodes = json.load(urllib.request.urlopen(ask, timeout=10))["data"]["summary"]
print(*(node["ip"] for node in nodes if node["raylet"].get("state") == "ALIVE"))
"""


def alive(lab):
    """The addresses of the nodes that Ray has, by the dashboard's API; [] while that does not answer."""
    try:
        return sorted(lab.head.run(f"{sys.executable} -c {shlex.quote(ALIVE)}").split())
    except LabError:
        return []


def submitted(command):
    """The command line, at the desk, that runs an sdan command as a job."""
    job = f"cd ~/sdan && ~/venv/bin/sdan --data ~/data {command}"
    return f"{RAY} job submit --address {ADDRESS} -- bash -lc '{job}'"


def keys(lab, prefix):
    """The keys in the bucket below a prefix."""
    return lab.desk.run(f"{S3} list {prefix}").split()


def shard_bytes(lab, prefix):
    """The shards below a prefix: {name: bytes}."""
    folder = lab.desk.home / prefix
    lab.desk.run(f"{S3} get {prefix} {prefix}", timeout=WAIT_S)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def progress(lab, name):
    """The lines of a run's progress.jsonl."""
    path = lab.head.home / "data" / "runs" / name / "progress.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def started(lab, command, log):
    """Submit an sdan command as a job, its output in a file of the desk. Returns the process that follows the job."""
    return lab.desk.serve(f"bash -c {shlex.quote(submitted(command))}", log.name)


def during(lab, command, begun, act):
    """Run a job, call `act` once `begun(its output)` is true, and wait for the job's end.

    Returns:
        The job's output.
    """
    log = lab.desk.folder / f"{command.split()[0]}-{len(list(lab.desk.folder.iterdir()))}.txt"
    job = started(lab, command, log)
    wait_for(lambda: begun(log.read_text()) or job.poll() is not None, WAIT_S, f"{command}: its middle")
    assert job.poll() is None, log.read_text()[-3000:]
    act()
    assert job.wait(WAIT_S) == 0, log.read_text()[-3000:]
    return log.read_text()


def train_workers(lab):
    """The number of processes of Ray Train's workers on each host."""
    return [sum("ray::RayTrainWorker" in line for line in host.processes()) for host in (lab.head, lab.worker)]


def crops_seen(lab, name):
    """The position in the stream of crops of a run's newest checkpoint in the bucket."""
    prefix = f"runs/{name}"
    lab.desk.run(f"{S3} get {prefix} {prefix}", timeout=WAIT_S)
    newest = max((lab.desk.home / prefix).glob("checkpoint_*/"))
    return checkpoint.load_trainer_state(newest)["crops"]


def back(lab):
    """Power the worker on; the head's autoscaler must start Ray there."""
    lab.power_on(lab.worker)
    wait_for(lambda: alive(lab) == [lab.head.ip, lab.worker.ip], WAIT_S, "the worker's return")


@pytest.fixture(scope="module")
def cluster(lab):
    """Both hosts as a cluster, with a bucket that holds RAW, MLflow's server, and the tunnel of the job API."""
    lab.desk.serve(f"{sys.executable} {Path(bucket.__file__)} serve {DESK_IP} {bucket.PORT}", "moto.txt")
    for host in (lab.desk, lab.head, lab.worker):
        (host.home / ".aws").mkdir()
        (host.home / ".aws" / "credentials").write_text(bucket.CREDENTIALS)
    (lab.desk.home / "cluster-local.yaml").write_text(configured(lab))
    lab.desk.run(f"{RAY} get-auth-token --generate")
    with phase("ray up: the head"):
        lab.desk.run(f"{RAY} up -y --no-config-cache cluster-local.yaml", timeout=WAIT_S)
    with phase("ray up: the worker, after that"):
        wait_for(lambda: len(alive(lab)) == 2, WAIT_S, "the second node")
    lab.head.serve("bash -c 'set -a; . ~/sdan.env; ~/sdan/deploy/mlflow.sh'", "mlflow.txt")
    lab.desk.serve(f"bash -c '{RAY} dashboard cluster-local.yaml'", "tunnel.txt")
    sdan = f"PATH={Path(sys.executable).parent}:$PATH sdan"
    lab.desk.run(f"{sdan} simulate raw --sequences 3 --width 512 --preset tripod --seed 1", timeout=WAIT_S)
    lab.desk.run(f"mkdir photos && cp raw/{HELD_OUT}/0000[1-3].dng photos")
    lab.desk.run(f"{S3} create && {S3} put raw raw && {S3} put photos photos", timeout=WAIT_S)
    wait_for(lambda: lab.head.answers(f"http://{lab.head.ip}:5000/health"), WAIT_S, "MLflow's server")
    return lab


@pytest.fixture(scope="module")
def shards(cluster):
    """SHARDS that no one disturbed."""
    with phase("preprocess, undisturbed"):
        cluster.desk.run(submitted(f"preprocess {URI}/raw {URI}/shards --tile 32 --val {HELD_OUT}"), timeout=WAIT_S)
    return shard_bytes(cluster, "shards")


def test_requests_without_the_token_are_refused(cluster):
    with pytest.raises(LabError, match=r"401|nauthori"):
        cluster.desk.run(f"{RAY} job list --address {ADDRESS}".replace("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"))
    cluster.desk.run(f"{RAY} job list --address {ADDRESS}")


def test_nodes_run_the_commit_of_the_config(cluster):
    for host in (cluster.head, cluster.worker):
        assert host.run("git -C ~/sdan rev-parse HEAD").strip() == cluster.commit
        assert host.run("cd / && ~/venv/bin/python -c 'import sdan; print(sdan.__file__)'").startswith(str(Path.home()))


@pytest.fixture(scope="module")
def trained(cluster, shards):
    """The options of a training with a worker on each host that no one disturbed, and that came to its end."""
    command = f"train {URI}/shards --config smoke --set train.crops_per_epoch={CROPS} --storage {URI}/runs"
    with phase("train on both hosts, undisturbed: 4 epochs"):
        during(
            cluster,
            f"{command} --epochs 4 --workers 2 --name whole",
            lambda _: train_workers(cluster) == [1, 1],
            lambda: None,
        )
    return command


def test_training_runs_on_both_hosts_to_its_end(cluster, trained):
    lines = progress(cluster, "whole")
    assert [(line["epoch"], line["workers"]) for line in lines] == [(epoch, 2) for epoch in range(5)]
    assert crops_seen(cluster, "whole") == 4 * CROPS


def test_evaluation_and_zoom_run_as_jobs(cluster, trained):
    model = "--model ~/data/runs/whole/model"
    with phase("evaluate"):
        assert "bicubic" in cluster.desk.run(submitted(f"evaluate {URI}/shards {model}"), timeout=WAIT_S)
    with phase("zoom of a folder"):
        cluster.desk.run(submitted(f"zoom {URI}/photos -o {URI}/zoomed {model}"), timeout=WAIT_S)
    expected = [f"{Path(key).stem}_4x.png" for key in keys(cluster, "photos")]
    assert len(expected) == 3
    assert [Path(key).name for key in keys(cluster, "zoomed") if key.endswith(".png")] == expected


def test_preprocessing_survives_the_loss_of_a_node(cluster, shards):
    with phase("preprocess, worker lost"):
        during(
            cluster,
            f"preprocess {URI}/raw {URI}/again --tile 32 --val {HELD_OUT}",
            lambda said: re.search(r"\| [1-9]/9 ", said),
            cluster.worker.kill,
        )
    found = shard_bytes(cluster, "again")
    assert len(shards) == 9 and found.keys() == shards.keys()
    assert [name for name in shards if found[name] != shards[name]] == []
    with phase("the worker's return"):
        back(cluster)


def test_training_on_two_nodes_survives_the_loss_of_one(cluster, trained):
    with phase("train, worker lost: 12 epochs"):
        said = during(
            cluster,
            f"{trained} --epochs 12 --workers 2-3 --name run",
            lambda _: len(progress(cluster, "run")) >= 3 and min(train_workers(cluster)) >= 1,
            cluster.worker.kill,
        )
    epochs = [line["epoch"] for line in progress(cluster, "run")]
    assert epochs == sorted(set(epochs)) and epochs[-1] == 12, said
    assert crops_seen(cluster, "run") == 12 * CROPS
    with phase("the worker's return"):
        back(cluster)


def test_ray_down_leaves_nothing_running(cluster):
    with phase("ray down"):
        cluster.desk.run(f"{RAY} down -y cluster-local.yaml", timeout=WAIT_S)

    def left(host):
        """Its processes of Ray."""
        return [line for line in host.processes() if "ray" in line and "mlflow" not in line]

    assert left(cluster.head) == []
    with phase("the worker's Ray ends by itself"):  # `ray down` does not log in to the workers of a `local` cluster
        wait_for(lambda: left(cluster.worker) == [], WAIT_S, f"no Ray on the worker, got {left(cluster.worker)}")
