"""The attention inside cross packing attention (CPA), computed without storing the L x L matrix.

    out = softmax(rowmax(E) - E) X        with E = X X^T (the authors' code; the row maximum cancels in the softmax)
        = softmax(-X X^T) X               scaled-dot-product attention with a negated query, unscaled

Logits are unscaled sums over a token's C values, so they grow with the tile; they stay in float32. On the CPU both
passes hold one block of the matrix's rows at a time. The backward pass recomputes each block from the stored logarithm
of its rows' sums. On a GPU the vendor's fused kernels do the same for C <= 256. Wider tokens (K=4 at 128x128
has C=1024) use the blocks there too, so the L x L matrix is never stored.

Axes: N batch, L tokens, C values per token, B queries of a block.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdan.ops import portable
from sdan.ops.precision import onednn_accepts_bf16

_BLOCK_VALUES = 2**20
"""Values of the matrix per block: 4 MB in float32. Blocks of half or twice this size were slower."""
_FUSED_WIDTH = 256
"""The widest token that the fused CUDA kernels support."""
_EXPONENT = 32
"""exp(z) = 2^32 sigmoid(z - 32 ln 2) for z <= 0, with a relative error of at most 2^-32."""


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
        return _fused(x_NLC)
    if x_NLC.is_cuda and fused_on_cuda(x_NLC.shape[2], x_NLC.dtype, torch.cuda.get_device_capability(x_NLC.device)):
        # MATH, which stores the matrix, is left out: PyTorch then raises an error instead.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            return _fused(x_NLC)
    return _attention_op(x_NLC)[0]


def fused_on_cuda(width: int, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether PyTorch's flash or memory-efficient kernel supports tokens of this width and type on this GPU."""
    if dtype == torch.float64 or (dtype == torch.bfloat16 and capability < (8, 0)):
        return False
    return width <= _FUSED_WIDTH and width % 8 == 0


def _fused(x_NLC: Tensor) -> Tensor:
    with torch.autocast(x_NLC.device.type, enabled=False):
        x_N1LC = x_NLC.unsqueeze(1)
        return functional.scaled_dot_product_attention(-x_N1LC, x_N1LC, x_N1LC, scale=1.0).squeeze(1)


@torch.library.custom_op("sdan::packed_attention", mutates_args=())
def _attention_op(x_NLC: Tensor) -> tuple[Tensor, Tensor]:
    """Output [N, L, C] and the logarithm of each query's sum of exponentials [N, L]."""
    output, log_sum_NL = _attention_fake(x_NLC)
    for x_LC, output_LC, log_sum_L in zip(x_NLC, output, log_sum_NL, strict=True):
        wide, narrow = _types(x_LC)
        narrow_CL = narrow.t().contiguous()
        for block in _blocks(x_LC.shape[0]):
            logits_BL = _times_transposed(-wide[block], wide)
            weights_BL = torch.softmax(logits_BL, dim=-1)
            log_sum_L[block] = logits_BL.amax(dim=-1) - weights_BL.amax(dim=-1).log_()
            del logits_BL
            output_LC[block] = _times_transposed(weights_BL.to(narrow.dtype), narrow_CL)
    return output, log_sum_NL


@torch.library.custom_op("sdan::packed_attention_backward", mutates_args=())
def _attention_backward_op(grad_NLC: Tensor, x_NLC: Tensor, output_NLC: Tensor, log_sum_NL: Tensor) -> Tensor:
    """d/dX through all three uses of X: as values, as keys and as (negated) queries."""
    grad_x = torch.empty_like(x_NLC, memory_format=torch.contiguous_format)
    for target_LC, *image in zip(grad_x, grad_NLC, x_NLC, output_NLC, log_sum_NL, strict=True):
        target_LC.copy_(_image_gradient(*image))
    return grad_x


def _image_gradient(grad_LC: Tensor, x_LC: Tensor, output_LC: Tensor, log_sum_L: Tensor) -> Tensor:
    """The gradient of one image [L, C], one block of B queries at a time, as columns of the transposed matrix:

    weights = exp(-X x^T - log_sum)                       [L, B]
    slope = weights * (X grad^T - grad . output)          [L, B]
    dX += weights grad - slope x,   dx -= slope^T X       x, grad, output: the block's rows

    Extra columns in the operands make the matrix products do both subtractions.
    """
    wide, narrow = _types(x_LC)
    exponent = _EXPONENT if _use_onednn(narrow) else 0
    grad_LC = grad_LC.to(narrow.dtype) * 2.0**exponent
    queries = _with_column(-narrow, -log_sum_L - exponent * math.log(2))
    grads = _with_column(grad_LC, -(grad_LC.to(wide.dtype) * output_LC).sum(dim=1))
    keys = torch.cat((narrow, narrow.new_ones(narrow.shape[0], queries.shape[1] - narrow.shape[1])), dim=1)
    narrow_CL = narrow.t().contiguous()
    total_LC = torch.zeros_like(wide)
    for block in _blocks(x_LC.shape[0]):
        weights_LB, slope_LB = _weights_and_slope(keys, queries[block], grads[block])
        total_LC += _times_transposed(weights_LB, grad_LC[block].t().contiguous())
        del weights_LB
        total_LC -= _times_transposed(slope_LB, narrow_CL[:, block].contiguous())
        total_LC[block] -= _times_transposed(narrow_CL, slope_LB.t()).t()
    return total_LC


