"""Squared deformable convolution (SDAN, eq. 5): one offset for the whole convolution window.

    output(p) = bias + sum_k weight_k . input(p + k + offset(p))        bilinear, zero outside the image

Since one offset serves the whole window, the input is convolved first and sampled once:
y = conv2d(input, weight, padding=K-1), then output(p) = y(p + K//2 + offset(p)). The vendor's library convolves; the
operator `sdan::bilinear_warp` samples, with four reads per value instead of 4 K K and without an im2col buffer.

Axes: N batch, C channels, H W rows and columns, K the (odd) kernel size. Offsets are (dy, dx) in input pixels.
"""

from typing import Any

import torch
from torch import Tensor

from sdan.ops import portable, rows
from sdan.ops.backend import kernels
from sdan.ops.full_conv import full_conv2d

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def squared_deform_conv2d(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """output(p) = bias + sum_k weight_k . input(p + k + offset(p)), bilinear, zero outside the image (paper, eq. 5).

    Equals `torchvision.ops.deform_conv2d(input, offset.repeat(1, K * K, 1, 1), weight, bias, padding=K // 2)`, border
    rule included. (As printed, eq. 5 adds p twice and indexes the weight by position. This function follows the
    paper's text and the authors' code.)

    Args:
        input: [N, Cin, H, W], float64, float32, bfloat16 or float16.
        offset: [N, 2, H, W], (dy, dx) in input pixels, one pair for the whole window; input's type or float32.
            Positions are computed in at least float32. An infinite offset samples outside the image (0); a NaN makes
            the output NaN at its own pixel only.
        weight: [Cout, Cin, K, K], K odd; stride 1, "same" size.
        bias: [Cout] or None.

    Returns:
        [N, Cout, H, W]; channels-last if input is. Under autocast the convolution runs in the lower type and offsets
        stay float32. Once differentiable.

    Raises:
        ValueError, TypeError: shapes, devices or types do not match.
    """
    if torch.is_autocast_enabled(input.device.type) and offset.dtype in (torch.bfloat16, torch.float16):
        offset = offset.float()  # autocast may have lowered offset but not input, which _check_conv would refuse
    _check_conv(input, offset, weight, bias)
    full = full_conv2d(input, weight)
    bias = None if bias is None else bias.to(full.dtype)
    margin = weight.shape[-1] // 2
    sample = portable.warp if portable.enabled() else _warp_op
    output = sample(full, offset, bias, margin)
    # Like conv2d, return channels-last only if the input is, so that later layers keep their layout.
    return output if input.is_contiguous(memory_format=torch.channels_last) else output.contiguous()


def offset_mask(offset: Tensor) -> Tensor:
    """M of eq. 6: 1 where the sampling point p + offset(p) lies inside the image, else 0; not differentiable.

    M does not depend on the kernel size: while the window's centre is inside the image, the window extends past the
    border no further than in an ordinary same-size convolution.

    Args:
        offset: [N, 2, H, W], (dy, dx) in pixels.

    Returns:
        [N, 1, H, W] float32; 0 for NaN and infinite offsets.
    """
    if offset.dim() != 4 or offset.shape[1] != 2:
        raise ValueError(f"offset.shape: expected [N, 2, H, W] with (dy, dx), got {tuple(offset.shape)}")
    y, x = rows.positions(offset.detach(), margin=0)
    height, width = offset.shape[2:]
    return ((y >= 0) & (y <= height - 1) & (x >= 0) & (x <= width - 1)).to(torch.float32).unsqueeze(1)


@torch.library.custom_op("sdan::bilinear_warp", mutates_args=())
def _warp_op(input: Tensor, offset: Tensor, bias: Tensor | None, margin: int) -> Tensor:
    """Sample `input`, which is `margin` pixels larger than the output on each side; the output is channels-last."""
    _check_warp(input, offset, bias, margin)
    if offset.numel() == 0:
        return _warp_fake(input, offset, bias, margin)
    return kernels(input).warp(input, offset, bias, margin)


@_warp_op.register_fake
def _warp_fake(input: Tensor, offset: Tensor, bias: Tensor | None, margin: int) -> Tensor:
    num_images, _, height, width = offset.shape
    return _empty_channels_last(input, (num_images, input.shape[1], height, width))


@torch.library.custom_op("sdan::bilinear_warp_backward", mutates_args=())
def _backward_op(
    grad: Tensor, input: Tensor, offset: Tensor, margin: int, need_input: bool, need_offset: bool
) -> tuple[Tensor, Tensor]:
    """(grad_input, grad_offset), channels-last and contiguous; a gradient that is not needed is an empty tensor."""
    if offset.numel() == 0:
        return tuple(zeros.zero_() for zeros in _backward_fake(grad, input, offset, margin, need_input, need_offset))
    return kernels(input).warp_backward(grad, input, offset, margin, need_input=need_input, need_offset=need_offset)


@_backward_op.register_fake
def _backward_fake(
    grad: Tensor, input: Tensor, offset: Tensor, margin: int, need_input: bool, need_offset: bool
) -> tuple[Tensor, Tensor]:
    grad_input = _empty_channels_last(input, input.shape) if need_input else grad.new_empty(0)
    grad_offset = offset.new_empty(offset.shape) if need_offset else offset.new_empty(0)
    return grad_input, grad_offset


def _empty_channels_last(like: Tensor, shape: Any) -> Tensor:
    num_images, channels, height, width = shape
    return like.new_empty((num_images, height, width, channels)).permute(0, 3, 1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, bias, ctx.margin = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, offset)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, offset = ctx.saved_tensors
    need_input, need_offset = ctx.needs_input_grad[:2]
    grad_input = grad_offset = grad_bias = None
    if need_input or need_offset:
        grad_input, grad_offset = _backward_op(grad, input, offset, ctx.margin, need_input, need_offset)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_input if need_input else None, grad_offset if need_offset else None, grad_bias, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "sdan::bilinear_warp: expected a single backward pass, got a double backward (create_graph=True); "
        "use `with sdan.ops.portable_form():`, which has every derivative"
    )


