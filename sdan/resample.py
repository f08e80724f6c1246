"""The few ways in which SDAN changes an image's grid. Pixel i covers [i, i + 1): half-pixel centres everywhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def low_pass(image_NCHW: Tensor, factor: int) -> Tensor:
    """Area average by an integer factor: THE low-pass that makes Y' and the packed reference.

    The released code shrinks Y with bicubic interpolation that is not antialiased, so that Y' aliases; a departure.

    Raises:
        ValueError: H or W is no multiple of `factor`.
    """
    if factor == 1:
        return image_NCHW
    height, width = image_NCHW.shape[-2:]
    if factor < 1 or height % factor or width % factor:
        raise ValueError(f"low_pass: a size divisible by the factor expected, got {height}x{width} and factor {factor}")
    return F.avg_pool2d(image_NCHW, factor)


def bicubic(image_NCHW: Tensor, scale: int) -> Tensor:
    """Bicubic enlargement by an integer factor, float32, not clipped."""
    return F.interpolate(image_NCHW.float(), scale_factor=scale, mode="bicubic", align_corners=False)


def enlarge_offset(offset_N2HW: Tensor, factor: int) -> Tensor:
    """An offset field on a grid `factor` times finer: larger in size and, being in pixels, in value."""
    if factor == 1:
        return offset_N2HW
    return factor * F.interpolate(offset_N2HW, scale_factor=factor, mode="bilinear", align_corners=False)


def sample(image_NCHW: Tensor, offset_N2HW: Tensor, *, mode: str = "bilinear") -> Tensor:
    """image(p + offset(p)) with the border replicated, so that offset 0 is the image itself; float32.

    Args:
        image_NCHW: any float image.
        offset_N2HW: (dy, dx) in pixels of the image, same N, H and W.
        mode: bilinear or bicubic.
    """
    image, offset = image_NCHW.float(), offset_N2HW.float()
    height, width = image.shape[-2:]
    rows = torch.arange(height, device=image.device, dtype=torch.float32)[:, None] + offset[:, 0]
    cols = torch.arange(width, device=image.device, dtype=torch.float32) + offset[:, 1]
    # align_corners=True maps -1 and 1 to the centres of the outer pixels; a single pixel has only one centre.
    grid_NHW2 = torch.stack((cols * (2 / max(width - 1, 1)) - 1, rows * (2 / max(height - 1, 1)) - 1), dim=-1)
    # PyTorch's CPU kernel (2.14) takes NaN for an index in the backward pass of a replicated border, and crashes.
    grid_NHW2 = torch.nan_to_num(grid_NHW2, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return F.grid_sample(image, grid_NHW2, mode=mode, padding_mode="border", align_corners=True)
