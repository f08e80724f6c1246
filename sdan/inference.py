"""Zoom a whole photo in overlapping, feathered tiles of the size that the network was trained on.

Use the training crop's size for tiles: cross packing attention sums over the tile, so its result depends on the size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sdan.network import CHANNELS, SDANConfig
from sdan.ops.precision import autocast
from sdan.raw_input import mosaic_to_packed, packed_to_mosaic
from sdan.resample import low_pass


@torch.inference_mode()
def zoom(
    model: nn.Module,
    x: Tensor,
    rendering: Tensor,
    *,
    tile_px: int,
    overlap_px: int | None = None,
    batch: int = 4,
    precision: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Zoom one photo with its rendering as reference ({X, X}); no target is needed.

    The outer part of inner tile borders, where the network saw zero padding, is dropped. The rest of the overlap is
    feathered with weights that add up to 1. Memory: the output and a few tiles.

    Args:
        model: SDAN or SRResNet; it is put into eval mode and runs on its own device.
        x: one photo as the network's input, [C,H,W] in [0, 1] (raw_input.normalise), any size.
        rendering: [3,H,W] ([3,2H,2W] for packed) sRGB in [0, 1], of the same RAW; for input="rgb" x itself.
        tile_px: side of a tile, pixels of x; use the training crop's.
        overlap_px: overlap of neighbouring tiles, pixels of x; default a quarter of the tile, at least 8 mosaic
            pixels.
        batch: tiles per forward pass.
        precision: auto, fp32, bf16 or fp16 (ops.precision.resolve).
        progress: called with (tiles done, total tiles).

    Returns:
        float32 [3, upscale H, upscale W] in [0, 1], on the CPU.

    Raises:
        ValueError: sizes that do not match, or an overlap outside 8 mosaic pixels to half a tile.
    """
    config: SDANConfig = model.config  # type: ignore[assignment]
    overlap = _check(config, x, rendering, tile_px, overlap_px)
    height, width = x.shape[-2:]
    x, reference, rendering = _padded(config, x, rendering, tile_px)
    step = 2 if config.input == "mosaic" else 1  # a mosaic's tiles start on an R photosite
    rows, cols = (_starts(side, tile_px, overlap, step) for side in x.shape[-2:])
    row_weights, col_weights = (
        _weights(starts, side, tile_px, overlap, config.upscale)
        for starts, side in ((rows, x.shape[-2]), (cols, x.shape[-1]))
    )
    output = torch.zeros(3, *(config.upscale * side for side in x.shape[-2:]))
    tiles = [(i, j) for i in range(len(rows)) for j in range(len(cols))]
    model.eval()
    device = next(model.parameters()).device
    for done in range(0, len(tiles), batch):
        chosen = tiles[done : done + batch]
        corners = [(rows[i], cols[j]) for i, j in chosen]
        with autocast(precision, device):
            zoomed = _zoom_tiles(model, config, x, reference, rendering, corners, tile_px, device)
        for (i, j), (row, col), tile in zip(chosen, corners, zoomed, strict=True):
            top, left, side = row * config.upscale, col * config.upscale, tile_px * config.upscale
            tile *= row_weights[i][:, None] * col_weights[j]
            output[:, top : top + side, left : left + side] += tile
        if progress is not None:
            progress(done + len(chosen), len(tiles))
    return output[:, : height * config.upscale, : width * config.upscale].clamp_(0, 1).contiguous()


def _zoom_tiles(
    model: nn.Module,
    config: SDANConfig,
    x: Tensor,
    reference: Tensor,
    rendering: Tensor,
    corners: list[tuple[int, int]],
    tile_px: int,
    device: torch.device,
) -> Tensor:
    """[n,3,upscale tile,upscale tile] float32 on the CPU, of the tiles at `corners` (pixels of x)."""
    factor = config.mosaic_factor
    tiles = _windows(x, corners, tile_px, 1).to(device)
    references = _windows(reference, corners, tile_px, 1).to(device)
    return model(tiles, references, _windows(rendering, corners, tile_px, factor).to(device)).zoomed.float().cpu()


def _windows(image: Tensor, corners: list[tuple[int, int]], side: int, factor: int) -> Tensor:
    side *= factor
    tops_lefts = [(row * factor, col * factor) for row, col in corners]
    return torch.stack([image[:, top : top + side, left : left + side].float() for top, left in tops_lefts])


