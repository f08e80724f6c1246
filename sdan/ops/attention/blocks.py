"""Packed attention one block of the matrix's rows at a time: for CPUs, and for tokens that no fused GPU kernel takes.

On the CPU a block belongs to one image and is small enough for the caches; oneDNN fuses the products with the
operations around them (`attend`). On a GPU a block is large and may cover several images, so that few kernels start
(`attend_batched`).

Axes: N images, L tokens, C values per token, B rows (queries) of a block.
"""

import math

import torch
from torch import Tensor

from sdan.ops.precision import onednn_accepts_bf16

_BLOCK_VALUES = 2**20
"""Values of the matrix per block on the CPU: 4 MB in float32. Blocks of half or twice this size were slower."""
_GPU_BLOCK_VALUES = 2**22
"""The same on a GPU, at least: 16 MB in float32. The backward pass holds two such blocks, so it takes half as many."""
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
    for images in groups:
        x = x_NLC[images]
        for rows in blocks:
            queries = -x[:, rows] if negated_NLC is None else negated_NLC[images, rows]
            weights = torch.softmax(_product(queries, x.mT), dim=-1).to(x.dtype)
            torch.bmm(weights, x, out=output[images, rows])
            del queries, weights
    return output


def attend_batched_backward(grad_NLC: Tensor, x_NLC: Tensor, negated_NLC: Tensor | None, output_NLC: Tensor) -> Tensor:
    """d/dX on a GPU, through all three uses of X. All arguments are contiguous."""
    grad_x = torch.empty_like(x_NLC)
    groups, blocks = _batches(x_NLC, _gpu_block_values(x_NLC) // 2)
    for images in groups:
        total = None
        for rows in blocks:
            queries = -x_NLC[images, rows] if negated_NLC is None else negated_NLC[images, rows]
            total = _add_block(total, rows, queries, x_NLC[images], grad_NLC[images, rows], output_NLC[images, rows])
            del queries
        grad_x[images] = total if total is not None else 0
    return grad_x


def _add_block(total: Tensor | None, rows: slice, queries: Tensor, x: Tensor, grad: Tensor, output: Tensor) -> Tensor:
    """Add one block's part of dX to `total`, [images, L, C], or return it if `total` is None.

    weights = softmax(-x X^T)                            [B, L]
    slope = weights * (grad X^T - grad . output)         [B, L]
    dX += weights^T grad - slope^T x,   dx -= slope X    x, grad, output: the block's rows
    """
    weights, slope = _batched_weights_and_slope(queries, x, grad, output)
    values = _product(weights.mT, grad)
    del weights
    total = values if total is None else total.add_(values)
    del values
    total.add_(_product(slope.mT, queries))
    total[:, rows].sub_(_product(slope, x))
    return total


def _batched_weights_and_slope(queries: Tensor, x: Tensor, grad: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """As in `_add_block`, in x's type; sums and differences are at least float32."""
    dots = (grad.to(_wide(x.dtype)) * output).sum(dim=-1, keepdim=True)
    weights = torch.softmax(_product(queries, x.mT), dim=-1)
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
