"""Random crops, flips and transposes that keep the RAW's Bayer phase and all pictures registered.

All positions are in mosaic pixels of the LR tile. A flip would change the colour phase, because an RGGB crop ends with
a G B row. So a crop to be flipped starts one sensor row later, at an odd row, and ends with an R G row. A transpose
keeps the phase and swaps the two greens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sdan.raw_input import mosaic_to_packed, packed_to_mosaic


class Integers(Protocol):
    """A source of random integers, e.g. numpy.random.Generator."""

    def integers(self, low: int, high: int, /) -> Any:
        """Draw an integer from [low, high)."""


@dataclass(frozen=True)
class CropPlan:
    """One window of a tile, to be cropped, then flipped, then transposed."""

    row: int
    """First mosaic row of the window: odd if flip_rows, else even."""
    col: int
    """First mosaic column of the window: odd if flip_cols, else even."""
    flip_rows: bool
    flip_cols: bool
    transpose: bool

    def __post_init__(self) -> None:
        for name, start, flip in (("row", self.row, self.flip_rows), ("col", self.col, self.flip_cols)):
            if start < 0 or start % 2 != int(flip):
                parity = "odd" if flip else "even"
                raise ValueError(f"{name}: expected an {parity} start of 0 or more, to keep the phase, got {start}")


def random_plan(generator: Integers, tile_px: int, crop_px: int, *, flips: bool = True) -> CropPlan:
    """Draw a window anywhere in the tile; each flip and the transpose have probability 1/2.

    Always draws the same number of random numbers. If the crop is as large as the tile, there is no room for the sensor
    row that a flip drops, and the crop is only transposed.

    Args:
        generator: e.g. numpy.random.default_rng(seed).
        tile_px: side of the tile, packed pixels.
        crop_px: side of the crop, packed pixels.
        flips: False: neither flips nor transposes.

    Raises:
        ValueError: the crop is larger than the tile.
    """
    room = tile_px - crop_px
    if crop_px < 1 or room < 0:
        raise ValueError(f"crop_px: expected 1 to {tile_px} packed pixels, the tile's size, got {crop_px}")
    turns = [bool(generator.integers(0, 2)) and flips for _ in range(3)]
    flip_rows, flip_cols = turns[0] and room > 0, turns[1] and room > 0
    # A flipped window starts at an odd row, so its last possible start is one row before an unflipped window's.
    row = 2 * int(generator.integers(0, room + (0 if flip_rows else 1))) + flip_rows
    col = 2 * int(generator.integers(0, room + (0 if flip_cols else 1))) + flip_cols
    return CropPlan(row, col, flip_rows, flip_cols, turns[2])


def apply(sample: Mapping[str, Tensor], plan: CropPlan, crop_px: int, scale: int) -> dict[str, Tensor]:
    """Crop, flip and transpose every picture of `sample` in the same way.

    Args:
        sample: lr_raw [4,t,t] (R, G1, G2, B), lr_render and lr_rgb [3,2t,2t], hr_rgb and true_rgb [3,2ts,2ts],
            true_flow [2,t,t] (dy, dx in packed pixels), true_near [2,t,t], black_level and wb [4]; any may be missing,
            and other names are returned unchanged.
        plan: the window.
        crop_px: side of the window, packed pixels.
        scale: the zoom s.

    Returns:
        the same names and dtypes, contiguous, with t replaced by crop_px.

    Raises:
        ValueError: the window reaches outside a picture.
    """
    result = dict(sample)
    for name in ("lr_raw", "lr_render", "lr_rgb", "hr_rgb", "true_rgb", "true_flow", "true_near"):
        if name in sample:
            _check(name, sample[name], plan, crop_px, scale)
    if "lr_raw" in sample:
        mosaic = packed_to_mosaic(sample["lr_raw"][None])
        result["lr_raw"] = mosaic_to_packed(_crop(mosaic, plan, 2 * crop_px, 1))[0].contiguous()
    for name, factor in (("lr_render", 1), ("lr_rgb", 1), ("hr_rgb", scale), ("true_rgb", scale)):
        if name in sample:
            result[name] = _crop(sample[name], plan, 2 * crop_px, factor)
    if "true_flow" in sample:
        result["true_flow"] = _crop_flow(sample["true_flow"], plan, crop_px)
    if "true_near" in sample:  # a flipped window starts half a packed pixel off the grid: the nearest pixel
        rows, cols = (slice(start // 2, start // 2 + crop_px) for start in (plan.row, plan.col))
        result["true_near"] = _flip(sample["true_near"][:, rows, cols], plan).contiguous()
    if plan.transpose:
        for name in ("black_level", "wb"):
            if name in sample:
                result[name] = sample[name][[0, 2, 1, 3]]  # a transpose swaps the greens
    return result


def _crop(image: Tensor, plan: CropPlan, size: int, factor: int) -> Tensor:
    """The window of `size` mosaic pixels, from an image with `factor` pixels per mosaic pixel."""
    rows = slice(plan.row * factor, (plan.row + size) * factor)
    cols = slice(plan.col * factor, (plan.col + size) * factor)
    return _flip(image[..., rows, cols], plan).contiguous()


def _flip(image: Tensor, plan: CropPlan) -> Tensor:
    axes = [axis for axis, flip in ((-2, plan.flip_rows), (-1, plan.flip_cols)) if flip]
    flipped = image.flip(axes) if axes else image
    return flipped.transpose(-2, -1) if plan.transpose else flipped


def _crop_flow(flow: Tensor, plan: CropPlan, crop_px: int) -> Tensor:
    """The window of a displacement field.

    A flipped window starts half a packed pixel off the field's grid, so its values are means of two neighbours.
    """
    window = flow[:, plan.row // 2 :, plan.col // 2 :].float()
    if plan.flip_rows:
        window = (window[:, :-1] + window[:, 1:]) / 2
    if plan.flip_cols:
        window = (window[:, :, :-1] + window[:, :, 1:]) / 2
    window = _flip(window[:, :crop_px, :crop_px], plan)
    signs = torch.tensor([-1.0 if plan.flip_rows else 1.0, -1.0 if plan.flip_cols else 1.0], device=flow.device)
    window = window * signs[:, None, None]
    return (window.flip(0) if plan.transpose else window).to(flow.dtype).contiguous()


def _check(name: str, image: Tensor, plan: CropPlan, crop_px: int, scale: int) -> None:
    factor = {"lr_raw": 1, "true_flow": 1, "true_near": 1, "lr_render": 2, "lr_rgb": 2}.get(name, 2 * scale)
    height, width = image.shape[-2] * 2 / factor, image.shape[-1] * 2 / factor
    if plan.row + 2 * crop_px > height or plan.col + 2 * crop_px > width:
        raise ValueError(
            f"{name} {tuple(image.shape)}: expected at least {plan.row + 2 * crop_px}x{plan.col + 2 * crop_px} mosaic "
            f"pixels for this window, got {height:g}x{width:g}"
        )
