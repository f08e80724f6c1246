"""What runs on a node, called without Ray: the processes that it starts, and its connections."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest

from pipelines.checks.node import NodeRequest
from pipelines.checks.peer import Peer


def test_peers_reach_a_port_that_listens_and_no_other():
    one, other = Peer(), Peer()
    assert one.reach("127.0.0.1", other.listen()) == ""
    assert "refused" in one.reach("127.0.0.1", one.free_port())


@pytest.mark.slow
def test_two_peers_add_up_their_ones_with_gloo():
    peers = [Peer(), Peer()]
    address = f"127.0.0.1:{peers[0].free_port()}"
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(peer.all_reduce, rank, 2, address, "gloo") for rank, peer in enumerate(peers)]
    assert [one.result() for one in done] == ["", ""]


@pytest.mark.slow
def test_a_node_is_checked_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "token").touch()
    answer = Peer().check(asdict(NodeRequest(str(tmp_path), "token")))
    found = {one["name"]: one["state"] for one in answer["findings"]}
    assert list(found) == ["torch", "GPU", "operators", "disk", "/dev/shm", "data"]
    assert found["torch"] == found["operators"] == found["data"] == "ok"
    assert len(answer["versions"]["code"]) == 12 and answer["versions"]["ray"] != "none"


def test_a_process_that_fails_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="exit 1"):
        Peer().check(asdict(NodeRequest("/nowhere", "token")))
