"""Deformable convolution with one offset per window tap (torchvision's), for the DCN row of Table 2."""

import torch
from torch import Tensor


def per_point_deform_conv2d(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """output(p) = bias + sum_k weight_k . input(p + k + offset_k(p)): torchvision's `deform_conv2d`, stride 1.

    Half types are computed in float32 and the result is cast back, even under autocast: torchvision's CPU operator
    supports neither bfloat16 nor float16, and its GPU operator would round the sampling positions. So half types cost
    as much as float32, with 9 C H W values of scratch memory for K=3.

    Args:
        input: [N, Cin, H, W], any floating type.
        offset: [N, 2*K*K, H, W], (dy, dx) per tap, in pixels.
        weight: [Cout, Cin, K, K], K odd.
        bias: [Cout] or None.

    Returns:
        [N, Cout, H, W] in the type of input ("same" size).
    """
    from torchvision.ops import deform_conv2d  # only Table 2's DCN row needs torchvision

    kernel = weight.shape[-1]
    wide = torch.promote_types(input.dtype, torch.float32)
    with torch.autocast(input.device.type, enabled=False):
        output = deform_conv2d(
            input.to(wide),
            offset.to(wide),
            weight.to(wide),
            None if bias is None else bias.to(wide),
            padding=kernel // 2,
        )
    return output.to(input.dtype)
