"""How the train workers find each other: on one machine through 127.0.0.1 only, on several through the network
interface that has the address by which Ray knows the machine."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import psutil
import ray
import torch.distributed as dist
from ray.train.backend import BackendConfig
from ray.train.torch.config import TorchConfig, _set_torch_distributed_env_vars, _TorchBackend


@dataclass
class LocalTorchConfig(TorchConfig):
    """Ray Train's set-up of torch.distributed; workers that are all on one machine meet on 127.0.0.1.

    torch's own rendezvous listens on every interface, and takes keys from anybody. Workers on several machines must
    reach each other; docs/cluster.md has the firewall's rule.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """The class that Ray Train calls when the workers have started."""
        return _LocalBackend


class _LocalBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        config = cast("TorchConfig", backend_config)
        if len(set(worker_group.execute(_node_id))) > 1:
            worker_group.execute(_use_rays_interface)
            super().on_start(worker_group, config)
            return
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) > 0 else "gloo"
        port = worker_group.execute_single(0, _serve_store)
        worker_group.execute(_set_torch_distributed_env_vars)
        world = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, backend=backend, port=port, world_rank=rank, world=world, timeout_s=config.timeout_s
                )
                for rank in range(world)
            ]
        )


_served: list[dist.TCPStore] = []
"""The store that this process serves; it must outlive the function that starts it."""


def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _use_rays_interface() -> None:
    """Let gloo and NCCL use the interface of Ray's address. Otherwise gloo takes the one that the machine's own name
    resolves to, which on Debian is the loopback interface."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an IP address; None if no one has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return str(name)
    return None


def _serve_store() -> int:
    """Serve the workers' store on 127.0.0.1; returns its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = int(listening.getsockname()[1])
    # The store takes over the socket.
    store = dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    _served[:] = [store]
    return port


def _join(backend: str, port: int, world_rank: int, world: int, timeout_s: int) -> None:
    """Join the process group; the backends' own connections use the loopback interface, too."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as Ray sets it: a stuck collective raises
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=world_rank, world_size=world, timeout=timeout)
