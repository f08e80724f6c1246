"""The metrics that SDAN publishes through Ray: names, meanings, and the functions that set them.

Every node's Ray serves them for Prometheus beside its own, with `ray_` before the name and `_total` after that of a
counter. Without a connected Ray the functions do nothing, so code that publishes needs no Ray. deploy/monitoring/ has
the dashboard, docs/monitoring.md the command that shows it.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One metric."""

    kind: str
    """counter or gauge."""
    description: str
    tags: tuple[str, ...] = ()


METRICS = {
    "sdan_preprocess_pairs": Metric("counter", "Pairs that preprocessing has finished.", ("outcome",)),
    "sdan_preprocess_tiles": Metric("counter", "Tiles that preprocessing has written."),
    "sdan_train_crops_per_second": Metric("gauge", "Crops that all workers of a run train on per second.", ("run",)),
    "sdan_train_data_wait": Metric("gauge", "Share of an epoch's time that rank 0 waits for crops, 0 to 1.", ("run",)),
    "sdan_train_psnr_db": Metric(
        "gauge", "PSNR of the last validation, by which checkpoints are chosen, dB.", ("run",)
    ),
    "sdan_serve_waiting": Metric("gauge", "Photographs that wait in the service's queue."),
    "sdan_serve_in_work": Metric("gauge", "Photographs that the service works on."),
    "sdan_serve_photographs": Metric("counter", "Requests that the service has ended.", ("outcome",)),
}
"""Name -> what it is. The outcomes of a pair are those of PairResult.status; of a request: answered, refused."""

_LOCK = threading.Lock()
_MADE: dict[tuple[Any, str], Any] = {}
"""(Ray's session, name) -> Ray's object; one that was made in an earlier session of this process is not exported."""


def exported_name(name: str) -> str:
    """The name in Prometheus."""
    return f"ray_{name}_total" if METRICS[name].kind == "counter" else f"ray_{name}"


def gauge(name: str, value: float, **tags: str) -> None:
    """Set a gauge of METRICS."""
    if (made := _made(name, "gauge")) is not None:
        made.set(float(value), tags=tags)


def count(name: str, amount: float = 1.0, **tags: str) -> None:
    """Add to a counter of METRICS; nothing if `amount` is 0."""
    if amount > 0 and (made := _made(name, "counter")) is not None:
        made.inc(float(amount), tags=tags)


def pair_finished(status: str, tiles: int) -> None:
    """A pair of preprocessing has ended.

    Args:
        status: PairResult.status.
        tiles: how many it wrote.
    """
    count("sdan_preprocess_pairs", outcome=status)
    count("sdan_preprocess_tiles", tiles)


def _made(name: str, kind: str) -> Any:
    """Ray's object for a metric; None without a connected Ray."""
    metric = METRICS[name]
    if metric.kind != kind:
        raise TypeError(f"{name}: expected a {metric.kind}, got a {kind}")
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    from ray.util import metrics

    session = ray.get_runtime_context().get_job_id()
    with _LOCK:
        if (session, name) not in _MADE:
            make = metrics.Counter if kind == "counter" else metrics.Gauge
            _MADE[session, name] = make(name, description=metric.description, tag_keys=metric.tags)
        return _MADE[session, name]
