"""Starts or joins Ray, and plans how many CPUs and GPUs each train worker gets.

`RAY_ADDRESS` (set on a cluster's head, or by `ray job submit`) joins that cluster. Without it, a local instance on
127.0.0.1 is started for the command and ends with it.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import grpc
import ray
from ray._private import services, worker
from ray._private.state import state

READER_CPUS = 0.25
"""Logical CPUs reserved per train worker for its reader tasks. The tasks themselves request 0 CPUs, so that they can
always start; WorkerPlan.readers limits how many run."""

PROBE_S = 12.0
"""How long RAY_ADDRESS may take to answer."""

_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Ray's own variable: how many seconds it waits for a cluster's lost GCS; 60 if it is not set."""
LOST_S = 3.0
"""How long the GCS of a joined cluster may refuse connections before it counts as lost, if _PATIENCE is not set."""
ASK_S = 1.0
"""How often that GCS is asked."""
SILENT_S = 20.0
"""The same if nothing answers at all, because the network may come back."""

_PRINT = getattr(worker, "print_to_stdstream", print)
"""Ray's own function. The default is for benchmarks/on_gpu/bare_machine.py, which stands in for a missing Ray."""

_RAYLET_DIED = "Raylet is terminated"
"""How Ray's message about the end of a raylet begins; the end of the raylet's log follows."""

MOST_NODES = 64
"""Nodes that are counted of a kind of which the autoscaler may start any number."""

Workers = int | tuple[int, int]
"""Number of train workers, or (least, most)."""


class ClusterError(ValueError):
    """Ray cannot be started, or has too few resources; the message says what to do."""


