"""What is checked on each node of a cluster. `python -m pipelines.checks.node REQUEST` prints it as JSON.

The command runs in a process of its own on the node: tasks of Ray see no GPU unless they ask for one, and a driver that
crashes must not take a worker of Ray with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.checks import machine
from pipelines.checks.bucket import bucket
from pipelines.checks.finding import Finding, run


@dataclass(frozen=True)
class NodeRequest:
    """What the driver asks of every node."""

    data: str
    """The --data folder, absolute."""
    token: str
    """Name of a file that the driver has put into `data`."""
    s3: str | None = None
    """A bucket to try."""
    tracking_uri: str | None = None
    """MLflow's server; None: there is none to reach."""


def checks(request: NodeRequest) -> dict[str, Callable[[], Finding]]:
    """The checks of a node, by name."""
    found = machine.checks(Path(request.data))
    found["data"] = lambda: shared_data(request)
    if request.tracking_uri:
        found["MLflow"] = lambda: tracking(request.tracking_uri or "")
    if request.s3:
        found["S3"] = lambda: bucket(request.s3 or "")
    return found


def shared_data(request: NodeRequest) -> Finding:
    """Whether this node sees what the driver has written to --data."""
    if (Path(request.data) / request.token).is_file():
        return Finding("data", "ok", f"{request.data} is the driver's")
    return Finding(
        "data",
        "broken",
        f"{request.data}: expected the folder that the driver uses, got another one; mount the shared folder of runs "
        "at this path on every node (docs/cluster.md)",
    )


def tracking(uri: str) -> Finding:
    """Whether this machine reaches MLflow: rank 0 of a training writes from where it runs."""
    from pipelines import registry

    count = len(registry.connect(uri).search_experiments())
    return Finding("MLflow", "ok", f"{registry.without_password(uri)}, {count} experiments")


def report(request: NodeRequest) -> dict[str, Any]:
    """{"findings": [...], "versions": {...}}."""
    findings = [asdict(run(name, check)) for name, check in checks(request).items()]
    return {"findings": findings, "versions": machine.versions()}


if __name__ == "__main__":
    print(json.dumps(report(NodeRequest(**json.loads(sys.argv[1])))))
