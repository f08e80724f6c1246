"""Upsampling as one operator: convolution, bias, pixel shuffle and ReLU.

On a GPU, `torch.nn.functional.pixel_shuffle` returns a contiguous map even if its input is channels-last, and all later
layers convert it. Channels-last maps on a GPU therefore take another way: the convolution's output channels are grouped
by place, by a permutation of its small weight, and `shuffle` (on recent GPUs `triton_shuffle`) does the rest in one
pass each way.

Axes: N images, C channels, (H, W) rows and columns, r the factor, K the kernel size.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sdan.ops import backend, portable, rows
from sdan.ops.attention.packed import runs_eagerly
from sdan.ops.upsampling import shuffle


def conv_shuffle(x_NCHW: Tensor, weight: Tensor, bias: Tensor | None, factor: int, *, relu: bool = False) -> Tensor:
    """[ReLU](pixel_shuffle(conv2d(x, weight, bias), r)), with a convolution of the same size.

    Args:
        x_NCHW: [N, Cin, H, W], any floating type.
        weight: [C r r, Cin, K, K], K odd.
        bias: [C r r] or None.
        factor: r.
        relu: whether to apply ReLU.

    Returns:
        [N, C, r H, r W] in the layout of `conv2d`'s output (on a GPU without channels-last input: contiguous). Autocast
        treats it like `conv2d`. Once differentiable.
    """
    if not _keeps_channels_last(x_NCHW):
        y = F.pixel_shuffle(F.conv2d(x_NCHW, weight, bias, padding=weight.shape[-1] // 2), factor)
        return F.relu(y, inplace=True) if relu else y
    if runs_eagerly(x_NCHW):
        return _ConvShuffle.apply(x_NCHW, weight, bias, factor, relu)
    return _traced(x_NCHW, weight, bias, factor, relu)


def _traced(x_NCHW: Tensor, weight: Tensor, bias: Tensor | None, factor: int, relu: bool) -> Tensor:
    """For torch.compile, which makes one kernel of all that follows the convolution."""
    y = F.conv2d(x_NCHW, _grouped(weight, factor, weight.dtype), padding=weight.shape[-1] // 2)
    if bias is not None:
        y = y + bias.unflatten(0, (-1, factor**2)).t().flatten()[:, None, None].to(y.dtype)
    places = y.unflatten(1, (factor, factor, -1)).permute(0, 3, 4, 1, 5, 2)
    out = places.flatten(4, 5).flatten(2, 3).contiguous(memory_format=torch.channels_last)
    return torch.relu(out) if relu else out


def _keeps_channels_last(x: Tensor) -> bool:
    """Whether x is a channels-last map on a GPU; the CPU's own pixel shuffle keeps channels-last."""
    return x.is_cuda and x.is_contiguous(memory_format=torch.channels_last) and not portable.enabled()


def _grouped(weight: Tensor, factor: int, dtype: torch.dtype) -> Tensor:
    """The weight with its output channels grouped by place, channels-last; one copy."""
    return _swapped(weight.permute(0, 2, 3, 1).unflatten(0, (-1, factor**2)), dtype)


def _ungrouped(weight: Tensor, factor: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `_grouped`."""
    return _swapped(weight.permute(0, 2, 3, 1).unflatten(0, (factor**2, -1)), dtype)


def _swapped(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """[A, B, K, K, Cin] -> channels-last [B A, Cin, K, K]."""
    swapped = parts.transpose(0, 1).to(dtype, memory_format=torch.contiguous_format)
    return swapped.flatten(0, 1).permute(0, 3, 1, 2)


def _kernels(x: Tensor) -> ModuleType:
    """The module that shuffles on this tensor's device."""
    return shuffle if backend.kernels(x) is rows or x.numel() == 0 else _triton_shuffle()


@functools.cache
def _triton_shuffle() -> ModuleType:
    return importlib.import_module("sdan.ops.upsampling.triton_shuffle")


def _gradients(ctx: Any, tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias; autograd casts that of x to its type.

    Empties `tensors` (grad, x, grouped weight, out or None, weight), to free the large maps before the convolution's
    gradients.
    """
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad, x, grouped, out, weight = tensors
    tensors.clear()
    grad = grad.contiguous(memory_format=torch.channels_last)
    grad_y, grad_bias = _kernels(grad).shuffle_gradient(grad, out, ctx.factor, need_bias=need_bias)
    del grad, out
    padding, needs = [weight.shape[-1] // 2] * 2, [need_x, need_weight, False]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        grad_y, x, grouped, None, [1, 1], padding, [1, 1], False, [0, 0], 1, needs
    )
    if need_weight:
        grad_weight = _ungrouped(grad_weight, ctx.factor, weight.dtype)
    return grad_x, grad_weight, None if grad_bias is None else grad_bias.to(ctx.of_bias), None, None


_no_second_derivative = portable.no_second_derivative("conv_shuffle", "`with sdan.ops.portable_form():`")


class _ConvShuffle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factor: int, relu: bool) -> Tensor:
        ctx.factor, ctx.of_bias, device = factor, None if bias is None else bias.dtype, x.device.type
        lower = torch.is_autocast_enabled(device) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if lower else weight.dtype
        x, grouped = x.to(dtype) if lower else x, _grouped(weight, factor, dtype)
        with torch.autocast(device, enabled=False):
            y = torch.conv2d(x, grouped, padding=weight.shape[-1] // 2).contiguous(memory_format=torch.channels_last)
            out: Tensor = _kernels(y).shuffle(y, bias, factor, relu=relu)
        ctx.save_for_backward(x, grouped, out if relu else None, weight)
        return out

    backward = staticmethod(portable.single_backward(_gradients, _no_second_derivative))
