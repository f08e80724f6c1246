"""The full convolution: every window that touches the image, including windows that extend past its border."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdan.ops.rows import channels_last

_BAND_VALUES = 2**20
"""Input values in one band of the weight gradient: 4 MB in float32."""


def full_conv2d(input: Tensor, weight: Tensor) -> Tensor:
    """y(p) = sum_k weight_k . input(p + k) for every p whose window touches the image.

    Args:
        input: [N, Cin, H, W].
        weight: [Cout, Cin, K, K], K odd.

    Returns:
        [N, Cout, H + K - 1, W + K - 1], channels-last. Autocast treats it like `conv2d`.
    """
    device_type = input.device.type
    if torch.is_autocast_enabled(device_type) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        input, weight = input.to(dtype), weight.to(dtype)
    if device_type == "cpu":
        return _FullConv2d.apply(input, weight)
    return _convolve(input, weight)  # cuDNN does not have the slow case that _FullConv2d avoids


def _convolve(input: Tensor, weight: Tensor) -> Tensor:
    input = channels_last(input)
    weight = weight.contiguous(memory_format=torch.channels_last)
    return functional.conv2d(input, weight, padding=weight.shape[-1] - 1)


class _FullConv2d(torch.autograd.Function):
    """The full convolution with a fast weight gradient on the CPU.

    oneDNN's weight gradient takes 3-5 times as long when the padding exceeds K // 2, so the backward pass pads the
    input itself. The forward pass and the input gradient have no such slow case.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _convolve(input, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        grad = channels_last(grad)
        grad_input = grad_weight = None
        if ctx.needs_input_grad[1]:  # first, to free its padded copy before grad_input is allocated
            grad_weight = _weight_gradient(grad, input, weight)
        if ctx.needs_input_grad[0]:
            # The transpose of the full convolution is the valid one with the kernel rotated by 180 degrees.
            rotated = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
            grad_input = functional.conv2d(grad, rotated)
        return grad_input, grad_weight


def _weight_gradient(grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """Sums over bands of rows, so that the padded copy and oneDNN's scratch memory are needed for one band only."""
    num_images, channels, height, width = input.shape
    if torch.compiler.is_compiling():  # loops would fix the sizes
        return _band_gradient(grad, input, weight, 0, grad.shape[2])
    images = max(1, _BAND_VALUES // max(1, channels * height * width))
    rows = max(1, _BAND_VALUES // max(1, images * channels * width))
    total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    input = channels_last(input)
    for first in range(0, num_images, images):
        some = slice(first, first + images)
        for top in range(0, grad.shape[2], rows):
            total += _band_gradient(grad[some], input[some], weight, top, min(top + rows, grad.shape[2]))
    return total.to(weight.dtype)


def _band_gradient(grad: Tensor, input: Tensor, weight: Tensor, top: int, bottom: int) -> Tensor:
    """The part of the weight gradient from rows top to bottom (exclusive) of y.

    Row r of y depends on rows r - (K - 1) to r of the input.
    """
    num_images, channels, height, width = input.shape
    reach, half = weight.shape[-1] - 1, weight.shape[-1] // 2
    padded = input.new_zeros((num_images, bottom - top + reach, width + 2 * half, channels)).permute(0, 3, 1, 2)
    low, high = max(top - reach, 0), min(bottom, height)
    padded[:, :, low - top + reach : high - top + reach, half : half + width] = input[:, :, low:high]
    return torch.ops.aten.convolution_backward(
        grad[:, :, top:bottom], padded, weight, None, (1, 1), (0, half), (1, 1), False, (0, 0), 1, (False, True, False)
    )[1]
