"""One all-reduce among the nodes, as training does: `python -m pipelines.checks.collective REQUEST`."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from typing import Any

TIMEOUT_S = 30.0
"""How long the nodes wait for each other."""


def all_reduce(*, rank: int, world: int, address: str, backend: str) -> float:
    """The sum of a one from each rank, which must be `world`.

    Args:
        address: HOST:PORT of rank 0, where the ranks meet.
        backend: gloo, or nccl on GPU 0 of each node.

    Raises:
        RuntimeError: a rank did not come, or the network between them does not carry the data.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cuda:0" if backend == "nccl" else "cpu")
    dist.init_process_group(
        backend, init_method=f"tcp://{address}", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT_S)
    )
    try:
        ones = torch.ones(2**18, device=device)  # 1 MB: a broken MTU lets small messages through
        dist.all_reduce(ones)
        return float(ones.mean())
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    request: dict[str, Any] = json.loads(sys.argv[1])
    found = all_reduce(**request)
    if found != request["world"]:
        sys.exit(f"all-reduce: expected {request['world']}, got {found}")
