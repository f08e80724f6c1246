"""Overlapping tiles over a photo: where they lie, and how their outputs are joined into rows without seams.

Positions are in pixels of the network's input x; outputs are `upscale` times as large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Outputs = tuple[Sequence[int], Tensor]
"""(Numbers of columns of tiles, the outputs of these tiles [n, C, upscale tile height, upscale tile width]). `join`
overwrites the outputs."""


@dataclass(frozen=True)
class Tiling:
    """Tiles of one size, in rows and columns, that cover a photo."""

    tops: list[int]
    """First pixel row of each row of tiles."""
    lefts: list[int]
    """First pixel column of each column of tiles."""
    height: int
    """Of a tile."""
    width: int
    """Of a tile."""
    row_weights: list[Tensor]
    """For each row of tiles, float32 [upscale height]: the feathering. At every output row the weights add up to 1."""
    col_weights: list[Tensor]
    """The same for the columns."""
    upscale: int

    def __len__(self) -> int:
        """The number of tiles."""
        return len(self.tops) * len(self.lefts)

    def join(self, rows: Iterable[Iterable[Outputs]], channels: int, device: torch.device) -> Iterator[Tensor]:
        """Blend the outputs of the rows of tiles, from top to bottom; yield the pixel rows that are complete.

        Yields:
            float32 [channels, pixel rows, upscale photo width] on `device`, channels-last in memory as image files
            are. It is valid until the next is asked for.
        """
        scale = self.upscale
        side, width = self.width * scale * channels, (self.lefts[-1] + self.width) * scale * channels
        # Rows of (column, channel) pairs: so no operation has an inner loop over three values.
        total = torch.zeros(self.height * scale, width, device=device)
        all_row_weights = [weights.to(device)[:, None] for weights in self.row_weights]
        col_weights = [weights.to(device).repeat_interleave(channels) for weights in self.col_weights]
        ends = (*self.tops[1:], self.tops[-1] + self.height)
        for top, end, row_weights, outputs in zip(self.tops, ends, all_row_weights, rows, strict=True):
            for columns, tiles in outputs:
                weighted = tiles.permute(0, 2, 3, 1).flatten(2).mul_(row_weights)
                for column, rows_of_tile in zip(columns, weighted.unbind(), strict=True):
                    left = self.lefts[column] * scale * channels
                    total[:, left : left + side].addcmul_(rows_of_tile, col_weights[column])
            complete = (end - top) * scale
            yield total[:complete].unflatten(1, (-1, channels)).permute(2, 0, 1)
            rest = total[complete:].clone()
            total.zero_()[: rest.shape[0]] = rest


def cover(size: tuple[int, int], tile: tuple[int, int], overlap_px: int, *, step: int = 1, upscale: int = 1) -> Tiling:
    """Tiles that cover a photo, at least overlap_px of them shared by neighbours.

    Args:
        size: (height, width) of the photo.
        tile: (height, width) of a tile, at most the photo's.
        step: tiles start at its multiples; the sides of photo and tile must be multiples, too.
    """
    (tops, rows), (lefts, cols) = (
        _axis(side, length, overlap_px, step, upscale) for side, length in zip(size, tile, strict=True)
    )
    return Tiling(tops, lefts, *tile, rows, cols, upscale)


def fitted(side: int, most_px: int, overlap_px: int, step: int = 1) -> int:
    """The least tile side, at most most_px, that covers `side` with as few tiles as most_px does."""
    count = max(1, -(-(side - overlap_px) // (most_px - overlap_px)))
    return -(-(side + (count - 1) * overlap_px) // (count * step)) * step


def _axis(length: int, tile: int, overlap: int, step: int, upscale: int) -> tuple[list[int], list[Tensor]]:
    """The tiles' starts along one axis, at most tile - overlap apart, and their weights; the last ends at the edge."""
    stride = max(step, (tile - overlap) // step * step)  # a photo narrower than the overlap is one tile
    starts = [*range(0, length - tile, stride), length - tile]
    return starts, _weights(starts, length, tile, overlap, upscale)


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
