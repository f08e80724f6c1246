"""`sdan doctor`: what works and what to do about the rest, one line per check.

Without RAY_ADDRESS it checks this machine; with it every node of that cluster, and the ways between them. The checks
are in checks/.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pipelines.checks import bucket, machine, node
from pipelines.checks.finding import Finding, run


def report(data: Path, *, say: Callable[[str], None], s3: str | None = None) -> int:
    """Run every check and print its finding; returns the exit code, 1 if anything is broken.

    Args:
        s3: an s3:// URI below which a small object is written, read, and written on condition, on every node.
    """
    states: list[str] = []

    def show(found: Finding) -> None:
        states.append(found.state)
        say(found.line())

    cluster = bool(os.environ.get("RAY_ADDRESS"))
    checks = {} if cluster else dict(machine.checks(data))
    checks |= {
        "Ray": _ray,
        "MLflow": lambda: _mlflow(data),
        "S3": lambda: bucket.bucket(s3) if s3 else bucket.credentials(),
    }
    found = {}
    for name, check in checks.items():
        found[name] = run(name, check)
        show(found[name])
    if cluster and found["Ray"].state == "ok":
        for one in _nodes(data, s3):
            show(one)
    return int("broken" in states)


def _ray() -> Finding:
    import ray

    from pipelines.cluster import start_ray

    start_ray()
    have = ray.cluster_resources()
    where = os.environ.get("RAY_ADDRESS", "a local instance")
    return Finding("Ray", "ok", f"{where}: {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs")


def _mlflow(data: Path) -> Finding:
    """Whether MLflow's server answers, or its database in `data` can be used."""
    from pipelines import registry

    uri = registry.default_tracking_uri(data)
    registry.prepare_database(uri)
    return node.tracking(uri)


def _nodes(data: Path, s3: str | None) -> list[Finding]:
    """The findings of the cluster's nodes."""
    from pipelines import registry
    from pipelines.checks import nodes

    found = nodes.alive_nodes()
    peers = nodes.Peers(found)
    try:
        return nodes.check_nodes(found, peers.call, data, s3=s3, tracking_uri=registry.default_tracking_uri(data))
    finally:
        peers.close()
