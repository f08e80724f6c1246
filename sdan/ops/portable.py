"""The sampling in elementary PyTorch operators, for exported files that must load without SDAN and for higher
derivatives.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from sdan.ops.rows import positions

_portable = False


@contextmanager
def portable_form() -> Iterator[None]:
    """Inside this context `sdan.ops` uses only elementary PyTorch operators.

    They are slower, but can be exported anywhere (ONNX, `.pt2`) and have derivatives of every order. (Attention also
    needs `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` for derivatives beyond the first.)
    """
    global _portable
    before, _portable = _portable, True
    try:
        yield
    finally:
        _portable = before


def no_second_derivative(operator: str, instead: str) -> Callable[..., NoReturn]:
    """The backward pass of an operator's backward pass: an error that says to use `instead`."""

    def refuse(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            f"{operator}: expected a single backward pass, got a double backward (create_graph=True); use {instead}"
        )

    return refuse


def single_backward(
    gradients: Callable[[Any, list[Tensor]], tuple[Tensor | None, ...]], refuse: Callable[..., NoReturn]
) -> Callable[..., Any]:
    """The `backward` of an autograd.Function of one output, without derivatives of its own.

    Args:
        gradients: takes ctx and [the output's gradient, *ctx.saved_tensors]; it may empty the list to free memory.
        refuse: no_second_derivative's, for a backward pass with create_graph=True.
    """

    class Gradients(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, of: Any, *tensors: Tensor) -> tuple[Tensor | None, ...]:
            return gradients(of, list(tensors))

        backward = staticmethod(refuse)

    def backward(ctx: Any, grad: Tensor) -> Any:
        tensors = [grad, *ctx.saved_tensors]
        if torch.is_grad_enabled():  # create_graph=True
            return Gradients.apply(ctx, *tensors)
        ctx.maybe_clear_saved_tensors()
        del grad
        return gradients(ctx, tensors)

    return backward


def enabled() -> bool:
    """Whether the caller is inside `portable_form()`."""
    return _portable


def warp(input: Tensor, offset: Tensor, bias: Tensor | None, margin: int) -> Tensor:
    """output(p) = input(p + margin + offset(p)) + bias.

    Where gradients are recorded, it gathers one corner after the other, which has every derivative; else it is
    PyTorch's and ONNX's GridSample.
    """
    y, x = positions(offset, margin)
    output = _gathered(input, y, x) if torch.is_grad_enabled() else _grid_sampled(input, y, x)
    output = torch.where(torch.isnan(offset).any(1, keepdim=True), float("nan"), output)
    return output if bias is None else output + bias[:, None, None]


def _grid_sampled(input: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """input at (y, x) [N, H, W], 0 outside."""
    # At -1 and at the size the weights of the pixels inside are 0 already; an infinite position would give NaN.
    placed = [(2 * at.clamp(-1, size) + 1) / size - 1 for at, size in zip((y, x), input.shape[-2:], strict=True)]
    grid_NHW2 = torch.stack(placed[::-1], dim=-1)
    output = F.grid_sample(input.to(grid_NHW2.dtype), grid_NHW2, padding_mode="zeros", align_corners=False)
    return output.to(input.dtype)


def _gathered(input: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """input at (y, x) [N, H, W], 0 outside."""
    channels, height, width = input.shape[1:]
    top, left = y.detach().floor(), x.detach().floor()
    flat = input.flatten(2)
    output = torch.zeros_like(flat[:, :, :1])
    for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = torch.where(inside, row * width + column, 0).long().flatten(1)
            weight = torch.where(inside, weight_y * weight_x, 0).to(input.dtype).flatten(1)
            output = output + weight[:, None] * flat.gather(2, index[:, None].expand(-1, channels, -1))
    return output.unflatten(2, tuple(y.shape[1:]))
