"""The sampling as one operator for every device: plain PyTorch, or Triton on GPUs that it supports.

`kernels` chooses the code. `warp_op` is the custom operator `sdan::bilinear_warp`, which torch.compile and torch.export
put into their graphs without looking inside.
"""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sdan.ops import portable, rows

_log = logging.getLogger(__name__)
_OLDEST = (8, 0)  # Triton no longer tests older GPUs; the paper's 2080 Ti is (7, 5)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def kernels(tensor: Tensor) -> ModuleType:
    """The module with `warp` and `warp_backward` for this tensor's device."""
    if tensor.is_cuda:
        reason = why_not_triton(tensor.get_device())
    else:
        reason = None if _interpreting() else "not on a GPU"
    return rows if reason is not None else _triton_warp()


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


@functools.cache
def _triton_warp() -> ModuleType:
    return importlib.import_module("sdan.ops.triton_warp")


@torch.library.custom_op("sdan::bilinear_warp", mutates_args=())
def warp_op(input: Tensor, offset: Tensor, bias: Tensor | None, margin: int) -> Tensor:
    """Sample `input`, which is `margin` pixels larger than the output on each side; the output is channels-last."""
    check_warp(input, offset, bias, margin)
    if offset.numel() == 0:
        return _warp_fake(input, offset, bias, margin)
    output: Tensor = kernels(input).warp(input, offset, bias, margin)
    return output


@warp_op.register_fake
def _warp_fake(input: Tensor, offset: Tensor, bias: Tensor | None, margin: int) -> Tensor:
    num_images, _, height, width = offset.shape
    return _empty_channels_last(input, (num_images, input.shape[1], height, width))


@torch.library.custom_op("sdan::bilinear_warp_backward", mutates_args=())
def _backward_op(
    grad: Tensor, input: Tensor, offset: Tensor, margin: int, need_input: bool, need_offset: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input (channels-last), offset (contiguous) and bias (at least float32).

    A gradient that is not needed is an empty tensor.
    """
    needs = (need_input, need_offset, need_bias)
    if offset.numel() == 0:
        grads = _backward_fake(grad, input, offset, margin, *needs)
        return grads[0].zero_(), grads[1].zero_(), grads[2].zero_()
    found = kernels(input).warp_backward(grad, input, offset, margin, needs)
    some_input, some_offset, some_bias = (grad.new_empty(0) if tensor is None else tensor for tensor in found)
    return some_input, some_offset, some_bias


@_backward_op.register_fake
def _backward_fake(
    grad: Tensor, input: Tensor, offset: Tensor, margin: int, need_input: bool, need_offset: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(input.dtype, torch.float32)
    return (
        _empty_channels_last(input, input.shape) if need_input else grad.new_empty(0),
        offset.new_empty(offset.shape) if need_offset else grad.new_empty(0),
        grad.new_empty(input.shape[1], dtype=wide) if need_bias else grad.new_empty(0),
    )


def _empty_channels_last(like: Tensor, shape: Any) -> Tensor:
    num_images, channels, height, width = shape
    return like.new_empty((num_images, height, width, channels)).permute(0, 3, 1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, bias, ctx.margin = inputs
    ctx.bias_type = None if bias is None else bias.dtype
    ctx.save_for_backward(input, offset)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, offset = ctx.saved_tensors
    need_input, need_offset, need_bias, _ = ctx.needs_input_grad
    grad_input, grad_offset, grad_bias = _backward_op(
        grad, input, offset, ctx.margin, need_input, need_offset, need_bias
    )
    return (
        grad_input if need_input else None,
        grad_offset if need_offset else None,
        grad_bias.to(ctx.bias_type) if need_bias else None,
        None,
    )


no_second_derivative = portable.no_second_derivative(
    "sdan::bilinear_warp", "`with sdan.ops.portable_form():`, which has every derivative"
)
warp_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(no_second_derivative)


def _autocast(input: Tensor, offset: Tensor, bias: Tensor | None, margin: int) -> Tensor:
    """Input and bias keep their types, and offsets are raised to float32: at 100 px bfloat16 resolves only half a
    pixel.
    """
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32)) if input.dtype != torch.float64 else offset
    with torch.amp.autocast(input.device.type, enabled=False):
        return warp_op(input, offset, bias, margin)


_library = torch.library.Library("sdan", "FRAGMENT")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("bilinear_warp", _autocast, _key)


def check_warp(input: Tensor, offset: Tensor, bias: Tensor | None, margin: int) -> None:
    """Raise ValueError or TypeError unless the kernels can read these tensors safely."""
    if input.dim() != 4 or offset.dim() != 4:
        raise ValueError(f"input.dim(), offset.dim(): expected 4 and 4, got {input.dim()} and {offset.dim()}")
    shape, offset_shape = input.shape, offset.shape
    if offset_shape[1] != 2:
        raise ValueError(f"offset.shape[1]: expected 2 (dy, dx) for the whole window, got {offset_shape[1]}")
    if offset_shape[0] != shape[0]:
        raise ValueError(f"offset.shape[0]: expected input's batch size {shape[0]}, got {offset_shape[0]}")
    size, got = (shape[2] - 2 * margin, shape[3] - 2 * margin), (offset_shape[2], offset_shape[3])
    if got != size:
        raise ValueError(f"offset.shape[2:]: expected the output's size {size}, got {got}")
    if bias is not None and bias.shape != (shape[1],):
        raise ValueError(f"bias.shape: expected ({shape[1]},), got {tuple(bias.shape)}")
    if input.dtype not in _FLOATS:
        raise TypeError(f"input.dtype: expected one of {', '.join(map(str, _FLOATS))}, got {input.dtype}")
    if offset.dtype not in (input.dtype, torch.float32):
        raise TypeError(f"offset.dtype: expected input's {input.dtype} or torch.float32, got {offset.dtype}")
    check_devices(input, offset=offset, bias=bias)


def check_devices(input: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless the tensors are on the device of `input`."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name}.device: expected input's {input.device}, got {tensor.device}")
