"""The pictures of report.html as data: URIs: crops, error maps and offset colours with their legends."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

ERROR_LIMIT = 32
"""Mean absolute error over the channels, of 255, at which the scale of the error maps ends."""
COLOURS = "inferno"
WHEEL_PX = 96


def uri(picture: np.ndarray) -> str:
    """uint8 [H, W, 3] -> a lossless WebP as data: URI."""
    packed = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(packed, "WEBP", lossless=True, method=4)
    return "data:image/webp;base64," + base64.b64encode(packed.getvalue()).decode()


def error_map(picture: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Mean absolute difference over the channels, in the colours of `error_scale`; uint8 [H, W, 3]."""
    error = np.abs(picture.astype(np.float32) - target).mean(-1)
    return _coloured(error / ERROR_LIMIT)


def error_scale() -> np.ndarray:
    """The colours from 0 to ERROR_LIMIT, left to right; uint8 [12, 256, 3]."""
    return _coloured(np.broadcast_to(np.linspace(0, 1, 256), (12, 256)))


def _coloured(values: np.ndarray) -> np.ndarray:
    return (colormaps[COLOURS](np.clip(values, 0, 1))[..., :3] * 255).round().astype(np.uint8)


def offset_colours(offset_px: np.ndarray, reach_px: float) -> np.ndarray:
    """Hue is the direction, saturation the length; white is none (Baker et al. 2011).

    Args:
        offset_px: [2, h, w]: (dy, dx).
        reach_px: the length with full saturation; longer ones are shown as if they had it.

    Returns:
        uint8 [h, w, 3].
    """
    from torchvision.utils import flow_to_image  # torchvision loads torch's compiler, three seconds in each process

    length = np.hypot(*offset_px)
    shown = offset_px * np.minimum(1, reach_px / np.maximum(length, 1e-9))
    # flow_to_image divides by the largest length: one column as long as `reach_px` fixes the scale, and is cut off.
    column = np.zeros((2, shown.shape[1], 1), shown.dtype)
    column[1] = reach_px
    flow = torch.from_numpy(np.concatenate([shown, column], axis=2)).float().flip(0)  # it takes (dx, dy)
    return np.asarray(flow_to_image(flow).permute(1, 2, 0)[:, :-1])


def offset_wheel() -> np.ndarray:
    """The legend of `offset_colours`: the colour of every direction up to its reach; uint8 [WHEEL_PX, WHEEL_PX, 3]."""
    axis = np.linspace(-1, 1, WHEEL_PX)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"))
    wheel = offset_colours(grid, 1.0)
    wheel[np.hypot(*grid) > 1] = 255
    return wheel
