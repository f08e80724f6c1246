"""Resampling of images and offset fields. Pixel i covers [i, i + 1): half-pixel centres everywhere."""

from __future__ import annotations

import math

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
    image = image_NCHW.float()
    if image.device.type == "cpu" and not torch.compiler.is_compiling():
        return _bicubic_by_axis(image, scale)
    if image.is_cuda and image.requires_grad:
        return _bicubic_by_matrices(image, scale)
    size = [scale * side for side in image.shape[-2:]]  # a factor would keep torch.export from other sizes
    return F.interpolate(image, size=size, mode="bicubic", align_corners=False)


def _bicubic_by_axis(image_NCHW: Tensor, scale: int) -> Tensor:
    """What F.interpolate computes, by one convolution along each axis: a ninth of its time for channels-last images."""
    n, channels, height, width = image_NCHW.shape
    taps = _cubic_taps(scale)
    with torch.autocast("cpu", enabled=False):
        planes = F.pad(image_NCHW.reshape(n * channels, 1, height, width), (2, 2, 2, 2), mode="replicate")
        wide = F.conv2d(planes, taps.view(scale, 1, 1, 5))  # the scale positions between two pixels as channels
        wide = wide.permute(0, 2, 3, 1).reshape(n * channels, 1, height + 4, width * scale)
        tall = F.conv2d(wide, taps.view(scale, 1, 5, 1))
    return tall.transpose(1, 2).reshape(n, channels, height * scale, width * scale)


def _bicubic_by_matrices(image_NCHW: Tensor, scale: int) -> Tensor:
    """What F.interpolate computes, by one matrix product along each axis, for crops that need a gradient.

    The gradient of CUDA's F.interpolate adds 16 products for each output pixel to memory, with atomics, and its order
    varies. These products need no atomics. Their matrices grow with the square of the side, and a NaN spreads over the
    whole picture.
    """
    with torch.autocast(image_NCHW.device.type, enabled=False):
        height, width = image_NCHW.shape[-2:]
        rows = _bicubic_matrix(height, scale, image_NCHW.device)
        columns = rows if width == height else _bicubic_matrix(width, scale, image_NCHW.device)
        return rows @ image_NCHW @ columns.t()


def _bicubic_matrix(side: int, scale: int, device: torch.device) -> Tensor:
    """[scale side, side]: enlarges columns of `side` pixels."""
    unit = torch.eye(side, device=device)[None, None]
    return F.interpolate(unit, size=(scale * side, side), mode="bicubic", align_corners=False)[0, 0]


def _cubic_taps(scale: int) -> Tensor:
    """[scale, 5]: weights of the pixels at -2 to 2 for the `scale` positions inside a pixel; Keys' cubic, a = -0.75."""
    positions = (torch.arange(scale, dtype=torch.float64) + 0.5) / scale - 0.5
    away = (positions[:, None] - torch.arange(-2, 3)).abs()
    near = (1.25 * away - 2.25) * away**2 + 1
    far = -0.75 * (((away - 5) * away + 8) * away - 4)
    return torch.where(away <= 1, near, torch.where(away < 2, far, 0.0)).float()


def blur(image_NCHW: Tensor, sigma_px: float) -> Tensor:
    """Gaussian blur with the border replicated, to three standard deviations; float32."""
    n, channels, height, width = image_NCHW.shape
    reach = math.ceil(3 * sigma_px)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=image_NCHW.device) / sigma_px) ** 2)
    taps = taps / taps.sum()
    with torch.autocast(image_NCHW.device.type, enabled=False):
        planes = image_NCHW.float().reshape(n * channels, 1, height, width)
        planes = F.pad(planes, (reach, reach, reach, reach), mode="replicate")
        planes = F.conv2d(F.conv2d(planes, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
    return planes.view(n, channels, height, width)


def enlarge_offset(offset_N2HW: Tensor, factor: int) -> Tensor:
    """Resample an offset field to a grid `factor` times finer; its values, in pixels, grow by the same factor."""
    if factor == 1:
        return offset_N2HW
    size = [factor * side for side in offset_N2HW.shape[-2:]]
    return factor * F.interpolate(offset_N2HW, size=size, mode="bilinear", align_corners=False)


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
