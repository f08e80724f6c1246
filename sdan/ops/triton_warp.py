"""Launches the Triton kernels on a GPU or under Triton's interpreter: `warp` and `warp_backward` as in `sdan.ops.rows`.

The launch ensures what the kernels assume: a channels-last frame, contiguous offsets, and the tensors' GPU as the
current device (`torch.cuda.device`). Triton launches on PyTorch's current stream of that device.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdan.ops import rows
from sdan.ops.triton_kernels import warp_backward_kernel, warp_backward_sums_kernel, warp_forward_kernel

_FORWARD_VALUES = 1024
"""Values per program and corner: 8 per thread at 4 warps, for 128-bit loads (see benchmarks/compile_report.py)."""
_BACKWARD_VALUES = {8: 256, 4: 512, 2: 256}
"""The same for the backward pass, by bytes per value: the largest that do not spill registers on sm_80."""
_BACKWARD_WARPS = {8: 4, 4: 4, 2: 2}
"""Warps per program of the backward pass: 4 values per thread (float64: 2), so that sm_90 adds 16 bytes at once."""
BIAS_ROWS = 64
"""Rows of partial sums of the bias gradient. With one row, thousands of programs would add to the same addresses."""
_SUMS_VALUES = 1024
"""Sums per program that casts them: 8 per thread at 4 warps."""
_SUMS_CHANNELS = 16
"""Channels per program that adds the rows of the bias gradient: 8 values of the 64 rows per thread."""
_ALIGNMENT = 16
"""Triton compiles a kernel for pointers that are multiples of 16 bytes, and another one for those that are not."""

_Sizes = tuple[int, ...]


class Launch:
    """One kernel with its grid, sizes and constants, for tensors of fixed types on one device.

    The first call goes through Triton, which compiles the kernel or finds it by all arguments. Later calls use that
    kernel directly, which takes a fifth of the time.
    """

    def __init__(self, kernel: Any, grid: int, sizes: _Sizes, constants: dict[str, Any], num_warps: int) -> None:
        self._kernel, self._grid, self._num_warps = kernel, (grid, 1, 1), num_warps
        self._sizes, self._constants = sizes, constants
        self._fixed = (*sizes, *constants.values())
        self._run: Callable[..., object] | None = None

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on the current device; tensors and constants in the order of the kernel's parameters."""
        addresses = 0
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        aligned = addresses % _ALIGNMENT == 0
        if aligned and self._run is not None:
            self._run(*tensors, *self._fixed)
            return
        launcher = self._kernel[self._grid]
        compiled = launcher(*tensors, *self._sizes, **self._constants, num_warps=self._num_warps)
        if aligned and compiled is not None:  # Triton's interpreter compiles nothing
            self._run = compiled[self._grid]


def warp(input: Tensor, offset: Tensor, bias: Tensor | None, margin: int, *, channels_last: bool = True) -> Tensor:
    """output(p) = bias + sum over the four corners q of weight(p, q) input(q), in the layout that is asked for."""
    input, offset = input.contiguous(memory_format=torch.channels_last), offset.contiguous()
    num_images, channels, height, width = *input.shape[:2], *offset.shape[2:]
    strides = (height * width * channels, 1, width * channels, channels)
    if not channels_last:
        strides = (channels * height * width, height * width, width, 1)
    output = torch.empty_strided((num_images, channels, height, width), strides, dtype=input.dtype, device=input.device)
    types = (input.dtype, offset.dtype, None if bias is None else bias.dtype)
    launch = _forward_launch(input.shape, offset.shape, margin, types, input.get_device(), channels_last)
    with _on(input):
        launch(input, offset, input if bias is None else bias, output)  # the kernel reads no bias without HAS_BIAS
    return output


def warp_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    margin: int,
    needs: tuple[bool, bool, bool],
    bias_type: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `warp` with respect to input, offset and bias; None where `needs` is False.

    Atomics sum the gradients of input and bias, so their rounding varies from run to run. Under
    `torch.use_deterministic_algorithms(True)` they come from `rows.scatter`, which sorts instead, and from a plain sum.

    Args:
        bias_type: of the gradient of bias; default: at least float32.
    """
    need_input, need_offset, need_bias = needs
    if (need_input or need_bias) and torch.are_deterministic_algorithms_enabled():
        _, grad_offset, _ = warp_backward(grad, input, offset, margin, (False, need_offset, False))
        grad_input = _sorted_sums(grad, input, offset, margin).to(input.dtype) if need_input else None
        grad_bias = rows.bias_gradient(grad, bias_type) if need_bias else None
        return grad_input, grad_offset, grad_bias
    channels_last = grad.is_contiguous(memory_format=torch.channels_last)
    if not channels_last and not grad.is_contiguous():
        grad, channels_last = grad.contiguous(memory_format=torch.channels_last), True
    input, offset = input.contiguous(memory_format=torch.channels_last), offset.contiguous()
    first = BIAS_ROWS * input.shape[1] if need_bias else 0  # the sums of bias come first
    size = first + (input.numel() if need_input else 0)
    sums = torch.zeros(size, dtype=_sum_type(input.dtype), device=input.device) if size else grad
    grad_offset = torch.empty_like(offset) if need_offset else offset  # the kernel writes only what is needed
    if any(needs):
        types = (grad.dtype, input.dtype, offset.dtype)
        launch = _backward_launch(input.shape, offset.shape, margin, types, input.get_device(), channels_last, needs)
        with _on(input):
            launch(grad, input, offset, sums, grad_offset)
    grad_input, grad_bias = _finished(sums, input, first, need_input, bias_type)
    return grad_input, grad_offset if need_offset else None, grad_bias


def _finished(
    sums: Tensor, input: Tensor, first: int, need_input: bool, bias_type: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of input and bias from their sums, of which the `first` are those of bias (0: not needed).

    One kernel adds the rows of bias and casts the sums of input, unless they have input's type already.
    """
    cast = need_input and sums.dtype != input.dtype
    grad_input = grad_bias = None
    if need_input:
        _, channels, height, width = shape = input.shape
        strides = (height * width * channels, 1, width * channels, channels)
        grad_input = (
            torch.empty_strided(shape, strides, dtype=input.dtype, device=input.device)
            if cast
            else sums.as_strided(shape, strides, first)
        )
    if first:
        grad_bias = torch.empty(input.shape[1], dtype=bias_type or sums.dtype, device=input.device)
    if cast or first:
        types = (sums.dtype, input.dtype, bias_type if first else None)
        launch = _sums_launch(input.shape[1], input.numel(), types, input.get_device(), cast, first > 0)
        with _on(input):
            launch(
                sums,
                sums if grad_input is None else grad_input,  # the kernel writes only what is needed
                sums if grad_bias is None else grad_bias,
            )
    return grad_input, grad_bias


