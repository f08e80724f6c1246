"""Deformable convolution with an offset per point of the window: torchvision's, for the DCN row of Table 2."""

import torch
from torch import Tensor


def per_point_deform_conv2d(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """output(p) = bias + sum_k weight_k . input(p + k + offset_k(p)): torchvision's `deform_conv2d`, stride 1, "same"
    size.

    torchvision's CPU operator has no bfloat16 (nor float16), and on a GPU its sampling positions would be rounded to
    it: half types are computed in float32 and the result is cast back, under autocast too. So it costs what float32
    costs, with 9 C H W values of scratch memory for K=3.

    Args:
        input: [N, Cin, H, W], any floating type.
        offset: [N, 2*K*K, H, W], (dy, dx) per tap, in pixels.
        weight: [Cout, Cin, K, K], K odd.
        bias: [Cout] or None.

    Returns:
        [N, Cout, H, W] in the type of input.
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
