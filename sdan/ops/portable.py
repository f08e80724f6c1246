"""The same sampling from elementary operators only: for exported files that must load without SDAN, and for higher
derivatives.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sdan.ops.rows import positions

_portable = False


@contextmanager
def portable_form() -> Iterator[None]:
    """Within it `sdan.ops` uses elementary PyTorch operators only: slower, but exportable anywhere (ONNX) and
    differentiable at will.
    """
    global _portable
    before, _portable = _portable, True
    try:
        yield
    finally:
        _portable = before


def enabled() -> bool:
    return _portable


def warp(input: Tensor, offset: Tensor, bias: Tensor | None, *, margin: int, relu: bool) -> Tensor:
    """output(p) = input(p + margin + offset(p)) + bias, then ReLU if asked; gathers each corner in turn."""
    channels, height, width = input.shape[1:]
    y, x = positions(offset, margin)
    top, left = y.detach().floor(), x.detach().floor()
    flat = input.flatten(2)
    output = torch.zeros_like(flat[:, :, :1])
    for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = torch.where(inside, row * width + column, 0).long().flatten(1)
            weight = torch.where(inside, weight_y * weight_x, 0).to(input.dtype).flatten(1)
            output = output + weight[:, None] * flat.gather(2, index[:, None].expand(-1, channels, -1))
    output = output.unflatten(2, tuple(offset.shape[2:]))
    output = torch.where(torch.isnan(offset).any(1, keepdim=True), float("nan"), output)
    output = output if bias is None else output + bias[:, None, None]
    return output.relu() if relu else output
