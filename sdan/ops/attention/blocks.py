"""Packed attention one block of the matrix's rows at a time: for CPUs, and for tokens that no fused GPU kernel takes.

On the CPU a block belongs to one image and is small enough for the caches; oneDNN fuses the products with the
operations around them (`attend`). On a GPU a block is large and may cover several images, so that few kernels start
(`attend_batched`).

Axes: N images, L tokens, C values per token, B rows (queries) of a block.
"""

import math

import torch
from torch import Tensor

from sdan.ops.precision import AMPERE, attention_tf32, onednn_accepts_bf16, tf32_products

_BLOCK_VALUES = 2**20
"""Values of the matrix per block on the CPU: 4 MB in float32. Blocks of half or twice this size were slower."""
_GPU_BLOCK_VALUES = 2**22
"""The same on a GPU, at least: 16 MB in float32. The backward pass holds two such blocks, so it takes half as many."""
_TF32_BLOCK_VALUES = 2**24
"""The same where products use TF32: 64 MB. They are fast, so that starting small blocks would take longer."""
_TF32_MASK = -(2**13)
"""The bits of a float32 that TF32 keeps: all but the last 13 of the mantissa."""
_OUT_DTYPE_CAPABILITY = (8, 0)
"""From this compute capability on, half types are multiplied as they are, with float32 results."""
_EXPONENT = 32
"""exp(z) = 2^32 sigmoid(z - 32 ln 2) for z <= 0, with a relative error of at most 2^-32."""


