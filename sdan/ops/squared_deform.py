"""Squared deformable convolution (SDAN, eq. 5): one offset for the whole convolution window.

Axes: N batch, C channels, H W rows and columns, K the (odd) kernel size. Offsets are (dy, dx) in input pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional


def bilinear_warp(input: Tensor, offset: Tensor) -> Tensor:
    """output(n, c, p) = input(n, c, p + offset(n, :, p)), bilinear, zero outside the image.

    Args:
        input: [N, C, H, W], any floating type.
        offset: [N, 2, H, W], (dy, dx) in pixels.

    Returns:
        [N, C, H, W] in input's type.
    """
    return _sample(input, offset, margin=0)


def squared_deform_conv2d(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """output(p) = bias + sum_k weight_k . input(p + k + offset(p)), bilinear, zero outside the image.

    Args:
        input: [N, Cin, H, W].
        offset: [N, 2, H, W], (dy, dx) in input pixels, one pair for the whole window.
        weight: [Cout, Cin, K, K], K odd.
        bias: [Cout] or None.

    Returns:
        [N, Cout, H, W].
    """
    kernel = weight.shape[-1]
    full = functional.conv2d(input, weight, padding=kernel - 1)
    output = _sample(full, offset, margin=kernel // 2)
    return output if bias is None else output + bias.to(output.dtype)[:, None, None]


def offset_mask(offset: Tensor, kernel: int = 1) -> Tensor:
    """1 where the sampling point p + offset(p) lies inside the image, else 0; not differentiable.

    Args:
        offset: [N, 2, H, W], (dy, dx) in pixels.
        kernel: size of the convolution window that the offset moves. The window then hangs over the border no further than
            an ordinary same-size convolution's does, so the mask is the same for every odd kernel.

    Returns:
        [N, 1, H, W] float32.
    """
    height, width = offset.shape[2:]
    y, x = _coordinates(offset.detach(), margin=0)
    return ((y >= 0) & (y <= height - 1) & (x >= 0) & (x <= width - 1)).to(torch.float32).unsqueeze(1)


def _coordinates(offset: Tensor, margin: int) -> tuple[Tensor, Tensor]:
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
    height, width = offset.shape[2:]
    rows = torch.arange(height, device=offset.device, dtype=offset.dtype).view(-1, 1) + margin
    columns = torch.arange(width, device=offset.device, dtype=offset.dtype) + margin
    return rows + offset[:, 0], columns + offset[:, 1]


def _sample(input: Tensor, offset: Tensor, margin: int) -> Tensor:
    num_images, channels, height, width = input.shape
    y, x = _coordinates(offset, margin)
    top, left = y.detach().floor(), x.detach().floor()
    rows = input.flatten(2)
    output = input.new_zeros((num_images, channels, offset.shape[2] * offset.shape[3]))
    for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = torch.where(inside, row * width + column, 0).long().flatten(1)
            weight = torch.where(inside, weight_y * weight_x, 0).to(input.dtype).flatten(1)
            output = output + weight[:, None] * rows.gather(2, index[:, None].expand(-1, channels, -1))
    return output.unflatten(2, tuple(offset.shape[2:]))
