"""Checks of a cluster's nodes and the ways between them, with nodes that answer as they are told."""

import time
from types import SimpleNamespace

import pytest

from pipelines.checks import machine, nodes
from pipelines.checks.node import NodeRequest, shared_data

VERSIONS = {"python": "3.11.7", "ray": "2.60.0", "code": "abc"}


class FakeNodes:
    """Two nodes whose methods answer from a table; a callable is called with the arguments."""

    def __init__(self, hosts=("10.0.0.1", "10.0.0.2"), gpus=0, **answers):
        self.nodes = nodes.alive_nodes(
            [
                {"Alive": True, "NodeID": f"{n}", "NodeManagerAddress": host, "Resources": {"GPU": gpus}}
                for n, host in enumerate(hosts)
            ]
        )
        finding = {"name": "torch", "state": "ok", "detail": "fine", "node": ""}
        self.answers = {
            "check": lambda place, request: {"findings": [finding], "versions": VERSIONS},
            "now": lambda place: time.time(),
            "listen": lambda place: 5000 + place,
            "reach": lambda place, host, port: "",
            "free_port": lambda place: 6000,
            "all_reduce": lambda place, rank, world, address, backend: "",
        } | answers

    def call(self, calls, timeout_s):
        found = []
        for place, method, arguments in calls:
            try:
                found.append(self.answers[method](place, *arguments))
            except Exception as error:
                found.append(error)
        return found

    def findings(self, data, tracking_uri="http://m:5000", s3=None):
        found = nodes.check_nodes(self.nodes, self.call, data, s3=s3, tracking_uri=tracking_uri)
        return {(one.node, one.name): one for one in found}


def test_a_sound_cluster_has_only_ok_findings(tmp_path):
    found = FakeNodes(gpus=1).findings(tmp_path)
    assert {one.state for one in found.values()} == {"ok"}
    assert {name for node, name in found if not node} == {"versions", "clocks", "network", "gloo", "nccl"}
    assert ("10.0.0.1", "torch") in found and ("10.0.0.2", "torch") in found
    assert list(tmp_path.iterdir()) == []  # the file that nodes look for is gone


def test_nodes_without_gpus_are_not_asked_for_nccl(tmp_path):
    assert ("", "nccl") not in FakeNodes().findings(tmp_path)


def test_different_code_on_a_node_names_the_node(tmp_path):
    def check(place, request):
        return {"findings": [], "versions": VERSIONS | ({"code": "def"} if place else {})}

    found = FakeNodes(check=check).findings(tmp_path)["", "versions"]
    assert found.state == "broken" and "code abc (10.0.0.1), def (10.0.0.2); install" in found.detail


def test_a_node_that_fails_is_broken_and_the_rest_goes_on(tmp_path):
    def check(place, request):
        if place:
            raise RuntimeError("ModuleNotFoundError: No module named 'pipelines'")
        return {"findings": [], "versions": VERSIONS}

    found = FakeNodes(check=check).findings(tmp_path)
    assert found["10.0.0.2", "node"].state == "broken" and "install this sdan" in found["10.0.0.2", "node"].detail
    assert found["", "versions"].state == "ok" and ("", "network") not in found


@pytest.mark.parametrize(("skew_s", "state"), [(0.5, "ok"), (90.0, "broken"), (-90.0, "broken")])
def test_a_clock_that_is_wrong_is_found(tmp_path, skew_s, state):
    found = FakeNodes(now=lambda place: time.time() + place * skew_s).findings(tmp_path)["", "clocks"]
    assert found.state == state
    assert state == "ok" or f"10.0.0.2 is 90.0 s {'ahead' if skew_s > 0 else 'behind'}" in found.detail


def test_a_closed_port_names_both_ends(tmp_path):
    found = FakeNodes(reach=lambda place, host, port: "timed out" if place else "").findings(tmp_path)
    assert found["", "network"].state == "broken"
    assert "no connection from 10.0.0.2 to 10.0.0.1 (timed out)" in found["", "network"].detail
    assert ("", "gloo") not in found


def test_a_failed_all_reduce_names_the_setting(tmp_path):
    found = FakeNodes(all_reduce=lambda place, *rest: "timed out" if place else "").findings(tmp_path)["", "gloo"]
    assert found.state == "broken" and "10.0.0.2: timed out" in found.detail and "GLOO_SOCKET_IFNAME" in found.detail


def test_several_machines_need_a_server_of_mlflow(tmp_path):
    assert FakeNodes().findings(tmp_path, "sqlite:///x.db")["", "MLflow"].state == "broken"
    assert ("", "MLflow") not in FakeNodes(("10.0.0.1", "10.0.0.1")).findings(tmp_path, "sqlite:///x.db")


def test_nodes_of_one_address_are_numbered():
    assert [node.label for node in FakeNodes(("a", "a", "b")).nodes] == ["a#1", "a#2", "b"]


def test_every_node_gets_the_bucket_and_the_server(tmp_path):
    asked = []

    def check(place, request):
        asked.append(request)
        return {"findings": [], "versions": VERSIONS}

    FakeNodes(check=check).findings(tmp_path, s3="s3://b")
    assert [(one["s3"], one["tracking_uri"]) for one in asked] == [("s3://b", "http://m:5000")] * 2


def test_a_folder_of_another_machine_is_found(tmp_path):
    (tmp_path / "token").touch()
    assert shared_data(NodeRequest(str(tmp_path), "token")).state == "ok"
    assert shared_data(NodeRequest(str(tmp_path), "other")).state == "broken"


def test_a_small_dev_shm_says_how_large_it_must_be(monkeypatch):
    usage = SimpleNamespace(total=64e6, used=0, free=64e6)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(machine, "_memory_gb", lambda: 32.0)
    found = machine.shared_memory()
    assert found.state == "broken" and "--shm-size=10g" in found.detail


def test_a_driver_that_pytorch_cannot_use_is_broken(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(machine, "_driver", lambda: ("470.1", 2))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = machine.gpus()
    assert found.state == "broken" and "470.1 has 2 GPUs" in found.detail


def test_a_nearly_full_disk_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(total=1e12, used=0, free=4e10))
    assert machine.disk(tmp_path).state == "broken" and "Ray stops" in machine.disk(tmp_path).detail
