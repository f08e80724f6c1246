"""A float32 convolution to a few channels, for the offsets.

bfloat16 rounds an offset of 30 px to 1/8 px, so this layer is computed in float32, without TF32. cuDNN is slow at that
in channels-last, and at so few output channels. So on a GPU the layer is one matrix product, from the C values of a
pixel to the parts that they add to the K K outputs around it, and a sum of these parts.

Axes: N images, C input channels, (H, W) rows and columns, K the kernel size, T = Cout K K parts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sdan.ops import portable


def narrow_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv2d of the same size in the weight's type, whatever autocast says.

    Args:
        input: [N, C, H, W], the weight's type or a half type.
        weight: [Cout, C, K, K], K odd.
        bias: [Cout] or None.

    Returns:
        [N, Cout, H, W] in the weight's type.
    """
    with torch.autocast(input.device.type, enabled=False):
        if _as_product(input, weight):
            output: Tensor = _Products.apply(input, weight)
            return output if bias is None else output + bias[:, None, None]
        return F.conv2d(input.to(weight.dtype), weight, bias, padding=weight.shape[-1] // 2)


def _as_product(input: Tensor, weight: Tensor) -> bool:
    if not input.is_cuda or weight.dtype not in (torch.float32, torch.float64) or portable.enabled():
        return False
    return input.is_contiguous(memory_format=torch.channels_last)


class _Products(torch.autograd.Function):
    """The convolution without bias. Its backward pass, too, must ignore autocast: hence this class."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        num_images, _, height, width = input.shape
        with torch.autocast(input.device.type, enabled=False):
            parts_PT = _pixels(input, weight) @ _matrix(weight)
        parts_NTP = parts_PT.view(num_images, height * width, -1).transpose(1, 2).contiguous()
        return F.fold(parts_NTP, (height, width), weight.shape[-1], padding=weight.shape[-1] // 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        num_images, channels, height, width = input.shape
        kernel = weight.shape[-1]
        need_input, need_weight = ctx.needs_input_grad
        grad_input = grad_weight = None
        windows = F.pad(grad, [kernel // 2] * 4).unfold(2, kernel, 1).unfold(3, kernel, 1)
        grad_parts_PT = windows.permute(0, 2, 3, 1, 4, 5).reshape(num_images * height * width, -1)
        with torch.autocast(input.device.type, enabled=False):
            if need_input:
                pixels = (grad_parts_PT @ _matrix(weight).t()).to(input.dtype)
                grad_input = pixels.view(num_images, height, width, channels).permute(0, 3, 1, 2)
            if need_weight:
                sums = _pixels(input, weight).t() @ grad_parts_PT
                grad_weight = sums.view(channels, -1, kernel, kernel).transpose(0, 1).flip(2, 3)
        return grad_input, grad_weight


def _pixels(input: Tensor, weight: Tensor) -> Tensor:
    """[P, C]: the input's pixels in the weight's type."""
    return input.permute(0, 2, 3, 1).reshape(-1, input.shape[1]).to(weight.dtype)


def _matrix(weight: Tensor) -> Tensor:
    """[C, T]: the weight of each part. F.fold adds a part where a convolution would read: hence the flip."""
    return weight.flip(2, 3).transpose(0, 1).reshape(weight.shape[1], -1)
