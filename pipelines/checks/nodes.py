"""Checks every node of a running cluster, and the ways between them, from the driver."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.checks.finding import Finding
from pipelines.checks.node import NodeRequest
from pipelines.checks.peer import CHECKS_S, CONNECT_S, Peer

ANSWER_S = 60.0
"""How long a node may take to start the actor that checks it, beyond the time of the checks."""
MOST_SKEW_S = 2.0
"""How far a node's clock may be from the driver's. Records of runs, locks and signatures of S3 carry times."""
ROUND_TRIPS = 5


@dataclass(frozen=True)
class Node:
    """A node that runs."""

    identifier: str
    label: str
    """Its address, for people."""
    host: str
    gpus: int


def alive_nodes(found: Sequence[Mapping[str, Any]] | None = None) -> list[Node]:
    """The nodes of ray.nodes() that are alive; several on one address are numbered."""
    alive = [node for node in (ray.nodes() if found is None else found) if node["Alive"]]
    hosts = [str(node["NodeManagerAddress"]) for node in alive]
    return [
        Node(
            str(node["NodeID"]),
            host if hosts.count(host) == 1 else f"{host}#{hosts[: place + 1].count(host)}",
            host,
            int(node["Resources"].get("GPU", 0)),
        )
        for place, (node, host) in enumerate(zip(alive, hosts, strict=True))
    ]


class Peers:
    """The actors on the nodes. `call` is what the checks need of Ray; tests pass another one."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        actor: Any = ray.remote(Peer)
        self.actors = [
            actor.options(
                num_cpus=0,
                max_concurrency=4,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.identifier, soft=False),
            ).remote()
            for node in nodes
        ]

    def call(self, calls: Sequence[tuple[int, str, tuple[Any, ...]]], timeout_s: float) -> list[Any]:
        """Call methods of actors at the same time.

        Args:
            calls: (number of the node, method, arguments) each.

        Returns:
            what each returned, or the exception.
        """
        references = [getattr(self.actors[number], method).remote(*arguments) for number, method, arguments in calls]
        ray.wait(references, num_returns=len(references), timeout=timeout_s)
        return [self._answer(reference, timeout_s) for reference in references]

    @staticmethod
    def _answer(reference: Any, timeout_s: float) -> Any:
        try:
            return ray.get(reference, timeout=0.1)
        except ray.exceptions.GetTimeoutError:
            return TimeoutError(f"expected an answer within {timeout_s:g} s, got none; see `ray status` and its log")
        except Exception as error:  # the task's own, an actor that died, a node without our code
            return error

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


Call = Callable[[Sequence[tuple[int, str, tuple[Any, ...]]], float], list[Any]]


def check_nodes(nodes: Sequence[Node], call: Call, data: Path, *, s3: str | None, tracking_uri: str) -> list[Finding]:
    """All findings: those of each node, then those of all together.

    Args:
        call: `Peers.call`.
        data: the --data folder.
        s3: a bucket that every node tries.
        tracking_uri: MLflow's; only a server's is tried by the nodes.
    """
    server = tracking_uri if tracking_uri.startswith(("http://", "https://")) else None
    with _token(data) as token:
        asked = asdict(NodeRequest(str(data.resolve()), token, s3, server))
        answers = call([(place, "check", (asked,)) for place in range(len(nodes))], CHECKS_S + ANSWER_S)
    findings, versions = [], {}
    for node, answer in zip(nodes, answers, strict=True):
        if isinstance(answer, Exception):
            findings.append(_no_answer(node, answer))
            continue
        findings += [replace(Finding(**one), node=node.label) for one in answer["findings"]]
        versions[node.label] = answer["versions"]
    findings.append(same_versions(versions))
    here = [place for place, answer in enumerate(answers) if not isinstance(answer, Exception)]
    findings.append(clocks(nodes, here, call))
    if len(here) > 1:
        findings += between_nodes(nodes, here, call)
        if server is None and len({nodes[place].host for place in here}) > 1:
            findings.append(_no_server())
    return findings


def same_versions(versions: Mapping[str, Mapping[str, str]]) -> Finding:
    """Whether all nodes have the same Python, packages and code."""
    names = sorted(set(itertools.chain.from_iterable(versions.values())))
    differing = []
    for name in names:
        groups: dict[str, list[str]] = {}
        for node, found in versions.items():
            groups.setdefault(found.get(name, "none"), []).append(node)
        if len(groups) > 1:
            differing.append(
                name + " " + ", ".join(f"{value} ({' '.join(on)})" for value, on in sorted(groups.items()))
            )
    if differing:
        return Finding("versions", "broken", f"{'; '.join(differing)}; install the same on every node")
    first: Mapping[str, str] = next(iter(versions.values()), {})
    said = ", ".join(f"{name} {value}" for name, value in first.items())
    return Finding("versions", "ok" if first else "broken", f"equal on {len(versions)} nodes: {said}")