def start_ray(*, resources: dict[str, float] | None = None) -> None:
    """Join the cluster of RAY_ADDRESS, or start a local instance; does nothing if Ray is already connected.

    Args:
        resources: custom resources of a local instance (a cluster's are set where it is launched).

    Raises:
        ClusterError: no cluster at RAY_ADDRESS, or Ray does not start on this machine.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    # By default Ray ends idle worker processes after a second. Each new one imports torch again, which took half of the
    # CPU time of a small training.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    # Ray warns at four times this number of processes. On two CPUs one training already has eight actors.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(8, os.cpu_count() or 1)))
    # OpenMP threads must yield their core while they wait: if they spin, and readers or another run use the same
    # cores, training takes several times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    verbose = os.environ.get("SDAN_VERBOSE") == "1"
    common: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
        "runtime_env": {"env_vars": {"PYTHONWARNINGS": "ignore"}},
    }
    if os.environ.get("RAY_ADDRESS"):
        _check_cluster(os.environ["RAY_ADDRESS"])
        try:
            with _own_sigterm():
                ray.init(**common)
        except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and a bare Exception
            raise _no_cluster(os.environ["RAY_ADDRESS"], error) from error
    else:
        # The watcher for machines that a cloud takes back is one more process, which loads Ray Train for seconds.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        try:
            with _own_sigterm():
                ray.init(address="local", _node_ip_address="127.0.0.1", resources=resources, **common)
        except Exception as error:  # Ray raises a bare Exception if the machine is too busy or its disk is full
            reason = " ".join(str(error).split())[:200]
            raise ClusterError(
                f"Ray, this machine: expected to start, got {reason}; check its load and free disk space"
            ) from error
    if not verbose:
        worker.print_to_stdstream = _print_unless_lost
        for name in ("ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)


def is_our_own() -> bool:
    """Whether this process started the Ray that it uses, which then ends with it."""
    node = worker._global_node
    return node is not None and node.is_head()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the caller's handler of SIGTERM: ray.init puts one in its place that prints a C++ stack and aborts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:  # Ray's handler, if SIGTERM comes while Ray starts
        signal.signal(signal.SIGTERM, handler)
        if error.code != signal.SIGTERM:
            raise
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, handler)


class _ClusterWatch:
    """Sees that the GCS of a joined cluster is gone. Ray would wait a minute, and then end the process in C++."""

    def __init__(self) -> None:
        self._address = ""
        self._answered = self._asked = 0.0

    def lost_for(self, address: str) -> float | None:
        """Seconds since the GCS at HOST:PORT answered last, if that is too long; else None."""
        now = time.monotonic()
        if address != self._address:
            self._address, self._answered = address, now
        elif now - self._asked < ASK_S:
            return None
        self._asked = now
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
        except ConnectionRefusedError:
            limit = float(os.environ.get(_PATIENCE) or LOST_S)
        except OSError:
            limit = float(os.environ.get(_PATIENCE) or SILENT_S)
        else:
            self._answered = time.monotonic()
            return None
        silent = time.monotonic() - self._answered
        return silent if silent >= limit else None


_WATCH = _ClusterWatch()


def lost() -> str | None:
    """What is lost of the Ray that this process uses, for a message ("..., got ..."); None: it runs, or there is none.

    Only the command's watching thread calls it (cli.py): it may take two seconds.
    """
    node = worker._global_node
    if node is None or not ray.is_initialized():
        return None
    if node.all_processes:
        gone = lost_processes()
        got = f"the end of its process {gone[0]}, which was killed, perhaps for memory" if gone else ""
        return f"Ray, this machine: expected it to run until the command ends, got {got}" if gone else None
    silent = _WATCH.lost_for(node.gcs_address)
    if silent is None or not ray.is_initialized():
        return None
    return (
        f"Ray, {os.environ.get('RAY_ADDRESS') or node.gcs_address}: expected it to run until the command ends, got no "
        f"answer from its head (GCS) at {node.gcs_address} for {silent:.0f} s"
    )


def lost_processes() -> list[str]:
    """The processes of the local instance that have ended although Ray is connected; Ray cannot work without them."""
    node = worker._global_node
    if node is None or not ray.is_initialized():
        return []
    found = [
        name
        for name in ("gcs_server", "raylet")
        if any(info.process.poll() is not None for info in node.all_processes.get(name, ()))
    ]
    return found if ray.is_initialized() else []  # a normal shutdown disconnects first, then ends them


def _print_unless_lost(data: dict[str, Any], ignore_prefix: bool) -> None:
    """Print a message of Ray. A local instance that dies sends its log, which is many lines; the command says it in one
    (cli.py). The log may arrive when Ray is already shut down because of it."""
    died = any(str(line).startswith(_RAYLET_DIED) for line in data.get("lines", ()))
    if not lost_processes() and not (died and (is_our_own() or not ray.is_initialized())):
        _PRINT(data, ignore_prefix)


def _check_cluster(address: str) -> None:
    """Check, within PROBE_S, that a Ray cluster answers at RAY_ADDRESS. Ray itself tries for up to ten minutes.

    Raises:
        ClusterError: the address of something else, or nothing answers there.
    """
    scheme, _, rest = address.rpartition("://")
    if scheme not in ("", "ray"):
        raise ClusterError(
            f"RAY_ADDRESS={address}: expected HOST:PORT, ray://HOST:PORT or auto, got an address of {scheme}://; "
            "a job server's address belongs to `ray job submit --address`; unset RAY_ADDRESS, or correct it"
        )
    try:
        # For "auto": the address that the last `ray start` on this machine stored, or that of a running raylet.
        found = rest if scheme else services.canonicalize_bootstrap_address(address)
        if found is not None:  # None: "local"
            _probe(found, call=None if scheme else "/ray.rpc.NodeInfoGcsService/CheckAlive")
    except (OSError, ValueError) as error:
        raise _no_cluster(address, error) from error


def _probe(address: str, call: str | None) -> None:
    """Connect to HOST:PORT, wait until it speaks gRPC, and make `call`, which only Ray's GCS knows."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit() and int(port) < 2**16):
        raise ValueError(f"{address!r}, which is not HOST:PORT")
    deadline = time.monotonic() + PROBE_S
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S / 2).close()
    except OSError as error:
        raise ValueError(f"{error.strerror or error} at {address}") from error
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=max(1.0, deadline - time.monotonic()))
        except grpc.FutureTimeoutError as error:
            raise ValueError(f"a program at {address} that is not Ray, or is overloaded") from error
        if call is None:
            return
        try:
            channel.unary_unary(call)(b"", timeout=max(1.0, deadline - time.monotonic()))
        except grpc.RpcError as error:  # each is a grpc.Call, too
            code = cast("grpc.Call", error).code()
            if code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise ValueError(f"a program at {address} that is not Ray, or is overloaded ({code.name})") from error
            # Any other answer, such as UNAUTHENTICATED, is Ray's own; ray.init says more.


def _no_cluster(address: str, error: Exception) -> ClusterError:
    reason = " ".join(str(error).split())[:200]
    return ClusterError(
        f"RAY_ADDRESS={address}: expected a running Ray cluster, got {reason}; start it, or unset RAY_ADDRESS"
    )


