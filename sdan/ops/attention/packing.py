"""Packing for cross packing attention in plain PyTorch, with what surrounds it, for CPUs and old GPUs.

Packing turns each K x K window of an image into one position with K^2 C values; a token holds one of these values at
all P = H/K W/K positions. `sdan.ops.attention.triton_packing` has the same functions for recent GPUs.

Attention gives the same result for any order of the tokens, so the order follows the image's layout, for which reading
and writing is fast: row, column, channel for channels-last images, and row, channel, column for contiguous ones.

Axes: N images, C channels, (H, W) rows and columns, L = K^2 C tokens, P positions. All images must be in the packing's
layout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Size of the windows, and layout of the images."""

    kernel: int
    """K; divides H and W."""
    channels_last: bool

    @property
    def memory_format(self) -> torch.memory_format:
        """The images' layout as an argument of `Tensor.contiguous`."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def token_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """[N, L, P] for images [N, C, H, W]."""
        num_images, channels, height, width = shape
        return num_images, channels * self.kernel**2, height // self.kernel * (width // self.kernel)


def pack(x_NCHW: Tensor, packing: Packing) -> tuple[Tensor, Tensor | None]:
    """The tokens [N, L, P], and their negative or None."""
    tokens = x_NCHW.new_empty(packing.token_shape(x_NCHW.shape))
    _windows(tokens, x_NCHW.shape, packing).copy_(_split(x_NCHW, packing))
    return tokens, None


def unpack(x_NCHW: Tensor, attended_NLP: Tensor, gamma: Tensor, packing: Packing, *, relu: bool) -> Tensor:
    """[ReLU](x + gamma unpacked(attended)), in x's type."""
    out = torch.empty_like(x_NCHW, memory_format=packing.memory_format)
    windows = _windows(attended_NLP, x_NCHW.shape, packing)
    torch.addcmul(_split(x_NCHW, packing), windows, gamma.to(x_NCHW.dtype), out=_split(out, packing))
    return out.relu_() if relu else out


def pack_gradient(
    grad_NCHW: Tensor,
    out_NCHW: Tensor | None,
    tokens_NLP: Tensor,
    attended_NLP: Tensor,
    gamma: Tensor,
    packing: Packing,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What the backward pass of the attention needs, with g = grad, but 0 where the ReLU's output is 0.

    Args:
        out_NCHW: the output of `unpack` if it had a ReLU, else None.

    Returns:
        gamma packed(g), -tokens or None, and numbers whose sum is the gradient of gamma.
    """
    grad_tokens, _ = pack(_after_relu(grad_NCHW, out_NCHW), packing)
    products = grad_tokens * attended_NLP
    parts = products.sum(dtype=torch.promote_types(products.dtype, torch.float32))
    return grad_tokens.mul_(gamma.to(grad_tokens.dtype)), None, parts


def unpack_gradient(
    grad_NCHW: Tensor,
    out_NCHW: Tensor | None,
    grads_NLP: tuple[Tensor, ...],
    parts: Tensor,
    gamma: Tensor,
    packing: Packing,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and gamma.

    Args:
        grads_NLP: (dX,), or (dV, dK, dQ), as from `sdan.ops.attention.packed.attend_backward`.
        parts: from `pack_gradient`.
    """
    total = grads_NLP[0] if len(grads_NLP) == 1 else grads_NLP[0] + grads_NLP[1] - grads_NLP[2]
    grad_x = torch.empty_like(grad_NCHW, memory_format=packing.memory_format)
    windows = _windows(total, grad_NCHW.shape, packing)
    torch.add(_split(_after_relu(grad_NCHW, out_NCHW), packing), windows, out=_split(grad_x, packing))
    return grad_x, parts.sum().to(gamma.dtype).view_as(gamma)


def _after_relu(grad_NCHW: Tensor, out_NCHW: Tensor | None) -> Tensor:
    return grad_NCHW if out_NCHW is None else torch.ops.aten.threshold_backward(grad_NCHW, out_NCHW, 0)


def _split(image_NCHW: Tensor, packing: Packing) -> Tensor:
    """The image as [N, C, H/K, K, W/K, K]; a view."""
    num_images, channels, height, width = image_NCHW.shape
    kernel = packing.kernel
    return image_NCHW.view(num_images, channels, height // kernel, kernel, width // kernel, kernel)


def _windows(tokens_NLP: Tensor, shape: Sequence[int], packing: Packing) -> Tensor:
    """The tokens as [N, C, H/K, K, W/K, K], for images of this shape; a view."""
    num_images, channels, height, width = shape
    kernel = packing.kernel
    positions = height // kernel, width // kernel
    if packing.channels_last:
        return tokens_NLP.view(num_images, kernel, kernel, channels, *positions).permute(0, 3, 4, 1, 5, 2)
    return tokens_NLP.view(num_images, kernel, channels, kernel, *positions).permute(0, 2, 4, 1, 5, 3)
