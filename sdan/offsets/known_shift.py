"""References with known offsets, made from the input's own picture: they teach an offset learner (ours).

A picture of the input's own view is moved by a random smooth field, and the offset learner must find that field. Real
pairs have no true offsets; a picture moved by ourselves has. The picture is the camera JPG, because Y' also comes from
one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sdan.ops import offset_mask
from sdan.resample import low_pass, sample

CONTROL_POINTS = 3
"""The field is given at a grid of this many points along each side of the crop, and is smooth between them."""
BEND = 0.1
"""Standard deviation of the control points about their common shift, as a share of its length."""
LEAST_BEND_PX = 0.4
"""Its smallest value, mosaic pixels."""


def random_motion(uniform: Tensor, normal: Tensor, max_shift_px: float) -> Tensor:
    """One field's values at its control points, mosaic pixels: a common shift, bent.

    The length of the shift is max_shift_px u^2: most real shifts are far below the largest.

    Args:
        uniform: two values in [0, 1): length and direction of the shift.
        normal: [2, CONTROL_POINTS, CONTROL_POINTS], standard normal.

    Returns:
        [2, CONTROL_POINTS, CONTROL_POINTS] = (dy, dx).
    """
    length = max_shift_px * uniform[0].square()
    angle = 2 * torch.pi * uniform[1]
    shift = length * torch.stack((angle.sin(), angle.cos()))
    return shift[:, None, None] + (BEND * length).clamp_min(LEAST_BEND_PX) * normal


def moved_reference(picture: Tensor, motion: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Move a picture by a known field: reference(p) = picture(p + offset(p)), at x's size.

    Args:
        picture: [N,3,H,W] at the mosaic's size.
        motion: [N,2,CONTROL_POINTS,CONTROL_POINTS] of `random_motion`, mosaic pixels.
        factor: side of the mosaic over side of x.

    Returns:
        (reference [N,3,H/factor,W/factor], offset [N,2,H/factor,W/factor] in pixels of x).
    """
    field = F.interpolate(motion.float(), size=picture.shape[-2:], mode="bicubic", align_corners=True)
    reference = low_pass(sample(picture, field, mode="bicubic").clamp(0, 1), factor)
    return reference, low_pass(field, factor) / factor


def known_shift_loss(offset: Tensor, known: Tensor, border_px: int) -> Tensor:
    """The mean distance between found and known offsets where the known ones point inside, pixels of x.

    Args:
        offset, known: [N,2,H,W] in pixels of x.
        border_px: cropped from each side, pixels of x.
    """
    height, width = offset.shape[-2:]
    inside = (..., slice(border_px, height - border_px), slice(border_px, width - border_px))
    mask = offset_mask(known)[inside].float()
    # The small constant keeps the gradient finite at 0.
    distance = ((offset - known)[inside].float().square().sum(1, keepdim=True) + 1e-4).sqrt()
    return (distance * mask).sum() / mask.sum().clamp_min(1)
