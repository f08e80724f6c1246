"""`sdan doctor`: what works on this machine and what to do about the rest, one line per check."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One check's outcome."""

    name: str
    state: str
    """ok, absent (SDAN works without it) or broken."""
    detail: str


def report(data: Path, *, say: Callable[[str], None]) -> int:
    """Run every check and print its finding; returns the exit code, 1 if anything is broken."""
    checks: dict[str, Callable[[], Finding]] = {
        "torch": _torch,
        "GPU": _gpu,
        "operators": _operators,
        "Ray": _ray,
        "MLflow": lambda: _mlflow(data),
        "disk": lambda: _disk(data),
        "S3": _s3,
    }
    findings = []
    for name, check in checks.items():
        found = _run(name, check)
        findings.append(found)
        say(f"{found.state:7} {found.name:10} {found.detail}")
    return int(any(found.state == "broken" for found in findings))


def _run(name: str, check: Callable[[], Finding]) -> Finding:
    """The check's finding. An error that it raises becomes a finding, too."""
    try:
        return check()
    except ModuleNotFoundError as error:
        return Finding(name, "absent", f"the package {error.name} is not installed; pip install 'sdan[train]'")
    except Exception as error:
        return Finding(name, "broken", " ".join(f"{type(error).__name__}: {error}".split()))


def _torch() -> Finding:
    import torch

    from sdan.ops.precision import compute_plan

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = compute_plan(device, tf32=True)
    return Finding("torch", "ok", f"{torch.__version__}, {os.cpu_count()} CPUs, train.precision=auto: {plan}")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "absent", "no CUDA device; training and zooming run on the CPU")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return Finding("GPU", "ok", ", ".join(names))


def _operators() -> Finding:
    from sdan.ops import selftest

    checks = selftest()
    state = "broken" if any(check.status == "failed" for check in checks) else "ok"
    lines = [f"{check.status:8} {check.name}: {check.detail}" for check in checks]
    return Finding("operators", state, "\n                   ".join(lines))


def _ray() -> Finding:
    import ray

    from pipelines.cluster import start_ray

    start_ray()
    have = ray.cluster_resources()
    where = os.environ.get("RAY_ADDRESS", "a local instance")
    return Finding("Ray", "ok", f"{where}: {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs")


def _mlflow(data: Path) -> Finding:
    from pipelines import registry

    uri = registry.default_tracking_uri(data)
    registry.prepare_database(uri)
    runs = len(registry.connect(uri).search_experiments())
    return Finding("MLflow", "ok", f"{registry.without_password(uri)}, {runs} experiments")


def _disk(data: Path) -> Finding:
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=data):
        free_gb = shutil.disk_usage(data).free / 1e9
    state = "ok" if free_gb > 2 else "broken"
    return Finding("disk", state, f"{free_gb:.0f} GB free in {data}" + ("" if state == "ok" else "; free some space"))


def _s3() -> Finding:
    import boto3

    credentials = boto3.Session().get_credentials()
    if credentials is None:
        return Finding("S3", "absent", "no credentials; s3:// needs an instance role (or the usual AWS variables)")
    return Finding("S3", "ok", f"credentials from {credentials.method}")