def _sorted_sums(grad: Tensor, input: Tensor, offset: Tensor, margin: int) -> Tensor:
    """The gradient of input without atomics."""
    num_images, _, height, width = input.shape
    corners = rows.find_corners(offset, (height, width), margin)
    sums = rows.scatter(rows.to_rows(grad), corners, num_images * height * width)
    return rows.from_rows(sums, num_images, (height, width))


@lru_cache(maxsize=1024)
def _forward_launch(
    frame: torch.Size,
    offset: torch.Size,
    margin: int,
    types: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    device_index: int,
    channels_last: bool,
) -> Launch:
    """The forward kernel for these shapes, types (input, offset, bias), device and layout of the output."""
    meta = launch_meta(frame[1], types[0], backward=False)
    num_warps = meta.pop("num_warps")
    constants = {"HAS_BIAS": types[2] is not None, "CHANNELS_LAST": channels_last, **meta}
    grid = _grid(offset, meta["BLOCK_P"])
    return Launch(warp_forward_kernel, grid, _sizes(frame, offset, margin), constants, num_warps)


@lru_cache(maxsize=1024)
def _backward_launch(
    frame: torch.Size,
    offset: torch.Size,
    margin: int,
    types: tuple[torch.dtype, torch.dtype, torch.dtype],
    device_index: int,
    channels_last: bool,
    needs: tuple[bool, bool, bool],
) -> Launch:
    """The backward kernel for these shapes, types (grad, input, offset), device, layout of grad, and gradients."""
    meta = launch_meta(frame[1], types[1], backward=True)
    num_warps = meta.pop("num_warps")
    constants = {
        **dict(zip(("NEED_INPUT", "NEED_OFFSET", "NEED_BIAS"), needs, strict=True)),
        "BIAS_ROWS": BIAS_ROWS,
        "CHANNELS_LAST": channels_last,
        **meta,
    }
    grid = _grid(offset, meta["BLOCK_P"])
    return Launch(warp_backward_kernel, grid, _sizes(frame, offset, margin), constants, num_warps)


@lru_cache(maxsize=1024)
def _sums_launch(
    channels: int,
    values: int,
    types: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    device_index: int,
    cast_input: bool,
    need_bias: bool,
) -> Launch:
    """The kernel that finishes the sums, for these types (sums, input, gradient of bias)."""
    block_c = min(triton.next_power_of_2(channels), _SUMS_CHANNELS)
    constants = {
        "CAST_INPUT": cast_input,
        "NEED_BIAS": need_bias,
        "BIAS_ROWS": BIAS_ROWS,
        "BLOCK": _SUMS_VALUES,
        "BLOCK_C": block_c,
    }
    grid = max(
        triton.cdiv(values, _SUMS_VALUES) if cast_input else 0, triton.cdiv(channels, block_c) if need_bias else 0
    )
    return Launch(warp_backward_sums_kernel, int(grid), (channels, values), constants, num_warps=4)


def launch_meta(channels: int, dtype: torch.dtype, *, backward: bool) -> dict[str, Any]:
    """Block sizes: a thread loads 16 bytes of neighbouring channels; with few channels a program takes more samples."""
    wide = dtype == torch.float64
    values = _BACKWARD_VALUES[dtype.itemsize] if backward else _FORWARD_VALUES // (2 if wide else 1)
    num_warps = _BACKWARD_WARPS[dtype.itemsize] if backward else 4
    block_c = min(triton.next_power_of_2(channels), 64)
    # With 3 channels, more samples than half the threads need up to 193 registers and, on sm_100, stack.
    most_samples = 16 * num_warps if block_c <= 4 else 128
    return {
        "BLOCK_P": min(values // block_c, most_samples),
        "BLOCK_C": block_c,
        "ACC": tl.float64 if wide else tl.float32,
        "num_warps": num_warps,
    }


def _sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _grid(offset: torch.Size, block_p: int) -> int:
    """The number of programs, all on one axis (the others are limited to 65535), in order of image, then block."""
    return offset[0] * int(triton.cdiv(offset[2] * offset[3], block_p))


def _sizes(frame: torch.Size, offset: torch.Size, margin: int) -> _Sizes:
    return frame[1], offset[2], offset[3], frame[2], frame[3], margin


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current, if it is not."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
