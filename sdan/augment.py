"""Random crops, flips and transposes that keep RAW's Bayer phase and every picture registered to it.

All positions are in mosaic pixels of the LR tile. A flip moves the colour phase: of an even number of RGGB rows the
last is a G B row, so a flipped crop starts one sensor row later, at an odd row, and its last row is an R G row again.
A transpose keeps the phase and swaps the two greens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sdan.raw_input import mosaic_to_packed, packed_to_mosaic


class Integers(Protocol):
    """Where random numbers come from: numpy.random.Generator, or anything with its `integers`."""

    def integers(self, low: int, high: int, /) -> Any:
        """A whole number in [low, high)."""


@dataclass(frozen=True)
class CropPlan:
    """One window of a tile and how it is turned: cropped, then flipped, then transposed."""

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
                raise ValueError(
                    f"{name}: an {'odd' if flip else 'even'} start of 0 or more keeps the phase, got {start}"
                )


def random_plan(generator: Integers, tile_px: int, crop_px: int, *, flips: bool = True) -> CropPlan:
    """A window anywhere in the tile, each flip and the transpose with probability 1/2.

    Always draws the same count of numbers. A tile of the crop's own size has no room for the sensor row that a flip
    drops: it is then only transposed.

    Args:
        generator: e.g. numpy.random.default_rng(seed).
        tile_px: side of the tile, packed pixels.
        crop_px: side of the crop, packed pixels.
        flips: False: no flips and no transpose.

    Raises:
        ValueError: the crop is larger than the tile.
    """
    room = tile_px - crop_px
    if crop_px < 1 or room < 0:
        raise ValueError(f"a crop of 1 to {tile_px} packed pixels expected (the tile's size), got {crop_px}")
    turns = [bool(generator.integers(0, 2)) and flips for _ in range(3)]
    flip_rows, flip_cols = turns[0] and room > 0, turns[1] and room > 0
    # A flipped window starts at an odd row, so its last possible start lies one row before an unflipped one's.
    row = 2 * int(generator.integers(0, room + (0 if flip_rows else 1))) + flip_rows
    col = 2 * int(generator.integers(0, room + (0 if flip_cols else 1))) + flip_cols
    return CropPlan(row, col, flip_rows, flip_cols, turns[2])


def apply(sample: Mapping[str, Tensor], plan: CropPlan, crop_px: int, scale: int) -> dict[str, Tensor]:
    """Cut the same window out of everything in `sample` that has pixels, and turn it the same way.

    Args:
        sample: lr_raw [4,t,t] (R, G1, G2, B), lr_render and lr_rgb [3,2t,2t], hr_rgb and true_rgb [3,2ts,2ts],
            true_flow [2,t,t] (dy, dx in packed pixels), black_level and wb [4]; any may be missing, others pass as they
            are.
        plan: the window.
        crop_px: its side, packed pixels.
        scale: the zoom s.

    Returns:
        the same names, contiguous, dtypes kept, t replaced by crop_px.

    Raises:
        ValueError: the window leaves the tile, or a picture has another size than the RAW tile says.
    """
    result = dict(sample)
    for name in ("lr_raw", "lr_render", "lr_rgb", "hr_rgb", "true_rgb", "true_flow"):
        if name in sample:
            _check(name, sample[name], plan, crop_px, scale)
    if "lr_raw" in sample:
        mosaic = packed_to_mosaic(sample["lr_raw"][None])
        result["lr_raw"] = mosaic_to_packed(_turned(mosaic, plan, 2 * crop_px, 1))[0].contiguous()
    for name, factor in (("lr_render", 1), ("lr_rgb", 1), ("hr_rgb", scale), ("true_rgb", scale)):
        if name in sample:
            result[name] = _turned(sample[name], plan, 2 * crop_px, factor)
    if "true_flow" in sample:
        result["true_flow"] = _turned_flow(sample["true_flow"], plan, crop_px)
    if plan.transpose:
        for name in ("black_level", "wb"):
            if name in sample:
                result[name] = sample[name][[0, 2, 1, 3]]  # the greens have changed places
    return result


def _turned(image: Tensor, plan: CropPlan, size: int, factor: int) -> Tensor:
    rows = slice(plan.row * factor, (plan.row + size) * factor)
    cols = slice(plan.col * factor, (plan.col + size) * factor)
    return _flipped(image[..., rows, cols], plan).contiguous()


def _flipped(image: Tensor, plan: CropPlan) -> Tensor:
    axes = [axis for axis, flip in ((-2, plan.flip_rows), (-1, plan.flip_cols)) if flip]
    flipped = image.flip(axes) if axes else image
    return flipped.transpose(-2, -1) if plan.transpose else flipped


def _turned_flow(flow: Tensor, plan: CropPlan, crop_px: int) -> Tensor:
    """A flipped window starts half a packed pixel off the flow's grid: there it is the mean of two neighbours."""
    window = flow[:, plan.row // 2 :, plan.col // 2 :].float()
    if plan.flip_rows:
        window = (window[:, :-1] + window[:, 1:]) / 2
    if plan.flip_cols:
        window = (window[:, :, :-1] + window[:, :, 1:]) / 2
    window = _flipped(window[:, :crop_px, :crop_px], plan)
    signs = torch.tensor([-1.0 if plan.flip_rows else 1.0, -1.0 if plan.flip_cols else 1.0], device=flow.device)
    window = window * signs[:, None, None]
    return (window.flip(0) if plan.transpose else window).to(flow.dtype).contiguous()


def _check(name: str, image: Tensor, plan: CropPlan, crop_px: int, scale: int) -> None:
    factor = {"lr_raw": 1, "true_flow": 1, "lr_render": 2, "lr_rgb": 2}.get(name, 2 * scale)
    height, width = image.shape[-2] * 2 / factor, image.shape[-1] * 2 / factor
    if plan.row + 2 * crop_px > height or plan.col + 2 * crop_px > width:
        raise ValueError(
            f"{name} {tuple(image.shape)}: a window of {2 * crop_px} mosaic pixels at ({plan.row}, {plan.col}) leaves "
            f"the tile of {height:g}x{width:g} mosaic pixels"
        )
