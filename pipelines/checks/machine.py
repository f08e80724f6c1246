"""Checks of one machine, and its versions."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from pipelines.checks.finding import Finding

PACKAGES = ("sdan", "torch", "torchvision", "ray", "mlflow", "pyarrow", "numpy", "rawpy", "opencv-python-headless")
"""Packages whose versions must be equal on all nodes."""
OUR_PACKAGES = ("preprocessing", "sdan", "tuning", "pipelines")
LEAST_FREE_GB = 2.0
MOST_FULL = 0.95
"""Ray stops storing objects on a disk that is fuller (RAY_local_fs_capacity_threshold)."""
SHM = Path("/dev/shm")
"""Where Ray keeps its object store."""


def checks(data: Path) -> dict[str, Callable[[], Finding]]:
    """The checks that every machine gets, by name."""
    return {
        "torch": torch_and_precision,
        "GPU": gpus,
        "operators": operators,
        "disk": lambda: disk(data),
        "/dev/shm": shared_memory,
    }


def torch_and_precision() -> Finding:
    """PyTorch's version and what train.precision=auto chooses."""
    import torch

    from sdan.ops.precision import compute_plan

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = compute_plan(device, tf32=True)
    return Finding("torch", "ok", f"{torch.__version__}, {os.cpu_count()} CPUs, train.precision=auto: {plan}")


def gpus() -> Finding:
    """The GPUs and their driver; broken if the driver has GPUs that PyTorch cannot use."""
    import torch

    driver, present = _driver()
    if not torch.cuda.is_available():
        if present and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            return Finding(
                "GPU",
                "broken",
                f"driver {driver} has {present} GPUs, but PyTorch {torch.__version__} cannot use them; install a "
                f"driver for CUDA {torch.version.cuda} or newer",
            )
        return Finding("GPU", "absent", "no CUDA device; training and zooming run on the CPU")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    said = f", driver {driver}, CUDA {torch.version.cuda}" if driver else ""
    return Finding("GPU", "ok", ", ".join(names) + said)


def _driver() -> tuple[str, int]:
    """(NVIDIA's driver, its GPUs); ("", 0) without one."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        return (version.decode() if isinstance(version, bytes) else str(version)), int(pynvml.nvmlDeviceGetCount())
    except Exception:  # no package, no driver, or one that does not answer: NVML's errors have no common base class
        return "", 0


def operators() -> Finding:
    """The self-test of the operators."""
    from sdan.ops import selftest

    found = selftest()
    state = "broken" if any(check.status == "failed" for check in found) else "ok"
    lines = [f"{check.status:8} {check.name}: {check.detail}" for check in found]
    return Finding("operators", state, "\n                   ".join(lines))


def disk(data: Path) -> Finding:
    """Free space where runs are kept, and whether files can be written there."""
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=data):
        usage = shutil.disk_usage(data)
    free_gb = usage.free / 1e9
    full = usage.free < (1 - MOST_FULL) * usage.total
    state = "broken" if free_gb <= LEAST_FREE_GB or full else "ok"
    more = "" if state == "ok" else "; free some space" + (f" (over {MOST_FULL:.0%} full: Ray stops)" if full else "")
    return Finding("disk", state, f"{free_gb:.0f} GB free in {data}{more}")


def shared_memory() -> Finding:
    """Whether /dev/shm has room for Ray's object store, which is 30 % of the memory by default."""
    if not SHM.is_dir():
        return Finding("/dev/shm", "absent", "none; Ray keeps its objects in /tmp")
    usage = shutil.disk_usage(SHM)
    wanted_gb = min(0.3 * _memory_gb(), 200.0)
    detail = f"{usage.total / 1e9:.1f} GB, {usage.free / 1e9:.1f} GB free; Ray's object store wants {wanted_gb:.1f} GB"
    if usage.total / 1e9 < 0.9 * wanted_gb:
        return Finding("/dev/shm", "broken", f"{detail}, else it uses the disk; docker run --shm-size={wanted_gb:.0f}g")
    return Finding("/dev/shm", "ok", detail)


def _memory_gb() -> float:
    """Memory of this machine or container."""
    import ray._private.utils as utils

    return float(utils.get_system_memory()) / 1e9


def versions() -> dict[str, str]:
    """What must be equal on all nodes: Python, packages, and a digest of our own code."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found | {"code": code_digest()}


def code_digest() -> str:
    """The first 12 digits of a SHA-256 over our Python files: equal code has equal digests, whatever its commit."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in OUR_PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