def _starts(length: int, tile: int, overlap: int, step: int) -> list[int]:
    """Tile origins that cover `length`, at most tile - overlap apart; the last tile ends at the photo's edge."""
    stride = (tile - overlap) // step * step
    return [*range(0, length - tile, stride), length - tile]


def _weights(starts: list[int], length: int, tile: int, overlap: int, upscale: int) -> list[Tensor]:
    """Each tile's feathering weights along one axis, at output resolution; they add up to 1 at every pixel.

    At an inner border, the outer quarter of the overlap has weight 0 and its middle half is a ramp. There is no ramp at
    the photo's edge.
    """
    position = (torch.arange(tile * upscale, dtype=torch.float64) + 0.5) / upscale  # pixels of x from the tile's start
    margin, ramp = overlap / 4, overlap / 2
    total = torch.zeros(length * upscale, dtype=torch.float64)
    windows = []
    for start in starts:
        rising = ((position - margin) / ramp).clamp(0, 1) if start > 0 else torch.ones_like(position)
        falling = (
            ((tile - position - margin) / ramp).clamp(0, 1) if start + tile < length else torch.ones_like(position)
        )
        windows.append(torch.minimum(rising, falling))
        total[start * upscale : (start + tile) * upscale] += windows[-1]
    return [
        (window / total[start * upscale : (start + tile) * upscale]).float()
        for start, window in zip(starts, windows, strict=True)
    ]


def _padded(config: SDANConfig, x: Tensor, rendering: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, reference, rendering), padded at the bottom and the right to at least the size of a tile.

    x and the reference are reflected about the outer pixel, which keeps a mosaic's colour phase. The rendering, which
    the network only moves and enlarges, repeats its border pixel, as at every edge of a photo.
    """
    factor = config.mosaic_factor
    tall, wide = (max(side, tile) * factor for side in x.shape[-2:])
    reference = low_pass(_extend(rendering, tall, wide, _reflected), factor)
    if config.input == "packed":  # reflect photosites, not cells, so that RAW and reference stay registered
        mosaic = _extend(packed_to_mosaic(x[None])[0], tall, wide, _reflected)
        x = mosaic_to_packed(mosaic[None])[0]
    else:
        x = _extend(x, tall, wide, _reflected)
    return x, reference, _extend(rendering, tall, wide, _repeated)


def _extend(image: Tensor, height: int, width: int, index: Callable[[int, int], Tensor]) -> Tensor:
    if tuple(image.shape[-2:]) == (height, width):
        return image
    rows, cols = index(height, image.shape[-2]), index(width, image.shape[-1])
    return image[:, rows.to(image.device)][:, :, cols.to(image.device)]


def _reflected(new: int, old: int) -> Tensor:
    """`new` indices into `old` pixels, reflected about the outer ones: 0, 1, ..., old - 1, old - 2, ..., 0, 1, ..."""
    period = max(2 * (old - 1), 1)
    index = torch.arange(new) % period
    return torch.minimum(index, period - index) if old > 1 else torch.zeros_like(index)


def _repeated(new: int, old: int) -> Tensor:
    """`new` indices into `old` pixels, the last one repeated."""
    return torch.arange(new).clamp(max=old - 1)


def _check(config: SDANConfig, x: Tensor, rendering: Tensor, tile_px: int, overlap_px: int | None) -> int:
    """The overlap to use, pixels of x; raises ValueError for sizes that do not match."""
    channels, factor = CHANNELS[config.input], config.mosaic_factor
    if x.dim() != 3 or x.shape[0] != channels or 0 in x.shape:
        raise ValueError(f"x: expected one photo [{channels},H,W] for input={config.input!r}, got {tuple(x.shape)}")
    expected = (3, x.shape[1] * factor, x.shape[2] * factor)
    if tuple(rendering.shape) != expected:
        raise ValueError(f"rendering: expected {expected}, got {tuple(rendering.shape)}")
    if config.input == "mosaic" and (x.shape[1] % 2 or x.shape[2] % 2):
        raise ValueError(f"x: expected even height and width, for whole RGGB cells, got {tuple(x.shape[1:])}")
    config.check_crop(tile_px)
    # The outer quarter is dropped; it must cover the 2 pixels that bicubic interpolation reads past a tile's border.
    minimum = 8 // factor
    overlap = max(tile_px // 4, minimum) if overlap_px is None else overlap_px
    if not minimum <= overlap <= tile_px // 2:
        raise ValueError(f"overlap_px: expected {minimum} to {tile_px // 2}, half of tile_px={tile_px}, got {overlap}")
    return overlap
