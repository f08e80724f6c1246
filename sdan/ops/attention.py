"""The attention inside cross packing attention (CPA) without its matrix.

    out = softmax(rowmax(E) - E) X        with E = X X^T (the authors' code; the row maximum cancels in the softmax)
        = softmax(-X X^T) X               scaled-dot-product attention with a negated query, unscaled

Logits are unscaled sums over the C positions of a token, so they grow with the tile; they are kept in float32
throughout. On the CPU the matrix exists only as a block of rows at a time, forward and backward (which recomputes
it). On a GPU the vendor's fused kernels do the same for C <= 256; where they cannot (C > 256: K=4 at 128x128 has
C=1024), the blocks take over, so that the L x L matrix is never stored unnoticed.

Axes: N batch, L tokens, C values per token, B rows of a block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdan.ops import portable

_BLOCK_VALUES = 2**20
"""values of the matrix held at once (4 MB in float32: half or twice as many were slower)"""
_FUSED_WIDTH = 256
"""the widest token of the fused CUDA kernels"""


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
    return _attention_op(x_NLC)


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
def _attention_op(x_NLC: Tensor) -> Tensor:
    output = torch.empty_like(x_NLC, memory_format=torch.contiguous_format)
    for x_LC, output_LC in zip(x_NLC, output, strict=True):
        wide, narrow = _types(x_LC)
        transposed_CL = narrow.t().contiguous()
        for block in _blocks(x_LC.shape[0]):
            weights_BL = torch.softmax(_times_transposed(-wide[block], wide), dim=-1)
            output_LC[block] = _times_transposed(weights_BL.to(narrow.dtype), transposed_CL)
    return output


@torch.library.custom_op("sdan::packed_attention_backward", mutates_args=())
def _attention_backward_op(grad_NLC: Tensor, x_NLC: Tensor) -> Tensor:
    """d/dX through all three of its uses: as values, as keys and as (negated) queries."""
    grad_x = torch.empty_like(x_NLC, memory_format=torch.contiguous_format)
    for grad_LC, x_LC, out_LC in zip(grad_NLC, x_NLC, grad_x, strict=True):
        wide, narrow = _types(x_LC)
        grad_LC = grad_LC.to(narrow.dtype).contiguous()
        transposed_CL = narrow.t().contiguous()
        total_LC = torch.zeros_like(wide)
        for block in _blocks(x_LC.shape[0]):
            query_BC = -wide[block]
            weights_BL = torch.softmax(_times_transposed(query_BC, wide), dim=-1).to(narrow.dtype)
            slope_BL = _times_transposed(grad_LC[block], narrow)
            slope_BL = torch._softmax_backward_data(slope_BL, weights_BL, -1, narrow.dtype)
            total_LC[block] -= _times_transposed(slope_BL, transposed_CL)
            total_LC += _transposed_times(slope_BL, query_BC.to(narrow.dtype))
            total_LC += _transposed_times(weights_BL, grad_LC[block])
        out_LC.copy_(total_LC)
    return grad_x


@_attention_op.register_fake
def _attention_fake(x_NLC: Tensor) -> Tensor:
    return torch.empty_like(x_NLC, memory_format=torch.contiguous_format)


@_attention_backward_op.register_fake
def _attention_backward_fake(grad_NLC: Tensor, x_NLC: Tensor) -> Tensor:
    return torch.empty_like(x_NLC, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad_NLC: Tensor) -> Tensor:
    return _attention_backward_op(grad_NLC, ctx.saved_tensors[0])


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "sdan::packed_attention is once differentiable: got a double backward (create_graph=True); "
        "use `with sdan.ops.portable_form():`"
    )


_attention_op.register_autograd(_backward, setup_context=_setup_context)
_attention_backward_op.register_autograd(_no_second_derivative)


def _keep_type(x_NLC: Tensor) -> Tensor:
    with torch.autocast(x_NLC.device.type, enabled=False):
        return _attention_op(x_NLC)


def _keep_type_backward(grad_NLC: Tensor, x_NLC: Tensor) -> Tensor:
    with torch.autocast(x_NLC.device.type, enabled=False):
        return _attention_backward_op(grad_NLC, x_NLC)


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
    return _onednn_product(a_MK, b_NK) if _use_onednn(a_MK) else a_MK @ b_NK.t()


def _transposed_times(a_KM: Tensor, b_KN: Tensor) -> Tensor:
    """a^T b, [M, N]; the copy of the transpose pays for itself."""
    return _onednn_product(a_KM.t().contiguous(), b_KN.t().contiguous()) if _use_onednn(a_KM) else a_KM.t() @ b_KN


def _use_onednn(matrix: Tensor) -> bool:
    """MKL's float32 product has half of oneDNN's speed or less on AMD processors; half types go to oneDNN anyway."""
    return matrix.dtype == torch.float32 and matrix.device.type == "cpu" and torch.backends.mkldnn.is_available()


def _onednn_product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")
