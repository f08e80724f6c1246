"""The attention inside cross packing attention (CPA), computed without storing the L x L matrix.

    out = softmax(rowmax(E) - E) X        with E = X X^T (the authors' code; the row maximum cancels in the softmax)
        = softmax(-X X^T) X               scaled-dot-product attention with a negated query, unscaled

Logits are unscaled sums over a token's C values, so they grow with the tile; they stay in float32. On a GPU PyTorch's
flash or memory-efficient kernel computes both passes for C <= 256; other tokens, and the CPU, take blocks of the
matrix's rows (`blocks`). The backward pass computes the weights again.

Axes: N images, L tokens, C values per token.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from sdan.ops import portable
from sdan.ops.attention import blocks

WITH_DERIVATIVES = "`with sdan.ops.portable_form(), torch.nn.attention.sdpa_kernel(SDPBackend.MATH):`"
"""The form of the attention that can be differentiated twice."""
_FUSED_WIDTH = 256
"""The widest token that flash attention supports."""
_TF32_WIDTH = 128
"""From this width on, blocks with TF32 products are faster than the memory-efficient kernel, which computes float32."""
_FLASH_TRAINS_ALL = ((8, 0), (9, 0), (10, 0), (10, 3))
"""Compute capabilities whose shared memory is large enough for flash attention's backward pass at widths 200 to 224."""
_PAD = 32
"""The memory-efficient kernel pads the logarithms of its rows' sums to a multiple of this."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
_efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
_efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default


def packed_attention(x_NLC: Tensor) -> Tensor:
    """softmax(rowmax(E) - E) X with E = X X^T: the attention of CPA, with memory linear in L.

    Args:
        x_NLC: [N, L, C], any floating type; each token attends to all tokens of its image.

    Returns:
        [N, L, C] in x's type. Once differentiable. Autocast does not change the type; logits are float32.

    Raises:
        ValueError: x does not have three axes.
    """
    if x_NLC.dim() != 3:
        raise ValueError(f"x.dim(): expected 3 for [N, L, C], got {x_NLC.dim()}")
    if portable.enabled():
        with torch.autocast(x_NLC.device.type, enabled=False):
            x_N1LC = x_NLC.unsqueeze(1)
            return functional.scaled_dot_product_attention(-x_N1LC, x_N1LC, x_N1LC, scale=1.0).squeeze(1)
    return _PackedAttention.apply(x_NLC) if runs_eagerly(x_NLC) else _attention_op(x_NLC)[0]


def runs_eagerly(x: Tensor) -> bool:
    """Whether x is computed now, with nothing that traces or transforms the operators.

    If so, an autograd.Function is called: a custom operator, which the others need, costs 0.3 to 0.6 ms more.
    """
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return not (torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())


def attend(x_NLC: Tensor, negated_NLC: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(-X X^T) X, and the logarithms of the rows' sums in the form that `attend_backward` needs; contiguous.

    Args:
        x_NLC: contiguous.
        negated_NLC: -x, if the caller has it.
    """
    if x_NLC.numel() == 0:
        return attend_fake(x_NLC)
    way = _way(x_NLC)
    if way == "blocks":
        with _without_autocast(x_NLC):
            return blocks.attend(x_NLC)
    if way == "batched":
        with _without_autocast(x_NLC):
            return blocks.attend_batched(x_NLC, negated_NLC), _log_sum(x_NLC, way)
    key = x_NLC.unsqueeze(1)
    query = -key if negated_NLC is None else negated_NLC.unsqueeze(1)
    if way == "flash":
        output, log_sum = _flash(query, key, key, scale=1.0)[:2]
    else:
        output, log_sum = _efficient(query, key, key, None, True, scale=1.0)[:2]
    return output.squeeze(1).contiguous(), log_sum


def attend_backward(
    grad_NLC: Tensor, x_NLC: Tensor, negated_NLC: Tensor | None, output_NLC: Tensor, log_sum: Tensor
) -> tuple[Tensor, ...]:
    """The gradient of `attend` as (dX,), or as the gradients (dV, dK, dQ) of values, keys and negated queries, for
    which dX = dV + dK - dQ. All arguments and results are contiguous.
    """
    if x_NLC.numel() == 0:
        return (torch.zeros_like(x_NLC),)
    # The forward pass decided, even if TF32 was switched meanwhile: it saves logarithms only for the other ways.
    way = "batched" if log_sum.shape[-1] == 0 else _way(x_NLC)
    if way == "blocks":
        with _without_autocast(x_NLC):
            return (blocks.attend_backward(grad_NLC, x_NLC, output_NLC, log_sum),)
    if way == "batched":
        with _without_autocast(x_NLC):
            return (blocks.attend_batched_backward(grad_NLC, x_NLC, negated_NLC, output_NLC),)
    grad, key, output = grad_NLC.unsqueeze(1), x_NLC.unsqueeze(1), output_NLC.unsqueeze(1)
    query = -key if negated_NLC is None else negated_NLC.unsqueeze(1)
    seed = log_sum.new_empty(2, dtype=torch.int64)  # of the dropout, which is 0; never read
    if way == "flash":
        rest = (log_sum, None, None, x_NLC.shape[1], x_NLC.shape[1], 0.0, False, seed, seed)
        grads = _flash_backward(grad, query, key, key, output, *rest, scale=1.0)
    else:
        needed = [True, True, True, False]  # the last is the bias, which there is none of
        grads = _efficient_backward(
            grad, query, key, key, None, output, log_sum, seed, seed, 0.0, needed, False, scale=1.0
        )
    return tuple(gradient.squeeze(1).contiguous() for gradient in (grads[2], grads[1], grads[0]))


