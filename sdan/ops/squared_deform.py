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
from torch.nn import Parameter

from sdan.ops import portable, rows
from sdan.ops.backend import check_devices, check_warp, kernels, no_second_derivative, warp_op
from sdan.ops.full_conv import convolve, convolve_backward, full_conv2d, lowered


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
    if _is_eager(input, offset, weight, bias):
        return SquaredDeformConv2d.apply(input, offset, weight, bias)
    full = full_conv2d(input, weight)
    if portable.enabled():
        output = portable.warp(full, offset, None if bias is None else bias.to(full.dtype), weight.shape[-1] // 2)
    else:
        output = warp_op(full, offset, bias, weight.shape[-1] // 2)
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


def _is_eager(input: Tensor, offset: Tensor, *others: Tensor | None) -> bool:
    """Whether these are plain tensors and nothing traces the operators."""
    if portable.enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    plain = all(tensor is None or type(tensor) in (Tensor, Parameter) for tensor in (input, offset, *others))
    return plain and offset.numel() > 0


def _gradients(ctx: Any, tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of input, offset, weight and bias; autograd casts them to the types of these.

    Empties `tensors` (grad, input, offset, weight, full), so that full is freed before the convolution's gradients.
    """
    need_input, need_offset, need_weight, need_bias = ctx.needs_input_grad
    grad, input, offset, weight, full = tensors
    tensors.clear()
    needs = (need_input or need_weight, need_offset, need_bias)
    grad_full, grad_offset, grad_bias = kernels(full).warp_backward(
        grad, full, offset, ctx.margin, needs, ctx.bias_type
    )
    del grad, full
    grad_input = grad_weight = None
    if grad_full is not None:
        grad_input, grad_weight = convolve_backward(grad_full, input, weight, need_input, need_weight)
    return grad_input, grad_offset, grad_weight, grad_bias


class SquaredDeformConv2d(torch.autograd.Function):
    """The whole operator as one step of autograd: `apply(input, offset, weight, bias)`.

    It computes what the custom operator and the convolution compute together. Each call of a custom operator costs 0.3
    to 0.6 ms of Python on top of the kernels, so eager code does without.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        channels_last = input.is_contiguous(memory_format=torch.channels_last)
        input, weight = lowered(input, weight)
        full = convolve(input, weight)
        ctx.margin, ctx.bias_type = weight.shape[-1] // 2, None if bias is None else bias.dtype
        ctx.save_for_backward(input, offset, weight, full)
        output: Tensor = kernels(full).warp(full, offset, bias, ctx.margin, channels_last=channels_last)
        return output

    backward = staticmethod(portable.single_backward(_gradients, no_second_derivative))


def _check_conv(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 != 1:
        raise ValueError(f"weight.shape: expected [Cout, Cin, K, K] with K odd, got {tuple(weight.shape)}")
    check_warp(input, offset, None, margin=0)
    if input.shape[1] != weight.shape[1]:
        raise ValueError(f"weight.shape[1]: expected input's {input.shape[1]} channels, got {weight.shape[1]}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias.shape: expected ({weight.shape[0]},), one per output channel, got {tuple(bias.shape)}")
    check_devices(input, weight=weight, bias=bias)
    if torch.is_autocast_enabled(input.device.type):
        return  # the convolution casts both
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"{name}.dtype: expected input's {input.dtype}, got {tensor.dtype}")
