"""What a checkpoint keeps of an optimizer whose learning rate is a tensor on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def stored_state(optimizer: torch.optim.Optimizer, rate: Tensor) -> dict[str, Any]:
    """Tensors and plain values for `restore_state`, as without a graph and its learning rate on the device."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.update(lr=float(rate), capturable=False)
    return state


def restore_state(
    optimizer: torch.optim.Optimizer, stored: dict[str, Any], rate: Tensor, *, capturable: bool = False
) -> None:
    """Restore what `stored_state` returned; the optimizer goes on with the tensor `rate`."""
    optimizer.load_state_dict(stored)
    for group in optimizer.param_groups:
        group.update(lr=rate, capturable=capturable)
    for parameter, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            # The fused optimizer walks memory in order: the moments need the layout of the weights, which may have
            # changed since the checkpoint.
            moments[name] = torch.empty_like(parameter).copy_(moments[name])


def step_if(optimizer: torch.optim.Optimizer, good: Tensor) -> None:
    """Step a fused optimizer if `good` (bool scalar on the device) is True, without waiting for the device."""
    optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]  # GradScaler uses the same attribute
    optimizer.step()