def clocks(nodes: Sequence[Node], here: Sequence[int], call: Call) -> Finding:
    """How far the nodes' clocks are from the driver's; the time of the way there and back is allowed for."""
    late = []
    largest = 0.0
    for place in here:
        best: tuple[float, float] | None = None  # (round trip, offset)
        for _ in range(ROUND_TRIPS):
            before = time.time()
            (answer,) = call([(place, "now", ())], ANSWER_S)
            after = time.time()
            if not isinstance(answer, Exception):
                trip = (after - before, answer - (before + after) / 2)
                best = min(best or trip, trip)
        if best is None:
            continue
        skew = max(0.0, abs(best[1]) - best[0] / 2)
        largest = max(largest, skew)
        if skew > MOST_SKEW_S:
            late.append(f"{nodes[place].label} is {abs(best[1]):.1f} s {'ahead' if best[1] > 0 else 'behind'}")
    if late:
        return Finding("clocks", "broken", f"{', '.join(late)}; start chrony or systemd-timesyncd on every node")
    return Finding("clocks", "ok", f"within {max(largest, 0.1):.1f} s of the driver's")


def between_nodes(nodes: Sequence[Node], here: Sequence[int], call: Call) -> list[Finding]:
    """Whether each node can connect to each other one, and whether gloo and NCCL work among them."""
    ports = dict(zip(here, call([(place, "listen", ()) for place in here], ANSWER_S), strict=True))
    ways = [(one, other) for one, other in itertools.permutations(here, 2) if not isinstance(ports[other], Exception)]
    errors = call([(one, "reach", (nodes[other].host, ports[other])) for one, other in ways], ANSWER_S + 4 * CONNECT_S)
    closed = [
        f"{nodes[one].label} to {nodes[other].label} ({error})"
        for (one, other), error in zip(ways, errors, strict=True)
        if error
    ]
    if closed:
        detail = (
            f"no connection from {', '.join(closed)}; open all TCP ports between the nodes (docs/cluster.md, Ports)"
        )
        return [Finding("network", "broken", detail)]
    found = [Finding("network", "ok", f"each of {len(here)} nodes reaches each other on a free port")]
    found.append(collective("gloo", nodes, here, call))
    with_gpu = [place for place in here if nodes[place].gpus]
    if len(with_gpu) > 1:
        found.append(collective("nccl", nodes, with_gpu, call))
    return found


def collective(backend: str, nodes: Sequence[Node], places: Sequence[int], call: Call) -> Finding:
    """One all-reduce of 1 MB among these nodes."""
    (port,) = call([(places[0], "free_port", ())], ANSWER_S)
    if isinstance(port, Exception):
        return Finding(backend, "broken", f"{nodes[places[0]].label}: {port}")
    address = f"{nodes[places[0]].host}:{port}"
    calls = [(place, "all_reduce", (rank, len(places), address, backend)) for rank, place in enumerate(places)]
    began = time.monotonic()
    answers = call(calls, CHECKS_S)
    failed = [f"{nodes[place].label}: {answer}" for place, answer in zip(places, answers, strict=True) if answer]
    if failed:
        name = "NCCL" if backend == "nccl" else "GLOO"
        detail = f"{'; '.join(failed)}; name the nodes' interface, e.g. {name}_SOCKET_IFNAME=eth0, and open their ports"
        return Finding(backend, "broken", detail)
    return Finding(backend, "ok", f"{len(places)} nodes, {time.monotonic() - began:.0f} s with their start")


def _no_answer(node: Node, error: Exception) -> Finding:
    reason = " ".join(str(error).split())[-300:]
    if "ModuleNotFoundError" in reason or "No module named" in reason:
        reason += "; install this sdan on the node"
    return Finding("node", "broken", reason, node.label)


def _no_server() -> Finding:
    return Finding(
        "MLflow",
        "broken",
        "expected a server for several machines, got a database file, which they would damage; start `mlflow server` "
        "and set MLFLOW_TRACKING_URI (docs/cluster.md)",
    )


@contextmanager
def _token(data: Path) -> Iterator[str]:
    """A file in --data that the nodes look for."""
    data.mkdir(parents=True, exist_ok=True)
    path = data / f".sdan-doctor-{uuid.uuid4().hex[:12]}"
    path.write_text("written by sdan doctor, which removes it\n")
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)