def workers_that_fit(most: int) -> int | None:
    """The number of CPU workers that fit, between 1 and `most`; None (one per GPU) if Ray has GPUs."""
    have = ray.cluster_resources()
    if have.get("GPU", 0) >= 1:
        return None
    return max(1, min(most, int(have.get("CPU", 0) / (0.5 + READER_CPUS))))


@dataclass(frozen=True)
class WorkerPlan:
    """The resources of each train worker."""

    workers: Workers
    use_gpu: bool
    cpus_per_worker: float
    threads: int
    """PyTorch's intra-op threads per worker."""
    readers: int
    """Tasks that read crops for each worker at the same time."""
    gpus_per_worker: float = 1.0
    """With use_gpu: less than 1 only if several trials of a sweep share a GPU."""

    @property
    def placement(self) -> str:
        """Ray's placement strategy. `threads` counts the CPUs of all machines, so CPU workers spread over these; GPU
        workers share as few machines as possible, because NCCL is fastest inside one."""
        return "PACK" if self.use_gpu else "SPREAD"


def parse_workers(text: str) -> Workers:
    """'4' -> 4; '1-4' -> (1, 4)."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if not found:
        raise ClusterError(f"--workers: expected a number or a range such as 1-4, got {text!r}")
    least, most = int(found[1]), int(found[2] or found[1])
    if not 1 <= least <= most:
        raise ClusterError(f"--workers: expected at least 1, and the larger number last, got {text!r}")
    return most if least == most else (least, most)


def check_workers(workers: Workers | None) -> None:
    """Check a request before Ray is started.

    Raises:
        ClusterError: fewer than one worker.
    """
    least = workers[0] if isinstance(workers, tuple) else workers
    if least is not None and least < 1:
        raise ClusterError(f"--workers: expected at least 1, got {least}")


def running_nodes() -> list[dict[str, float]]:
    """Resources of each node that Ray has now, by Ray's names: CPU, GPU, memory (bytes)."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def node_resources() -> list[dict[str, float]]:
    """Resources of each node that Ray has, and of each that its autoscaler may still start."""
    nodes = running_nodes()
    return nodes + _nodes_to_come(state.get_cluster_config(), nodes)


def _nodes_to_come(config: Any, nodes: list[dict[str, float]]) -> list[dict[str, float]]:
    """Nodes that the autoscaler may start beyond those that run: empty without an autoscaler.

    Args:
        config: the cluster's config, as its autoscaler reported it to Ray; None: there is none.
    """
    found: list[dict[str, float]] = []
    for group in config.node_group_configs if config is not None else ():
        resources = {name: float(amount) for name, amount in group.resources.items()}
        running = sum(all(node.get(name, 0.0) >= amount for name, amount in resources.items()) for node in nodes)
        most = MOST_NODES if group.max_count < 0 else group.max_count
        found += [resources] * max(0, min(most, MOST_NODES) - running)
    return found


def plan_workers(workers: Workers | None, resources: dict[str, float] | None = None) -> WorkerPlan:
    """Fit the requested workers into the cluster.

    Args:
        workers: the request; None: one per GPU, or one without GPUs. Of a range, the least must fit now.
        resources: Ray's resources; None: ray.cluster_resources().

    Raises:
        ClusterError: too few CPUs or GPUs for the workers and their readers; Ray itself would wait without a message.
    """
    have = ray.cluster_resources() if resources is None else resources
    cpus, gpus = have.get("CPU", 0.0), int(have.get("GPU", 0))
    wanted = workers if workers is not None else max(1, gpus)
    check_workers(wanted)
    least, most = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    use_gpu = gpus >= least
    if gpus and not use_gpu:
        raise ClusterError(f"--workers {least}: expected one GPU each, got {gpus} GPUs; use --workers {gpus}")
    each = 1.0 if most * (1 + READER_CPUS) <= cpus else 0.5
    if least < most and not use_gpu:
        each = 1.0 - READER_CPUS  # any machine may be the last one left, and must also run readers
    smallest = min(each, 0.5) if least == most else each
    if least * (smallest + READER_CPUS) > cpus:
        fits = int(cpus / (smallest + READER_CPUS))
        raise ClusterError(
            f"--workers {least}: expected {least * (smallest + READER_CPUS):g} CPUs ({smallest:g} per worker and "
            f"{READER_CPUS} for its readers), got {cpus:g}; "
            + (f"use --workers {fits} or fewer" if fits >= 1 else "add a CPU")
        )
    spare = int((cpus - most * each) / most)
    return WorkerPlan(wanted, use_gpu, each, threads=max(1, int(cpus) // most), readers=max(1, spare))