def attend(x_NLC: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(-X X^T) X on the CPU.

    Returns:
        [N, L, C] in x's type, and the logarithm of each query's sum of exponentials, [N, L], at least float32.
    """
    output = torch.empty_like(x_NLC, memory_format=torch.contiguous_format)
    log_sum_NL = x_NLC.new_empty(x_NLC.shape[:2], dtype=_wide(x_NLC.dtype))
    for x_LC, output_LC, log_sum_L in zip(x_NLC, output, log_sum_NL, strict=True):
        wide, narrow = _types(x_LC)
        narrow_CL = narrow.t().contiguous()
        for block in _blocks(x_LC.shape[0], _BLOCK_VALUES):
            logits_BL = _times_transposed(-wide[block], wide)
            weights_BL = torch.softmax(logits_BL, dim=-1)
            log_sum_L[block] = logits_BL.amax(dim=-1) - weights_BL.amax(dim=-1).log_()
            del logits_BL
            output_LC[block] = _times_transposed(weights_BL.to(narrow.dtype), narrow_CL)
    return output, log_sum_NL


def attend_backward(grad_NLC: Tensor, x_NLC: Tensor, output_NLC: Tensor, log_sum_NL: Tensor) -> Tensor:
    """d/dX on the CPU, through all three uses of X: as values, as keys and as (negated) queries."""
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
    for block in _blocks(x_LC.shape[0], _BLOCK_VALUES):
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
    wide = _wide(keys.dtype)
    weights = (keys.to(wide) @ queries.to(wide).t()).exp_().to(keys.dtype)
    return weights, (keys @ grads.t()).mul_(weights)


def _with_column(values_LC: Tensor, column_L: Tensor) -> Tensor:
    """[values, column]; for bfloat16 the column becomes three bfloat16 columns that add up to its float32 value."""
    parts = [column_L.to(values_LC.dtype)]
    while len(parts) < (3 if values_LC.dtype == torch.bfloat16 else 1):
        column_L = column_L - parts[-1]
        parts.append(column_L.to(values_LC.dtype))
    return torch.cat((values_LC, torch.stack(parts, dim=1)), dim=1)


def attend_batched(x_NLC: Tensor, negated_NLC: Tensor | None) -> Tensor:
    """softmax(-X X^T) X on a GPU; `negated_NLC` is -x if the caller has it. Both are contiguous."""
    output = torch.empty_like(x_NLC)
    groups, blocks = _batches(x_NLC, _gpu_block_values(x_NLC))
    tf32 = uses_tf32(x_NLC)
    with tf32_products(tf32):
        for images in groups:
            x = x_NLC[images]
            keys = _key_parts(x) if tf32 else x
            for rows in blocks:
                queries = -x[:, rows] if negated_NLC is None else negated_NLC[images, rows]
                weights = torch.softmax(_logits(queries, keys), dim=-1).to(x.dtype)
                torch.bmm(weights, x, out=output[images, rows])
                del queries, weights
    return output


def attend_batched_backward(grad_NLC: Tensor, x_NLC: Tensor, negated_NLC: Tensor | None, output_NLC: Tensor) -> Tensor:
    """d/dX on a GPU, through all three uses of X. All arguments are contiguous."""
    grad_x = torch.empty_like(x_NLC)
    tf32 = uses_tf32(x_NLC)
    groups, blocks = _batches(x_NLC, _gpu_block_values(x_NLC) // (1 if tf32 else 2))
    with tf32_products(tf32):
        for images in groups:
            x, total = x_NLC[images], None
            keys = _key_parts(x) if tf32 else x
            for rows in blocks:
                queries = -x[:, rows] if negated_NLC is None else negated_NLC[images, rows]
                dots = _row_dots(grad_NLC[images, rows], output_NLC[images, rows])
                total = _add_block(total, rows, queries, x, keys, grad_NLC[images, rows], dots)
                del queries
            grad_x[images] = total if total is not None else 0
    return grad_x


def uses_tf32(x_NLC: Tensor) -> bool:
    """Whether the GPU form multiplies these tokens through TF32, with logits as exact as in float32."""
    if not x_NLC.is_cuda or x_NLC.dtype != torch.float32 or not attention_tf32():
        return False
    return torch.cuda.get_device_capability(x_NLC.device) >= AMPERE


def _key_parts(x: Tensor) -> Tensor:
    """[high, low, high] with x = high + low, where TF32 holds `high` exactly; along the last axis.

    TF32 would round a logit by up to 0.07 (docs/operator.md). With these keys and the queries of `_query_parts` its
    product is high high + high low + low high: only low low, 2^-20 of it, is lost.
    """
    high = _high(x)
    return torch.cat((high, x - high, high), dim=-1)


def _query_parts(x: Tensor) -> Tensor:
    """[high, high, low], for `_key_parts`."""
    high = _high(x)
    return torch.cat((high, high, x - high), dim=-1)


def _high(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & _TF32_MASK).view(torch.float32)


def _logits(queries: Tensor, keys: Tensor) -> Tensor:
    """queries keys^T, at least float32; keys are tokens or their `_key_parts`."""
    if keys.shape[-1] != queries.shape[-1]:
        queries = _query_parts(queries)
    return _product(queries, keys.mT)


def _row_dots(grad: Tensor, output: Tensor) -> Tensor:
    """grad . output of each row, at least float32."""
    return (grad.to(_wide(grad.dtype)) * output).sum(dim=-1, keepdim=True)


def _add_block(
    total: Tensor | None, rows: slice, queries: Tensor, x: Tensor, keys: Tensor, grad: Tensor, dots: Tensor
) -> Tensor:
    """Add one block's part of dX to `total`, [images, L, C], or return it if `total` is None.

    weights = softmax(-x X^T)                            [B, L]
    slope = weights * (grad X^T - dots)                  [B, L]
    dX += weights^T grad - slope^T x,   dx -= slope X    x, grad, dots: the block's rows
    """
    weights, slope = _batched_weights_and_slope(queries, x, keys, grad, dots)
    total = _product(weights.mT, grad) if total is None else _add_product(total, weights.mT, grad)
    del weights
    total = _add_product(total, slope.mT, queries)
    _add_product(total[:, rows], slope, x, sign=-1)
    return total


def _add_product(total: Tensor, a: Tensor, b: Tensor, sign: int = 1) -> Tensor:
    """total + sign a b, in place."""
    if a.dtype == total.dtype:
        return total.baddbmm_(a, b, alpha=sign)
    return total.add_(_product(a, b), alpha=sign)


def _batched_weights_and_slope(
    queries: Tensor, x: Tensor, keys: Tensor, grad: Tensor, dots: Tensor
) -> tuple[Tensor, Tensor]:
    """As in `_add_block`, in x's type; sums and differences are at least float32."""
    weights = torch.softmax(_logits(queries, keys), dim=-1)
    slope = _product(grad, x.mT).sub_(dots).mul_(weights)
    return weights.to(x.dtype), slope.to(x.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b for batches of matrices, in at least float32. Products of half types are exact in float32."""
    wide = _wide(a.dtype)
    if a.dtype == wide or not a.is_cuda or torch.cuda.get_device_capability(a.device) < _OUT_DTYPE_CAPABILITY:
        return torch.bmm(a.to(wide), b.to(wide))
    return torch.bmm(a, b, out_dtype=wide)


def _gpu_block_values(x_NLC: Tensor) -> int:
    """Values per block on a GPU. For large inputs a block has half as many values as x, which holds it in less memory
    than the gradients take.
    """
    if uses_tf32(x_NLC):
        return _TF32_BLOCK_VALUES
    return max(_GPU_BLOCK_VALUES, x_NLC.numel() // 2)


def _batches(x_NLC: Tensor, values: int) -> tuple[list[slice], list[slice]]:
    """Groups of images and blocks of rows, so that a block of a group has at most `values` values of the matrices."""
    num_images, num_tokens = x_NLC.shape[:2]
    images = max(values // num_tokens**2, 1)
    groups = [slice(start, start + images) for start in range(0, num_images, images)]
    return groups, _blocks(num_tokens, values)


def _types(x_LC: Tensor) -> tuple[Tensor, Tensor]:
    """(x for the logits, x for the other products): the first is at least float32; the second is bfloat16 if x is, else
    the same as the first.

    float16 has too small a range for the gradients.
    """
    wide = x_LC.to(_wide(x_LC.dtype)).contiguous()
    return wide, x_LC.contiguous() if x_LC.dtype == torch.bfloat16 else wide


def _blocks(num_tokens: int, values: int) -> list[slice]:
    """Blocks of at most `values` values of one image's matrix, or of 16 rows."""
    rows = max(values // max(num_tokens, 1), 16)
    return [slice(start, min(start + rows, num_tokens)) for start in range(0, num_tokens, rows)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
