"""`sdan doctor`: the state of each finding, and the exit code."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from pipelines import doctor
from pipelines.checks.finding import Finding
from sdan.ops import Check, selftest

NAMES = ["torch", "GPU", "operators", "disk", "/dev/shm", "Ray", "MLflow", "S3"]
PARTS = {
    "operators": "sdan.ops.selftest",
    "Ray": "pipelines.cluster.start_ray",
    "MLflow": "pipelines.registry.connect",
    "disk": "shutil.disk_usage",
    "S3": "boto3.Session",
}
"""Finding -> what its check calls outside of pipelines/checks/."""


@pytest.fixture(autouse=True)
def healthy(monkeypatch):
    """A cluster of 8 CPUs and 2 GPUs, an MLflow server, S3 credentials, sound operators and 500 GB of free disk."""
    usage = namedtuple("usage", "total used free")
    answers = {
        "operators": lambda: [Check("packed attention, CPU", "ok", "exact")],
        "Ray": lambda: None,
        "MLflow": lambda tracking_uri: SimpleNamespace(search_experiments=lambda: ["Default", "sdan"]),
        "disk": lambda folder: usage(10**12, 5 * 10**11, 5 * 10**11),
        "S3": lambda: SimpleNamespace(get_credentials=lambda: SimpleNamespace(method="env")),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(PARTS[name], answer)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("pipelines.checks.machine._memory_gb", lambda: 32.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setattr("pipelines.registry.prepare_database", lambda tracking_uri: None)
    return usage


def run(data):
    """(exit code, {name: (state, detail)}) of one report."""
    lines = []
    code = doctor.report(data, say=lines.append)
    found = {}
    for line in lines:
        state, name, detail = line.split(maxsplit=2)
        found[name] = (state, detail)
    return code, found


def test_a_healthy_machine_has_every_finding_and_exit_code_0(tmp_path):
    code, found = run(tmp_path / "data")
    assert code == 0 and list(found) == NAMES
    assert found["torch"][0] == "ok" and torch.__version__ in found["torch"][1]
    assert found["operators"] == ("ok", "ok       packed attention, CPU: exact")
    assert found["Ray"] == ("ok", "a local instance: 8 CPUs, 2 GPUs")
    assert found["MLflow"] == ("ok", "http://127.0.0.1:1, 2 experiments")
    assert found["disk"] == ("ok", f"500 GB free in {tmp_path / 'data'}")
    assert found["S3"] == ("ok", "credentials from env; --s3 URI tries a bucket")


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_the_precision_of_this_cpu_is_shown(tmp_path, monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sdan.ops.precision.cpu_has_bf16", lambda: has_bf16)
    assert run(tmp_path)[1]["torch"][1].endswith(f"train.precision=auto: {expected}, channels_last")


def test_the_operators_of_this_machine_are_ok(tmp_path, monkeypatch):
    monkeypatch.setattr(PARTS["operators"], selftest)
    _, found = run(tmp_path)
    state, detail = found["operators"]
    assert state == "ok" and "squared deformable convolution, CPU" in detail


def test_no_gpu_and_no_credentials_are_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(PARTS["S3"], lambda: SimpleNamespace(get_credentials=lambda: None))
    code, found = run(tmp_path)
    assert code == 0
    assert found["GPU"][0] == "absent" and "run on the CPU" in found["GPU"][1]
    assert found["S3"][0] == "absent" and "no credentials" in found["S3"][1]


@pytest.mark.parametrize("name", PARTS)
def test_a_check_that_raises_is_a_broken_finding(name, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no such\n  luck")

    monkeypatch.setattr(PARTS[name], fails)
    code, found = run(tmp_path)
    assert code == 1 and list(found) == NAMES
    assert found[name] == ("broken", "RuntimeError: no such luck")
    same = {"disk": ["disk", "/dev/shm"]}  # both look at the free space
    assert [other for other in NAMES if found[other][0] == "broken"] == same.get(name, [name])


def test_a_missing_package_of_the_extra_is_absent(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'ray'", name="ray")

    monkeypatch.setattr(PARTS["Ray"], fails)
    code, found = run(tmp_path)
    assert code == 0
    assert found["Ray"] == ("absent", "the package ray is not installed; pip install 'sdan[train]'")


def test_a_failed_operator_is_broken(tmp_path, monkeypatch):
    checks = [Check("packed attention, CPU", "ok", "exact"), Check("GPU kernels", "failed", "wrong by 0.5")]
    monkeypatch.setattr(PARTS["operators"], lambda: checks)
    code, found = run(tmp_path)
    assert code == 1 and found["operators"][0] == "broken"


def test_a_full_disk_is_broken(healthy, tmp_path, monkeypatch):
    monkeypatch.setattr(PARTS["disk"], lambda folder: healthy(10**12, 10**12, 10**9))
    code, found = run(tmp_path)
    assert code == 1
    assert found["disk"] == ("broken", f"1 GB free in {tmp_path}; free some space (over 95% full: Ray stops)")


def test_an_unwritable_data_folder_is_broken(tmp_path):
    (tmp_path / "file").write_text("")
    code, found = run(tmp_path / "file" / "data")
    assert code == 1 and found["disk"][0] == "broken"


def test_on_a_cluster_the_nodes_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    asked = []

    def nodes(data, s3):
        asked.append((data, s3))
        return [Finding("torch", "ok", "fine", "10.0.0.2"), Finding("clocks", "broken", "late")]

    monkeypatch.setattr(doctor, "_nodes", nodes)
    lines = []
    assert doctor.report(tmp_path, say=lines.append) == 1
    assert asked == [(tmp_path, None)]
    assert [line.split()[1] for line in lines] == ["Ray", "MLflow", "S3", "10.0.0.2", "clocks"]


def test_a_cluster_that_does_not_answer_has_no_nodes(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("no Ray there")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(PARTS["Ray"], fails)
    code, found = run(tmp_path)
    assert code == 1 and list(found) == ["Ray", "MLflow", "S3"]
