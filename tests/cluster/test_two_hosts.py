"""A whole cluster on two hosts of one machine: `ray up cluster-local.yaml`, then preprocessing, training on both hosts,
evaluation and zoom as jobs, with RAW, shards and checkpoints on S3 and token authentication. A host is powered off in the
middle of preprocessing and of training.

Written for this: the hosts' Python (a virtual environment that sees the tested packages) and the values marked CHANGE.
Everything else is what a user runs.
"""

import json
import re
import sys
from pathlib import Path

import bucket
import pyarrow.parquet as pq
import pytest
from conftest import phase
from lab import DESK_IP, ROOT, LabError, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
PYTHON = sys.executable
RAY = f"export RAY_AUTH_MODE=token RAY_UP_enable_autoscaler_v2=0; {PYTHON} -m ray.scripts.scripts"
S3 = f"export AWS_ENDPOINT_URL=http://{DESK_IP}:{bucket.PORT}; {PYTHON} {Path(bucket.__file__)}"
ADDRESS = "http://127.0.0.1:8265"


def settings(lab):
    """cluster-local.yaml with the values marked CHANGE."""
    text = (ROOT / "cluster-local.yaml").read_text()
    for old, new in {
        "https://example.org/sdan.git": "/mnt/sdan.git",
        "SDAN_COMMIT=" + "0" * 40: f"SDAN_COMMIT={lab.commit}",
        "MLFLOW_TRACKING_URI=http://192.168.1.10:": f"MLFLOW_TRACKING_URI=http://{lab.head.ip}:",
        "s3://BUCKET": f"s3://{bucket.NAME}",
        "# AWS_ENDPOINT_URL=http://192.168.1.9:9000": f"AWS_ENDPOINT_URL=http://{DESK_IP}:{bucket.PORT}",
        "head_ip: 192.168.1.10": f"head_ip: {lab.head.ip}",
        "[192.168.1.11]": f"[{lab.worker.ip}]",
        "ssh_user: sdan": "ssh_user: root",
    }.items():
        assert text.count(old) == 1, f"cluster-local.yaml: {old} occurs {text.count(old)} times"
        text = text.replace(old, new)
    return text


def alive(lab):
    """The addresses of the nodes that Ray has."""
    listed = lab.head.run(f"RAY_AUTH_MODE=token ~/venv/bin/ray list nodes --format json --filter state=ALIVE", timeout=60)
    return sorted(node["node_ip"] for node in json.loads(listed[listed.index("[") :]))


@pytest.fixture(scope="module")
def cluster(lab):
    """The cluster of both hosts, started from the desk, with a bucket, MLflow's server and the tunnel of the job API."""
    lab.desk.serve(f"{PYTHON} {Path(bucket.__file__)} serve {DESK_IP} {bucket.PORT}", "moto.txt")
    for host in (lab.desk, lab.head, lab.worker):
        (host.home / ".aws").mkdir()
        (host.home / ".aws" / "credentials").write_text(bucket.CREDENTIALS)
    (lab.desk.home / "cluster-local.yaml").write_text(settings(lab))
    lab.desk.run(f"{RAY} get-auth-token --generate")
    with phase("ray up: the head"):
        print(lab.desk.run(f"{RAY} up -y --no-config-cache cluster-local.yaml", timeout=180))
    with phase("ray up: the worker, after that"):
        wait_for(lambda: len(alive(lab)) == 2, 120, "the second node")
    lab.desk.run(f"{S3} create")
    return lab


def test_up(cluster):
    print(alive(cluster))
