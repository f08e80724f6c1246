"""What is refused before anything starts: too many workers for the cluster, a RAY_ADDRESS where no Ray answers."""

import concurrent.futures
import contextlib
import socket
import threading
import time
from types import SimpleNamespace

import grpc
import pytest
from ray._private import services

from pipelines import cluster
from pipelines.cluster import ClusterError, parse_workers, plan_workers, start_ray


def test_two_workers_on_two_cpus_leave_room_for_readers():
    plan = plan_workers(2, {"CPU": 2.0})
    assert plan.workers * plan.cpus_per_worker < 2
    assert (plan.use_gpu, plan.threads, plan.placement) == (False, 1, "SPREAD")


def test_gpus_set_the_default():
    plan = plan_workers(None, {"CPU": 32.0, "GPU": 8.0})
    assert (plan.workers, plan.use_gpu, plan.cpus_per_worker, plan.readers) == (8, True, 1.0, 3)
    assert plan.placement == "PACK"


@pytest.mark.parametrize(("workers", "cpus"), [(1, 1.0), (2, 2.0), (8, 9.0), (5, 6.0), (12, 9.0)])
def test_a_plan_fits_with_its_readers(workers, cpus):
    plan = plan_workers(workers, {"CPU": cpus})
    assert plan.workers * (plan.cpus_per_worker + 0.25) <= cpus


@pytest.mark.parametrize(
    ("workers", "resources", "said"),
    [
        (8, {"CPU": 2.0}, "use --workers 2 or fewer"),
        (0, {"CPU": 2.0}, "at least 1"),
        (4, {"CPU": 16.0, "GPU": 2.0}, "use --workers 2"),
        ((3, 8), {"CPU": 2.0}, "use --workers 2 or fewer"),
    ],
)
def test_too_few_cpus_or_gpus_name_what_fits(workers, resources, said):
    with pytest.raises(ClusterError, match=said):
        plan_workers(workers, resources)


def test_the_lower_end_of_a_range_must_fit():
    plan = plan_workers((1, 4), {"CPU": 1.0})
    assert (plan.workers, plan.cpus_per_worker, plan.threads) == ((1, 4), 0.75, 1)
    assert plan_workers((2, 8), {"CPU": 32.0, "GPU": 4.0}).use_gpu


def test_workers_are_a_number_or_a_range():
    assert parse_workers("4") == parse_workers("4-4") == 4
    assert parse_workers("1-4") == (1, 4)
    for text in ("0", "4-1", "two", "-1", "1-"):
        with pytest.raises(ClusterError, match="--workers"):
            parse_workers(text)


@pytest.fixture
def dead_port():
    """A port of 127.0.0.1 where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return closed.getsockname()[1]


@pytest.fixture
def other_port():
    """A port where a program answers that is not Ray; Ray replaces 127.0.0.1 by the machine's own address."""
    server = socket.create_server(("", 0))

    def answer() -> None:
        with contextlib.suppress(OSError):  # the server was closed
            while True:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):  # the client has gone
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    threading.Thread(target=answer, daemon=True).start()
    yield server.getsockname()[1]
    server.close()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:{dead_port}", "got .*refused at .*; start it, or unset RAY_ADDRESS"),
        ("ray://127.0.0.1:{dead_port}", "got .*refused at .*; start it, or unset RAY_ADDRESS"),
        ("auto", "got .*refused at .*; start it, or unset RAY_ADDRESS"),
        ("127.0.0.1:{other_port}", "got a program at .* that is not Ray"),
        ("nosuch.invalid:6379", "expected a running Ray cluster, got"),
        ("http://127.0.0.1:8265", "expected HOST:PORT, .* got an address of http://; .*ray job submit"),
        ("127.0.0.1", "expected a running Ray cluster, got"),
        ("127.0.0.1:port", "expected a running Ray cluster, got"),
        ("127.0.0.1:99999", "expected a running Ray cluster, got"),
    ],
)
def test_an_address_without_ray_gets_one_line_within_20_s(address, said, dead_port, other_port, monkeypatch):
    monkeypatch.setattr(cluster, "PROBE_S", 2.0)
    # What a cluster that was killed leaves behind: the file with its address, and no process.
    monkeypatch.setattr(services, "find_gcs_addresses", frozenset)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda temp_dir: f"127.0.0.1:{dead_port}")
    monkeypatch.setenv("RAY_ADDRESS", address.format(dead_port=dead_port, other_port=other_port))
    started = time.monotonic()
    with pytest.raises(ClusterError, match=f"RAY_ADDRESS=.*{said}") as caught:
        start_ray()
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 20


def test_a_grpc_server_that_is_not_ray_gets_one_line(monkeypatch):
    """Ray's own client would repeat its call for half a minute, with a warning each second."""
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    try:
        with pytest.raises(ClusterError, match=r"got a program at .* that is not Ray, .*\(UNIMPLEMENTED\); start it"):
            start_ray()
    finally:
        server.stop(None)


def test_a_cluster_whose_head_is_gone_is_lost(monkeypatch):
    monkeypatch.setattr(cluster, "LOST_S", 0.0)
    monkeypatch.setattr(cluster, "ASK_S", 0.0)
    monkeypatch.delenv("RAY_gcs_rpc_server_reconnect_timeout_s", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        monkeypatch.setattr(cluster.worker, "_global_node", SimpleNamespace(all_processes={}, gcs_address=address))
        assert cluster.lost() is None
    said = cluster.lost()
    assert said is not None and said.startswith("Ray, head:6379: expected it to run until the command ends, got no ")
    assert f"head (GCS) at {address} for " in said
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "60")  # a head that may come back
    assert cluster.lost() is None


@pytest.mark.parametrize(("ours", "running", "shown"), [(True, True, 0), (False, False, 0), (False, True, 1)])
def test_the_log_of_our_own_lost_raylet_is_not_shown(ours, running, shown, monkeypatch):
    """Its message can come after Ray was shut down for its sake; that of a cluster's other machine is shown."""
    printed = []
    monkeypatch.setattr(cluster, "_PRINT", lambda data, ignore_prefix: printed.append(data))
    monkeypatch.setattr(cluster, "is_our_own", lambda: ours)
    monkeypatch.setattr("ray.is_initialized", lambda: running)
    monkeypatch.setattr(cluster, "lost_processes", list)
    cluster._print_unless_lost({"lines": ["Raylet is terminated. Termination is unexpected.\n    a log\n"]}, False)
    assert len(printed) == shown
    cluster._print_unless_lost({"lines": ["another message"]}, False)
    assert len(printed) == shown + 1
