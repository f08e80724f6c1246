"""Cross packing attention (CPA) as one operator: pack, attend, unpack, add, and ReLU.

    out = [ReLU](x + gamma unpacked(attention(packed(x))))

The backward pass needs the output, the tokens and what the attention returned. One kernel each packs and unpacks, with
everything around it (`triton_packing`; in plain PyTorch, `packing`), and `packed` attends.

Axes: N images, C channels, (H, W) rows and columns, L tokens, P positions.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sdan.ops import backend, portable, rows
from sdan.ops.attention import packed, packing
from sdan.ops.attention.packing import Packing


def cross_packing(x_NCHW: Tensor, gamma: Tensor, kernel: int, *, relu: bool = False) -> Tensor:
    """[ReLU](x + gamma attention(x)): attention between the values of K x K windows.

    Args:
        x_NCHW: [N, C, H, W], any floating type.
        gamma: [1], any floating type.
        kernel: K, must divide H and W.
        relu: whether to apply ReLU.

    Returns:
        [N, C, H, W] in x's type and layout. Once differentiable. Autocast does not change the type; logits are float32.
    """
    if portable.enabled():
        return _portable(x_NCHW, gamma, kernel, relu)
    channels_last = x_NCHW.is_contiguous(memory_format=torch.channels_last)
    if packed.runs_eagerly(x_NCHW):
        return _CrossPacking.apply(x_NCHW, gamma, kernel, relu, channels_last)
    return _cross_packing_op(x_NCHW, gamma, kernel, relu, channels_last)[0]


def _portable(x_NCHW: Tensor, gamma: Tensor, kernel: int, relu: bool) -> Tensor:
    tokens = F.pixel_unshuffle(x_NCHW, kernel)
    attended = F.pixel_shuffle(packed.packed_attention(tokens.flatten(2)).view_as(tokens), kernel)
    # Cast to x's type: under autocast a float32 gamma would promote all following layers to float32.
    out = x_NCHW + gamma.to(x_NCHW.dtype) * attended.to(x_NCHW.dtype)
    return F.relu(out) if relu else out


def _kernels(x: Tensor) -> ModuleType:
    """The module that packs on this tensor's device."""
    return packing if backend.kernels(x) is rows or x.numel() == 0 else _triton_packing()


@functools.cache
def _triton_packing() -> ModuleType:
    return importlib.import_module("sdan.ops.attention.triton_packing")


def _forward(x: Tensor, gamma: Tensor, how: Packing, relu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, tokens, attended, log_sum)."""
    x = x.contiguous(memory_format=how.memory_format)
    kernels = _kernels(x)
    tokens, negated = kernels.pack(x, how)
    attended, log_sum = packed.attend(tokens, negated)
    del negated
    return kernels.unpack(x, attended, gamma, how, relu=relu), tokens, attended, log_sum


def _backward(
    grad: Tensor, out: Tensor | None, gamma: Tensor, tokens: Tensor, attended: Tensor, log_sum: Tensor, how: Packing
) -> tuple[Tensor, Tensor]:
    """The gradients of x and gamma; `out` only if it had a ReLU."""
    grad = grad.contiguous(memory_format=how.memory_format)
    kernels = _kernels(grad)
    grad_tokens, negated, parts = kernels.pack_gradient(grad, out, tokens, attended, gamma, how)
    grads = packed.attend_backward(grad_tokens, tokens, negated, attended, log_sum)
    del grad_tokens, negated
    return kernels.unpack_gradient(grad, out, grads, parts, gamma, how)


class _CrossPacking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, kernel: int, relu: bool, channels_last: bool) -> Tensor:
        ctx.how = Packing(kernel, channels_last)
        out, tokens, attended, log_sum = _forward(x, gamma, ctx.how, relu)
        ctx.save_for_backward(out if relu else None, gamma, tokens, attended, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, gamma, *rest = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a double backward, which the operator refuses in a sentence
            return *_backward_op(grad, out, gamma, *rest, *ctx.how), None, None, None
        tokens, attended, log_sum = rest
        return *_backward(grad, out, gamma, tokens, attended, log_sum, ctx.how), None, None, None


@torch.library.custom_op("sdan::cross_packing", mutates_args=())
def _cross_packing_op(
    x: Tensor, gamma: Tensor, kernel: int, relu: bool, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, tokens, attended, log_sum); `channels_last`: the layout of out."""
    return _forward(x, gamma, Packing(kernel, channels_last), relu)


@_cross_packing_op.register_fake
def _cross_packing_fake(
    x: Tensor, gamma: Tensor, kernel: int, relu: bool, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    how = Packing(kernel, channels_last)
    tokens = x.new_empty(how.token_shape(x.shape))
    return torch.empty_like(x, memory_format=how.memory_format), tokens, *packed.attend_fake(tokens)


@torch.library.custom_op("sdan::cross_packing_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    out: Tensor | None,
    gamma: Tensor,
    tokens: Tensor,
    attended: Tensor,
    log_sum: Tensor,
    kernel: int,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x, in the layout of out, and gamma."""
    return _backward(grad, out, gamma, tokens, attended, log_sum, Packing(kernel, channels_last))


@_backward_op.register_fake
def _backward_fake(
    grad: Tensor,
    out: Tensor | None,
    gamma: Tensor,
    tokens: Tensor,
    attended: Tensor,
    log_sum: Tensor,
    kernel: int,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    memory_format = Packing(kernel, channels_last).memory_format
    return torch.empty_like(grad, memory_format=memory_format), torch.empty_like(gamma)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, gamma, kernel, relu, channels_last = inputs
    ctx.how = kernel, channels_last
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for the gradients of tokens, attended and log_sum
    ctx.save_for_backward(output[0] if relu else None, gamma, *output[1:])


def _backward_of_op(ctx: Any, grad: Tensor | None, *_others: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    return *_backward_op(grad, *ctx.saved_tensors, *ctx.how), None, None, None


_cross_packing_op.register_autograd(_backward_of_op, setup_context=_setup_context)
_backward_op.register_autograd(portable.no_second_derivative("sdan::cross_packing", packed.WITH_DERIVATIVES))
