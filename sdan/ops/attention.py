"""The attention inside cross packing attention (CPA) without its matrix.

    out = softmax(rowmax(E) - E) X        with E = X X^T (the authors' code; the row maximum cancels in the softmax)
        = softmax(-X X^T) X               scaled-dot-product attention with a negated query, unscaled

Logits are unscaled sums over the C positions of a token, so they grow with the tile; they are kept in float32
throughout. On the CPU the matrix exists only as a block of queries at a time, forward and backward (which recomputes
it from the logarithm of each row's sum). On a GPU the vendor's fused kernels do the same for C <= 256; where they
cannot (C > 256: K=4 at 128x128 has C=1024), the blocks take over, so that the L x L matrix is never stored unnoticed.

Axes: N batch, L tokens, C values per token, B queries of a block.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdan.ops import portable
from sdan.ops.precision import cpu_has_bf16

_BLOCK_VALUES = 2**20
"""values of the matrix held at once (4 MB in float32: half or twice as many were slower)"""
_FUSED_WIDTH = 256
"""the widest token of the fused CUDA kernels"""
_EXPONENT = 32
"""exp(z) = 2^32 sigmoid(z - 32 ln 2), to one part in 2^32, for z <= 0"""


def packed_attention(x_NLC: Tensor) -> Tensor:
    """softmax(rowmax(E) - E) X with E = X X^T: the attention of CPA, linear in memory.

    Args:
        x_NLC: [N, L, C], any floating type; every token attends to every other of its image.

    Returns:
        [N, L, C] in x's type. Once differentiable. Autocast leaves it in x's type, with logits in float32.

    Raises:
        ValueError: not three axes.
    """
    if x_NLC.dim() != 3:
        raise ValueError(f"x.dim() is not valid: got {x_NLC.dim()}, expected 3 for [N, L, C]")
    if portable.enabled():
        return _fused(x_NLC)
    if x_NLC.is_cuda and fused_on_cuda(x_NLC.shape[2], x_NLC.dtype, torch.cuda.get_device_capability(x_NLC.device)):
        # Without the MATH form in the list PyTorch would rather raise than store the matrix.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            return _fused(x_NLC)
    return _attention_op(x_NLC)[0]


def fused_on_cuda(width: int, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether PyTorch's flash or memory-efficient kernel takes tokens of this width and type on this GPU."""
    if dtype == torch.float64 or (dtype == torch.bfloat16 and capability < (8, 0)):
        return False
    return width <= _FUSED_WIDTH and width % 8 == 0


def _fused(x_NLC: Tensor) -> Tensor:
    with torch.autocast(x_NLC.device.type, enabled=False):
        x_N1LC = x_NLC.unsqueeze(1)
        return functional.scaled_dot_product_attention(-x_N1LC, x_N1LC, x_N1LC, scale=1.0).squeeze(1)


@torch.library.custom_op("sdan::packed_attention", mutates_args=())
def _attention_op(x_NLC: Tensor) -> tuple[Tensor, Tensor]:
    """(output, [N, L] logarithm of each query's sum of exponentials)."""
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
    """d/dX through all three of its uses: as values, as keys and as (negated) queries."""
    grad_x = torch.empty_like(x_NLC, memory_format=torch.contiguous_format)
    for target_LC, *image in zip(grad_x, grad_NLC, x_NLC, output_NLC, log_sum_NL, strict=True):
        target_LC.copy_(_image_gradient(*image))
    return grad_x


def _image_gradient(grad_LC: Tensor, x_LC: Tensor, output_LC: Tensor, log_sum_L: Tensor) -> Tensor:
    """Sums over blocks of queries, each a block of columns of the transposed matrix:

    weights = exp(-X x^T - log_sum)                       [L, B]
    slope = weights * (X grad^T - grad . output)          [L, B]
    dX += weights grad - slope x,   dx -= slope^T X       x, grad, output: the block's rows

    What is subtracted before the exponential and the product stands in further columns of the operands.
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
    """exp(keys queries^T), and that times (keys grads^T); the logits in at least float32.

    oneDNN does each in one pass, on sums that are in float32 before they are rounded. It has no exponential, but far to
    the left the sigmoid is one: there the caller puts the logits, and takes the power of two back with the gradient.
    """
    if _use_onednn(keys):
        weights = torch.ops.mkldnn._linear_pointwise(keys, queries, None, "sigmoid", [], "")
        return weights, torch.ops.mkldnn._linear_pointwise.binary(keys, weights, grads, None, "mul")
    wide = torch.promote_types(keys.dtype, torch.float32)
    weights = (keys.to(wide) @ queries.to(wide).t()).exp_().to(keys.dtype)
    return weights, (keys @ grads.t()).mul_(weights)


def _with_column(values_LC: Tensor, column_L: Tensor) -> Tensor:
    """[values, column]; beside bfloat16 the column becomes three that add up to its float32."""
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
        "sdan::packed_attention is once differentiable: got a double backward (create_graph=True); "
        "use `with sdan.ops.portable_form():`"
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
    """(for the logits: at least float32, for the other products: bfloat16 stays, float16 is too narrow for the
    gradients).
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
    """MKL's float32 product has half of oneDNN's speed or less on AMD processors, and fuses nothing behind it."""
    if matrix.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if matrix.dtype == torch.bfloat16:
        return cpu_has_bf16()
    return matrix.dtype == torch.float32
