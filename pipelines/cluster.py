"""Ray, started or joined: quietly, on 127.0.0.1, and with a clear word when there are too few CPUs.

Nothing here runs at import. `RAY_ADDRESS` (set on a cluster's head, or by `ray job submit`) joins that cluster;
without it a private local instance is started for the command and ends with it.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from typing import Any

import ray

READER_CPUS = 0.25
"""Logical CPUs kept beside each train worker for the tasks that read its crops. Those ask for none themselves: on a
full machine they would wait for ever, and how many run at once is bounded otherwise (WorkerPlan.readers)."""


Workers = int | tuple[int, int]
"""Train workers: a number, or the least and the most."""


class ClusterError(ValueError):
    """The resources asked for are not there."""


def start_ray(*, resources: dict[str, float] | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a local instance; does nothing when connected already.

    Args:
        resources: extra named resources of a local instance (a cluster's are set where it is launched).
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    # Ray ends idle task processes after a second; each new one imports torch again, which took half of the CPU time of
    # a small training.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    # A warning comes at four times this many processes; on two CPUs a training's actors alone are eight.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(8, os.cpu_count() or 1)))
    # Threads that wait for each other give their core away meanwhile: with readers, or another run, on the same cores a
    # training that spins instead takes several times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    verbose = os.environ.get("SDAN_VERBOSE") == "1"
    common: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
        "runtime_env": {"env_vars": {"PYTHONWARNINGS": "ignore"}},
    }
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(**common)
        except (ConnectionError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ClusterError(
                f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: a running Ray cluster expected, got: {reason}"
            ) from error
    else:
        try:
            ray.init(address="local", _node_ip_address="127.0.0.1", resources=resources, **common)
        except Exception as error:  # Ray raises a bare Exception when a machine is too busy or too full to start it
            reason = " ".join(str(error).split())[:200]
            raise ClusterError(
                f"Ray cannot be started on this machine ({reason}); look at its load and disk"
            ) from error
    if not verbose:
        for name in ("ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)


def workers_that_fit(most: int) -> int | None:
    """As many CPU workers as fit, up to `most` and at least one; None (one per GPU) where there are GPUs."""
    have = ray.cluster_resources()
    if have.get("GPU", 0) >= 1:
        return None
    return max(1, min(most, int(have.get("CPU", 0) / (0.5 + READER_CPUS))))


@dataclass(frozen=True)
class WorkerPlan:
    """What each train worker gets."""

    workers: Workers
    use_gpu: bool
    cpus_per_worker: float
    threads: int
    """torch's intra-operator threads in each worker."""
    readers: int
    """Tasks that read crops for each worker at a time."""


def parse_workers(text: str) -> Workers:
    """'4' -> 4; '1-4' -> (1, 4)."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if not found:
        raise ClusterError(f"--workers: a number or a range such as 1-4 expected, got {text!r}")
    least, most = int(found[1]), int(found[2] or found[1])
    if not 1 <= least <= most:
        raise ClusterError(f"--workers: at least 1, and the larger number last, expected, got {text!r}")
    return most if least == most else (least, most)


def plan_workers(workers: Workers | None, resources: dict[str, float] | None = None) -> WorkerPlan:
    """Fit the workers asked for into the cluster, or say that they do not fit.

    Args:
        workers: as asked for; None: one per GPU, or one on a machine without. Of a range the least must fit now.
        resources: ray.cluster_resources() (the default).

    Raises:
        ClusterError: fewer CPUs than the workers and their readers need; Ray itself would wait in silence.
    """
    have = ray.cluster_resources() if resources is None else resources
    cpus, gpus = have.get("CPU", 0.0), int(have.get("GPU", 0))
    wanted = workers if workers is not None else max(1, gpus)
    least, most = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    if least < 1:
        raise ClusterError(f"--workers: at least 1 expected, got {least}")
    use_gpu = gpus >= least
    if gpus and not use_gpu:
        raise ClusterError(f"--workers {least}: one GPU each expected, the cluster has {gpus}; use --workers {gpus}")
    each = 1.0 if most * (1 + READER_CPUS) <= cpus else 0.5
    if least < most and not use_gpu:
        each = 1.0 - READER_CPUS  # on every machine that may be the last one left, readers work, too
    smallest = min(each, 0.5) if least == most else each
    if least * (smallest + READER_CPUS) > cpus:
        fits = int(cpus / (smallest + READER_CPUS))
        raise ClusterError(
            f"--workers {least}: {least * (smallest + READER_CPUS):g} CPUs expected ({smallest:g} a worker and "
            f"{READER_CPUS} for its crops), the cluster has {cpus:g}; "
            + (f"use --workers {fits} or fewer" if fits >= 1 else "add a CPU")
        )
    spare = int((cpus - most * each) / most)
    return WorkerPlan(wanted, use_gpu, each, threads=max(1, int(cpus) // most), readers=max(1, spare))
