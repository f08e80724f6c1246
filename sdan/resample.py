"""Resampling of images and offset fields. Pixel i covers [i, i + 1): half-pixel centres everywhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def low_pass(image_NCHW: Tensor, factor: int) -> Tensor:
    """Average over factor x factor pixels. Makes all low-resolution references (Y', and the rendering for packed RAW).

    The released code instead shrinks Y by bicubic interpolation without antialiasing, so its Y' aliases.

    Raises:
        ValueError: H or W is not a multiple of `factor`.
    """
    if factor == 1:
        return image_NCHW
    height, width = image_NCHW.shape[-2:]
    if factor < 1 or height % factor or width % factor:
        raise ValueError(f"low_pass: expected a size divisible by factor {factor}, got {height}x{width}")
    return F.avg_pool2d(image_NCHW, factor)


def bicubic(image_NCHW: Tensor, scale: int) -> Tensor:
    """Enlarge bicubically by an integer factor; float32, not clipped. Table 1's bicubic baseline."""
    return F.interpolate(image_NCHW.float(), scale_factor=scale, mode="bicubic", align_corners=False)


def enlarge_offset(offset_N2HW: Tensor, factor: int) -> Tensor:
    """Resample an offset field to a grid `factor` times finer; its values, in pixels, grow by the same factor."""
    if factor == 1:
        return offset_N2HW
    return factor * F.interpolate(offset_N2HW, scale_factor=factor, mode="bilinear", align_corners=False)


def sample(image_NCHW: Tensor, offset_N2HW: Tensor, *, mode: str = "bilinear") -> Tensor:
    """Sample image(p + offset(p)), with the border replicated; offset 0 returns the image. float32.

    Args:
        image_NCHW: any float image.
        offset_N2HW: (dy, dx) in pixels of the image, same N, H and W.
        mode: bilinear or bicubic.
    """
    image, offset = image_NCHW.float(), offset_N2HW.float()
    height, width = image.shape[-2:]
    rows = torch.arange(height, device=image.device, dtype=torch.float32)[:, None] + offset[:, 0]
    cols = torch.arange(width, device=image.device, dtype=torch.float32) + offset[:, 1]
    # align_corners=True maps -1 and 1 to the centres of the outer pixels; max(..., 1) is for images one pixel wide.
    grid_NHW2 = torch.stack((cols * (2 / max(width - 1, 1)) - 1, rows * (2 / max(height - 1, 1)) - 1), dim=-1)
    # PyTorch 2.14's CPU kernel crashes in the backward pass of a replicated border if a coordinate is NaN.
    grid_NHW2 = torch.nan_to_num(grid_NHW2, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return F.grid_sample(image, grid_NHW2, mode=mode, padding_mode="border", align_corners=True)
