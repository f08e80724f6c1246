"""Train workers on one machine meet on 127.0.0.1; those on several machines meet as Ray Train arranges it."""

import subprocess
import sys

import pytest
from ray.train.torch.config import _TorchBackend

from pipelines.training import rendezvous
from pipelines.training.rendezvous import LocalTorchConfig

TWO_WORKERS = """
import os
import psutil, torch
import torch.distributed as dist
from pipelines.training.rendezvous import _join, _serve_store

port = _serve_store()
child = os.fork()
rank = int(child == 0)
_join("gloo", port, rank, 2, 60)
total = torch.ones(1) * (rank + 1)
dist.all_reduce(total)
listening = [known.laddr.ip for known in psutil.Process().net_connections("tcp") if known.status == "LISTEN"]
line = " ".join([str(float(total)), *listening])
os.write(1, f"{line}\\n".encode())  # in one piece: both processes write to this pipe
dist.barrier()
if rank == 0:
    os.waitpid(child, 0)
os._exit(0)
"""


def test_workers_of_one_machine_listen_only_on_loopback():
    done = subprocess.run([sys.executable, "-c", TWO_WORKERS], capture_output=True, text=True, timeout=120, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["3.0", "3.0"], done.stdout + done.stderr
    assert {ip for line in lines for ip in line[1:]} == {"127.0.0.1"}


class Group:
    """Ray Train's worker group, on these machines."""

    def __init__(self, *machines: str) -> None:
        self.machines, self.started, self.executed = machines, [], []

    def __len__(self) -> int:
        return len(self.machines)

    def get_resources_per_worker(self) -> dict[str, float]:
        return {"CPU": 1.0}

    def execute(self, function) -> list:
        self.executed.append(function)
        return list(self.machines) if function is rendezvous._node_id else [None] * len(self)

    def execute_single(self, rank, function) -> int:
        return 4321

    def execute_single_async(self, rank, function, **arguments) -> None:
        self.started.append((rank, function, arguments["port"], arguments["world"], arguments["backend"]))


@pytest.mark.parametrize(("machines", "own"), [(("a",), True), (("a", "a"), True), (("a", "b"), False)])
def test_only_workers_of_one_machine_use_loopback(monkeypatch, machines, own):
    by_ray = []
    monkeypatch.setattr(_TorchBackend, "on_start", lambda self, group, config: by_ray.append(group))
    monkeypatch.setattr(rendezvous.ray, "get", lambda futures: futures)
    group, config = Group(*machines), LocalTorchConfig()
    config.backend_cls().on_start(group, config)
    expected = [(rank, rendezvous._join, 4321, len(machines), "gloo") for rank in range(len(machines))]
    assert (group.started, by_ray) == ((expected, []) if own else ([], [group]))
    assert (rendezvous._use_rays_interface in group.executed) != own


def test_several_machines_use_the_interface_of_rays_address(monkeypatch):
    assert rendezvous.interface_of("127.0.0.1") == "lo"
    assert rendezvous.interface_of("203.0.113.9") is None
    monkeypatch.setattr(rendezvous.os, "environ", {"GLOO_SOCKET_IFNAME": "chosen"})
    monkeypatch.setattr(rendezvous.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    rendezvous._use_rays_interface()
    assert rendezvous.os.environ == {"GLOO_SOCKET_IFNAME": "chosen", "NCCL_SOCKET_IFNAME": "lo"}