def attend_fake(x_NLC: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors like those that `attend` returns, with any values."""
    return torch.empty_like(x_NLC, memory_format=torch.contiguous_format), _log_sum(x_NLC, _way(x_NLC))


def fused_on_cuda(width: int, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether PyTorch's flash or memory-efficient kernel supports tokens of this width and type on this GPU."""
    if dtype == torch.float64 or (dtype == torch.bfloat16 and capability < (8, 0)):
        return False
    return width <= _FUSED_WIDTH and width % 8 == 0


def _way(x_NLC: Tensor) -> Literal["blocks", "batched", "flash", "efficient"]:
    """blocks, batched: `blocks`, for the CPU and for GPUs. flash, efficient: PyTorch's fused kernels."""
    if not x_NLC.is_cuda:
        return "blocks"
    capability, width = torch.cuda.get_device_capability(x_NLC.device), x_NLC.shape[2]
    if not fused_on_cuda(width, x_NLC.dtype, capability) or (width >= _TF32_WIDTH and blocks.uses_tf32(x_NLC)):
        return "batched"
    trains = width <= 192 or width > 224 or capability in _FLASH_TRAINS_ALL
    flash = capability >= (8, 0) and x_NLC.dtype in (torch.float16, torch.bfloat16) and trains
    return "flash" if flash and torch.backends.cuda.is_flash_attention_available() else "efficient"


def _log_sum(x_NLC: Tensor, way: str) -> Tensor:
    num_images, num_tokens = x_NLC.shape[:2]
    shapes = {
        "blocks": (num_images, num_tokens),
        "batched": (num_images, 0),
        "flash": (num_images, 1, num_tokens),
        "efficient": (num_images, 1, (num_tokens + _PAD - 1) // _PAD * _PAD),
    }
    return x_NLC.new_empty(shapes[way], dtype=torch.promote_types(x_NLC.dtype, torch.float32))


def _without_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _aligned(x: Tensor) -> Tensor:
    """x, contiguous and at an address that the fused kernels accept."""
    x = x.contiguous()
    return x.clone() if x.is_cuda and x.data_ptr() % 16 else x


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NLC: Tensor) -> Tensor:
        x_NLC = _aligned(x_NLC)
        output, log_sum = attend(x_NLC)
        ctx.save_for_backward(x_NLC, output, log_sum)
        return output

    @staticmethod
    def backward(ctx: Any, grad_NLC: Tensor) -> Tensor:
        # Gradients are recorded only for a double backward, which the operator refuses in a sentence.
        run = _attention_backward_op if torch.is_grad_enabled() else _attention_backward
        return run(grad_NLC, *ctx.saved_tensors)


def _attention_backward(grad_NLC: Tensor, x_NLC: Tensor, output_NLC: Tensor, log_sum: Tensor) -> Tensor:
    first, *others = attend_backward(_aligned(grad_NLC), _aligned(x_NLC), None, output_NLC, log_sum)
    return first.add_(others[0]).sub_(others[1]) if others else first


@torch.library.custom_op("sdan::packed_attention", mutates_args=())
def _attention_op(x_NLC: Tensor) -> tuple[Tensor, Tensor]:
    """Output [N, L, C], and what `attend` returns besides it."""
    return attend(_aligned(x_NLC))


@torch.library.custom_op("sdan::packed_attention_backward", mutates_args=())
def _attention_backward_op(grad_NLC: Tensor, x_NLC: Tensor, output_NLC: Tensor, log_sum: Tensor) -> Tensor:
    return _attention_backward(grad_NLC, x_NLC, output_NLC, log_sum)


@_attention_op.register_fake
def _attention_fake(x_NLC: Tensor) -> tuple[Tensor, Tensor]:
    return attend_fake(x_NLC)


@_attention_backward_op.register_fake
def _attention_backward_fake(grad_NLC: Tensor, x_NLC: Tensor, output_NLC: Tensor, log_sum: Tensor) -> Tensor:
    return torch.empty_like(x_NLC, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the gradient of log_sum
    ctx.save_for_backward(inputs[0], *output)


def _backward(ctx: Any, grad_NLC: Tensor | None, _grad_log_sum: None) -> Tensor | None:
    return None if grad_NLC is None else _attention_backward_op(grad_NLC, *ctx.saved_tensors)


_attention_op.register_autograd(_backward, setup_context=_setup_context)
_attention_backward_op.register_autograd(portable.no_second_derivative("sdan::packed_attention", WITH_DERIVATIVES))
