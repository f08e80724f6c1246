"""Launches the Triton kernels on a GPU or under Triton's interpreter: `warp` and `warp_backward` as in `sdan.ops.rows`.

The launch ensures what the kernels assume: channels-last inputs, contiguous offsets, and the tensors' GPU as the
current device (`torch.cuda.device`). Triton launches on PyTorch's current stream of that device.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdan.ops import rows
from sdan.ops.triton_kernels import warp_backward_kernel, warp_forward_kernel

_FORWARD_VALUES = 1024
"""Values per program and corner: 8 per thread at 4 warps, for 128-bit loads (see benchmarks/compile_report.py)."""
_BACKWARD_VALUES = {8: 256, 4: 512, 2: 256}
"""The same for the backward pass, by bytes per value: the largest that do not spill registers on sm_80."""


def warp(input: Tensor, offset: Tensor, bias: Tensor | None, margin: int) -> Tensor:
    """output(p) = bias + sum over the four corners q of weight(p, q) input(q)."""
    input, offset = input.contiguous(memory_format=torch.channels_last), offset.contiguous()
    num_images, _, height, width = offset.shape
    output = input.new_empty((num_images, height, width, input.shape[1])).permute(0, 3, 1, 2)
    meta = launch_meta(input.shape[1], input.dtype, backward=False)
    with _on(input):
        warp_forward_kernel[(_grid(offset, meta["BLOCK_P"]),)](
            input,
            offset,
            bias if bias is not None else input,  # never read without HAS_BIAS
            output,
            *_sizes(input, offset, margin),
            HAS_BIAS=bias is not None,
            **meta,
        )
    return output


def warp_backward(
    grad: Tensor, input: Tensor, offset: Tensor, margin: int, *, need_input: bool, need_offset: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of `warp` with respect to input and offset; an empty tensor for a gradient that is not needed.

    Atomics sum grad_input, so its rounding varies from run to run. Under `torch.use_deterministic_algorithms(True)`
    it comes from `rows.scatter`, which sorts instead.
    """
    grad = grad.contiguous(memory_format=torch.channels_last)
    input, offset = input.contiguous(memory_format=torch.channels_last), offset.contiguous()
    atomics = need_input and not torch.are_deterministic_algorithms_enabled()
    num_images, channels, frame_height, frame_width = input.shape
    acc = torch.float64 if input.dtype == torch.float64 else torch.float32
    sums = grad.new_zeros((num_images, frame_height, frame_width, channels) if atomics else (0,), dtype=acc)
    grad_offset = offset.new_empty(offset.shape) if need_offset else offset.new_empty(0)
    meta = launch_meta(channels, input.dtype, backward=True)
    if atomics or need_offset:
        with _on(input):
            warp_backward_kernel[(_grid(offset, meta["BLOCK_P"]),)](
                grad,
                input,
                offset,
                sums,
                grad_offset,
                *_sizes(input, offset, margin),
                NEED_INPUT=atomics,
                NEED_OFFSET=need_offset,
                **meta,
            )
    if need_input and not atomics:
        corners = rows.find_corners(offset, (frame_height, frame_width), margin)
        sums = rows.scatter(rows.to_rows(grad), corners, num_images * frame_height * frame_width)
    if not need_input:
        return grad.new_empty(0), grad_offset
    return rows.from_rows(sums.view(-1, channels), num_images, (frame_height, frame_width)).to(input.dtype), grad_offset


def launch_meta(channels: int, dtype: torch.dtype, *, backward: bool) -> dict[str, Any]:
    """Block sizes: a thread loads 16 bytes of neighbouring channels; with few channels a program takes more samples."""
    wide = dtype == torch.float64
    values = _BACKWARD_VALUES[dtype.itemsize] if backward else _FORWARD_VALUES // (2 if wide else 1)
    block_c = min(triton.next_power_of_2(channels), 64)
    # For 3 channels of float16, 128 samples need 96 registers and, on sm_100, 8 bytes of stack; 64 samples need 56 and
    # none.
    most_samples = 64 if block_c <= 4 and not backward else 128
    return {
        "BLOCK_P": min(values // block_c, most_samples),
        "BLOCK_C": block_c,
        "ACC": tl.float64 if wide else tl.float32,
        "num_warps": 4,
    }


def _grid(offset: Tensor, block_p: int) -> int:
    """The number of programs, all on one axis (the others are limited to 65535), in order of image, then block."""
    return offset.shape[0] * triton.cdiv(offset.shape[2] * offset.shape[3], block_p)


def _sizes(input: Tensor, offset: Tensor, margin: int) -> tuple[int, ...]:
    return input.shape[1], offset.shape[2], offset.shape[3], input.shape[2], input.shape[3], margin


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
