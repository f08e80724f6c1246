"""The attention inside cross packing attention (CPA) without its matrix."""

import torch
from torch import Tensor
from torch.nn import functional


def packed_attention(x_NLC: Tensor) -> Tensor:
    """softmax(rowmax(E) - E) X with E = X X^T over C, as scaled-dot-product attention with a negated query.

    Args:
        x_NLC: [N, L, C]; L tokens attend to one another, logits are sums over C in float32.

    Returns:
        [N, L, C] in x's type.
    """
    x = x_NLC.to(torch.promote_types(x_NLC.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        return functional.scaled_dot_product_attention(-x, x, x, scale=1.0).to(x_NLC.dtype)