def _weights_and_slope(keys: Tensor, queries: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, slope) = exp(keys queries^T) and weights * (keys grads^T); logits are at least float32.

    oneDNN computes each in one pass and rounds only after its float32 sums. It has no exp, but for very negative z
    sigmoid(z) is nearly exp(z): the caller lowers the logits by 32 ln 2 and multiplies the gradient by 2^32.
    """
    if _use_onednn(keys):
        weights = torch.ops.mkldnn._linear_pointwise(keys, queries, None, "sigmoid", [], "")
        return weights, torch.ops.mkldnn._linear_pointwise.binary(keys, weights, grads, None, "mul")
    wide = torch.promote_types(keys.dtype, torch.float32)
    weights = (keys.to(wide) @ queries.to(wide).t()).exp_().to(keys.dtype)
    return weights, (keys @ grads.t()).mul_(weights)


def _with_column(values_LC: Tensor, column_L: Tensor) -> Tensor:
    """[values, column]; for bfloat16 the column becomes three bfloat16 columns that add up to its float32 value."""
    parts = [column_L.to(values_LC.dtype)]
    while len(parts) < (3 if values_LC.dtype == torch.bfloat16 else 1):
        column_L = column_L - parts[-1]
        parts.append(column_L.to(values_LC.dtype))
    return torch.cat((values_LC, torch.stack(parts, dim=1)), dim=1)


@_attention_op.register_fake
def _attention_fake(x_NLC: Tensor) -> tuple[Tensor, Tensor]:
    log_sum = x_NLC.new_empty(x_NLC.shape[:2], dtype=torch.promote_types(x_NLC.dtype, torch.float32))
    return torch.empty_like(x_NLC, memory_format=torch.contiguous_format), log_sum


@_attention_backward_op.register_fake
def _attention_backward_fake(grad_NLC: Tensor, x_NLC: Tensor, output_NLC: Tensor, log_sum_NL: Tensor) -> Tensor:
    return torch.empty_like(x_NLC, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], *output)


def _backward(ctx: Any, grad_NLC: Tensor, _grad_log_sum: Tensor | None) -> Tensor:
    return _attention_backward_op(grad_NLC, *ctx.saved_tensors)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "sdan::packed_attention: expected a single backward pass, got a double backward (create_graph=True); "
        "use `with sdan.ops.portable_form(), torch.nn.attention.sdpa_kernel(SDPBackend.MATH):`"
    )


_attention_op.register_autograd(_backward, setup_context=_setup_context)
_attention_backward_op.register_autograd(_no_second_derivative)


def _keep_type(x_NLC: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(x_NLC.device.type, enabled=False):
        return _attention_op(x_NLC)


def _keep_type_backward(grad_NLC: Tensor, x_NLC: Tensor, output_NLC: Tensor, log_sum_NL: Tensor) -> Tensor:
    with torch.autocast(x_NLC.device.type, enabled=False):
        return _attention_backward_op(grad_NLC, x_NLC, output_NLC, log_sum_NL)


_library = torch.library.Library("sdan", "FRAGMENT")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("packed_attention", _keep_type, _key)
    _library.impl("packed_attention_backward", _keep_type_backward, _key)


def _types(x_LC: Tensor) -> tuple[Tensor, Tensor]:
    """(x for the logits, x for the other products): the first is at least float32; the second is bfloat16 if x is, else
    the same as the first.

    float16 has too small a range for the gradients.
    """
    wide = x_LC.to(torch.promote_types(x_LC.dtype, torch.float32)).contiguous()
    return wide, x_LC.contiguous() if x_LC.dtype == torch.bfloat16 else wide


def _blocks(num_tokens: int) -> list[slice]:
    rows = max(_BLOCK_VALUES // max(num_tokens, 1), 16)
    return [slice(start, min(start + rows, num_tokens)) for start in range(0, num_tokens, rows)]


def _times_transposed(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a b^T, [M, N]."""
    if _use_onednn(a_MK):
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")
    return a_MK @ b_NK.t()


def _use_onednn(matrix: Tensor) -> bool:
    """Whether oneDNN has a fast product of this type.

    On AMD processors MKL's float32 product has at most half the speed of oneDNN's, and MKL cannot fuse operations.
    """
    if matrix.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if matrix.dtype == torch.bfloat16:
        return onednn_accepts_bf16()
    return matrix.dtype == torch.float32
