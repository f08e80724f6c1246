"""Asks the cluster's autoscaler for the GPUs of a training, waits for them, and withdraws the request.

Ray starts a machine for what a task or placement group waits for, but `sdan train` plans its workers before it starts
any, by what there is. So the GPUs are requested first. A request belongs to the cluster, not to the process that made
it: it is withdrawn as soon as a fixed number of workers has its GPUs, whose placement group then keeps the machines. Of
an elastic run it stays until the end, because Ray Train adds workers only when their GPUs exist.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.autoscaler.sdk import request_resources

from pipelines import cluster
from pipelines.cluster import ClusterError, Workers

WAIT_S = 900.0
"""How long to wait by default; a machine of a cloud takes 3 to 10 minutes."""
LOOK_S = 2.0
"""How often the number of GPUs is looked at."""
WORKER_CPUS = 1.0 + cluster.READER_CPUS
"""CPUs beside each GPU in the request, for a worker and its readers."""


def _say(line: str) -> None:
    print(f"train: {line}", file=sys.stderr, flush=True)


@contextmanager
def requested(
    workers: Workers | None, *, wait_s: float = WAIT_S, say: Callable[[str], None] = _say, needed: bool = True
) -> Iterator[None]:
    """Inside, the cluster has the GPUs of `workers` if its autoscaler can start them; without an autoscaler that has
    GPUs, nothing is asked for.

    Args:
        workers: train workers with a GPU each, or (least, most): the least are waited for, the most asked for. None:
            one GPU, if there is none yet.
        wait_s: how long to wait.
        say: takes a line when the wait starts, and when GPUs arrive.
        needed: whether to ask at all.

    Raises:
        ClusterError: too few GPUs after `wait_s`.
    """
    least, most = workers if isinstance(workers, tuple) else (workers or 1, workers or 1)
    have = _gpus_now()
    reachable = int(sum(node.get("GPU", 0.0) for node in cluster.node_resources())) if needed else 0
    most = min(most, reachable)
    if have >= most or least > reachable:
        yield  # they are there, or cannot come: then plan_workers says what fits
        return
    elastic = least < most
    try:
        request_resources(bundles=[{"GPU": 1.0, "CPU": WORKER_CPUS}] * most)
        if have < least:
            _wait(least, wait_s, say)
        if not elastic:
            request_resources(bundles=[])
        yield
    finally:
        if ray.is_initialized():
            request_resources(bundles=[])


def _wait(least: int, wait_s: float, say: Callable[[str], None]) -> None:
    """Wait until the cluster has `least` GPUs. Raises ClusterError after `wait_s`."""
    began, seen = time.monotonic(), _gpus_now()
    say(
        f"waiting for {least} GPUs, which the autoscaler starts ({seen} are there); gives up after {wait_s:g} s "
        "(--gpu-wait); `ray status` on the head shows why it takes long"
    )
    while (now := _gpus_now()) < least:
        if now != seen:
            say(f"{now} of {least} GPUs are there after {time.monotonic() - began:.0f} s")
            seen = now
        if time.monotonic() - began > wait_s:
            instead = f"--workers {now}" if now else "a larger --gpu-wait"
            raise ClusterError(
                f"--workers: expected {least} GPUs within {wait_s:g} s, got {now}; see `ray status` on the head (a "
                f"quota, or no capacity?), or use {instead}"
            )
        time.sleep(LOOK_S)
    say(f"{now} GPUs are there after {time.monotonic() - began:.0f} s")


def _gpus_now() -> int:
    return int(ray.cluster_resources().get("GPU", 0))