_warp_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(_no_second_derivative)


def _autocast(input: Tensor, offset: Tensor, bias: Tensor | None, margin: int) -> Tensor:
    """Input keeps its type, bias takes input's type, and offsets are raised to float32: at 100 px bfloat16 resolves
    only half a pixel.
    """
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32)) if input.dtype != torch.float64 else offset
    bias = None if bias is None else bias.to(input.dtype)
    with torch.amp.autocast(input.device.type, enabled=False):
        return _warp_op(input, offset, bias, margin)


_library = torch.library.Library("sdan", "FRAGMENT")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("bilinear_warp", _autocast, _key)


def _check_warp(input: Tensor, offset: Tensor, bias: Tensor | None, margin: int) -> None:
    """Raise unless the kernels can read these tensors safely."""
    if input.dim() != 4 or offset.dim() != 4:
        raise ValueError(f"input.dim(), offset.dim(): expected 4 and 4, got {input.dim()} and {offset.dim()}")
    if offset.shape[1] != 2:
        raise ValueError(f"offset.shape[1]: expected 2 (dy, dx) for the whole window, got {offset.shape[1]}")
    if offset.shape[0] != input.shape[0]:
        raise ValueError(f"offset.shape[0]: expected input's batch size {input.shape[0]}, got {offset.shape[0]}")
    size, got = (input.shape[2] - 2 * margin, input.shape[3] - 2 * margin), (offset.shape[2], offset.shape[3])
    if got != size:
        raise ValueError(f"offset.shape[2:]: expected the output's size {size}, got {got}")
    if bias is not None and bias.shape != (input.shape[1],):
        raise ValueError(f"bias.shape: expected ({input.shape[1]},), got {tuple(bias.shape)}")
    if input.dtype not in _FLOATS:
        raise TypeError(f"input.dtype: expected one of {', '.join(map(str, _FLOATS))}, got {input.dtype}")
    if offset.dtype not in (input.dtype, torch.float32):
        raise TypeError(f"offset.dtype: expected input's {input.dtype} or torch.float32, got {offset.dtype}")
    _check_devices(input, offset=offset, bias=bias)


def _check_conv(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 != 1:
        raise ValueError(f"weight.shape: expected [Cout, Cin, K, K] with K odd, got {tuple(weight.shape)}")
    _check_warp(input, offset, None, margin=0)
    if input.shape[1] != weight.shape[1]:
        raise ValueError(f"weight.shape[1]: expected input's {input.shape[1]} channels, got {weight.shape[1]}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias.shape: expected ({weight.shape[0]},), one per output channel, got {tuple(bias.shape)}")
    _check_devices(input, weight=weight, bias=bias)
    if torch.is_autocast_enabled(input.device.type):
        return  # the convolution casts both
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"{name}.dtype: expected input's {input.dtype}, got {tensor.dtype}")


def _check_devices(input: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name}.device: expected input's {input.device}, got {tensor.device}")
