"""Bias, pixel shuffle and ReLU after a convolution, in plain PyTorch, for channels-last maps.

The convolution's output channels are grouped by place: first all C channels of the cell's first pixel, then all of the
second, row by row. A row of a cell is then one run of r C values, both before and after the shuffle, so the shuffle is
one copy of such runs and its result is channels-last again. `sdan.ops.upsampling.triton_shuffle` has the same functions
for recent GPUs.

Axes: N images, C channels, (H, W) rows and columns, r the factor.
"""

import torch
from torch import Tensor


def shuffle(y: Tensor, bias: Tensor | None, factor: int, *, relu: bool) -> Tensor:
    """[ReLU](the pixel shuffle of y + bias).

    Args:
        y: [N, r r C, H, W], channels-last, its channels grouped by place.
        bias: [C r r] in the order of `torch.nn.functional.pixel_shuffle`, or None.

    Returns:
        [N, C, r H, r W], channels-last, y's type.
    """
    num_images, values, height, width = y.shape
    if bias is not None:
        y = y + bias.unflatten(0, (-1, factor**2)).t().flatten()[:, None, None].to(y.dtype)
    cells = y.permute(0, 2, 3, 1).view(num_images, height, width, factor, values // factor)
    rows = cells.transpose(2, 3).reshape(num_images, height * factor, width * factor, values // factor**2)
    out = rows.permute(0, 3, 1, 2)
    return torch.relu(out) if relu else out


def shuffle_gradient(grad: Tensor, out: Tensor | None, factor: int, *, need_bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of y, channels-last, and of the bias, at least float32, or None.

    Args:
        grad: [N, C, r H, r W], channels-last.
        out: what `shuffle` returned if it had a ReLU, else None.
    """
    num_images, channels, height, width = grad.shape
    grad = grad if out is None else torch.ops.aten.threshold_backward(grad, out, 0)
    rows = grad.permute(0, 2, 3, 1).view(num_images, height // factor, factor, width // factor, factor * channels)
    cells = rows.transpose(2, 3).reshape(num_images, height // factor, width // factor, factor**2 * channels)
    if not need_bias:
        return cells.permute(0, 3, 1, 2), None
    sums = cells.sum((0, 1, 2), dtype=torch.promote_types(grad.dtype, torch.float32))
    return cells.permute(0, 3, 1, 2), sums.unflatten(0, (-1, channels)).t().flatten()
