"""Chooses the code that samples: Triton on GPUs that it supports (and under its interpreter), else plain PyTorch."""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from sdan.ops import rows

_log = logging.getLogger(__name__)
_OLDEST = (8, 0)  # Triton no longer tests older GPUs; the paper's 2080 Ti is (7, 5)


def kernels(tensor: Tensor) -> ModuleType:
    """The module with `warp` and `warp_backward` for this tensor's device."""
    if tensor.is_cuda:
        reason = why_not_triton(tensor.device.index or 0)
    else:
        reason = None if _interpreting() else "not on a GPU"
    if reason is not None:
        return rows
    return importlib.import_module("sdan.ops.triton_warp")


@functools.cache
def why_not_triton(device_index: int) -> str | None:
    """None if the Triton kernels run on this GPU, else the reason, which is also logged once."""
    capability = torch.cuda.get_device_capability(device_index)
    reason = None
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed"
    elif capability < _OLDEST:
        reason = f"this GPU is sm_{capability[0]}{capability[1]}, older than sm_{_OLDEST[0]}{_OLDEST[1]}"
    if reason is not None:
        _log.warning("cuda:%d: SDAN's operators use plain PyTorch: %s", device_index, reason)
    return reason


@functools.cache
def _interpreting() -> bool:
    """TRITON_INTERPRET=1 sends CPU tensors through the same launch code and kernels, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
