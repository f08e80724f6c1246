"""Fixed crops of a held-out split: what validation and evaluation score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.config import ExperimentConfig
from pipelines.loader import ShardIndex, check_fit, cut_crop, in_rendering_look, read_tile
from preprocessing.registration.aligned_target import align_to
from preprocessing.storage import one_line
from sdan import augment

OF_TILE = ("sequence", "pair", "row", "col", "camera", "focal_lr_mm", "focal_hr_mm", "iso_lr", "aligned_by")
"""The columns of the shards by which scores are grouped (preprocessing/schema.py)."""

Tile = tuple[int, int]
"""(number of the pair in the index, number of the tile in the pair)."""


@dataclass(frozen=True)
class HeldOut:
    """Fixed crops of a held-out split, stacked."""

    batch: dict[str, Tensor]
    """Columns of `CropStream.crop`, stacked: lr_raw and lr_render if the shards have RAW; true_rgb, true_flow and
    true_near if every crop has them."""
    names: tuple[str, ...]
    """sequence/pair@row,col of each crop."""
    columns: tuple[dict[str, Any], ...]
    """The columns OF_TILE of each crop's tile, as plain values; None where unknown."""
    aligned: Tensor | None
    """[N,3,sH,sW] uint8: the target registered to the bicubically enlarged camera JPG; None unless requested."""
    aligned_mask: Tensor | None
    """[N,1,sH,sW] bool: True where `aligned` is valid; all False for a crop whose registration failed."""

    def __len__(self) -> int:
        return len(self.names)

    def select(self, numbers: range) -> HeldOut:
        """The crops `numbers`, e.g. one worker's part."""
        picked = list(numbers)
        rest = {name: value[picked] for name, value in self.batch.items()}
        aligned = None if self.aligned is None else self.aligned[picked]
        mask = None if self.aligned_mask is None else self.aligned_mask[picked]
        names, columns = tuple(self.names[n] for n in picked), tuple(self.columns[n] for n in picked)
        return replace(self, batch=rest, names=names, columns=columns, aligned=aligned, aligned_mask=mask)

    @property
    def sequences(self) -> list[str]:
        """The sequence of each crop."""
        return [columns["sequence"] for columns in self.columns]


def held_out(index: ShardIndex, config: ExperimentConfig, *, limit: int | None, align: bool) -> HeldOut:
    """The central train.crop_px crop of at most `limit` tiles, evenly spaced in the list of all tiles.

    Args:
        limit: the largest number of crops; None: one per tile.
        align: also register each target to its input (the aligned target).

    Raises:
        ShardsError: the shards do not fit the config, or one cannot be read.
    """
    check_fit(index, config)
    return read_crops(index, config, chosen_tiles(index, limit), align=align)


def chosen_tiles(index: ShardIndex, limit: int | None) -> list[Tile]:
    """At most `limit` tiles, evenly spaced in the list of all; None: all."""
    tiles = [(pair, tile) for pair, count in enumerate(index.tiles) for tile in range(count)]
    if limit is not None and limit < len(tiles):
        tiles = [tiles[int(place)] for place in np.linspace(0, len(tiles) - 1, limit).round()]
    return tiles


def read_crops(index: ShardIndex, config: ExperimentConfig, tiles: Sequence[Tile], *, align: bool) -> HeldOut:
    """The central train.crop_px crop of each of the tiles.

    Args, Raises: as held_out, but that the shards suit the config is not checked; OSError names the file.
    """
    margin = 2 * ((index.info.tile_px - config.train.crop_px) // 2)
    plan = augment.CropPlan(row=margin, col=margin, flip_rows=False, flip_cols=False, transpose=False)
    window = slice(margin * config.model.scale, (margin + 2 * config.train.crop_px) * config.model.scale)
    names, columns, samples, aligned = [], [], [], []
    for pair, tile in tiles:
        try:
            row = read_tile(index, pair, tile)
        except OSError as error:  # a disk or network error, or a damaged page: say where
            raise OSError(f"{index.paths[pair]}: {one_line(error)}") from error
        if config.train.look == "rendering":
            row |= in_rendering_look(index, pair, row, row)
        names.append(f"{row['sequence']}/{row['pair']}@{row['row']},{row['col']}")
        columns.append({name: _plain(row.get(name)) for name in OF_TILE})
        samples.append(cut_crop(row, plan, config.train.crop_px, index.info.scale))
        if align:  # register the whole tile, which has more detail than the crop
            target, mask = align_to(row["hr_rgb"], row["lr_rgb"], index.info.scale)
            aligned.append((target[:, window, window], mask[window, window]))
    present = [name for name in samples[0] if all(name in sample for sample in samples)]
    return HeldOut(
        batch={name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in present},
        names=tuple(names),
        columns=tuple(columns),
        aligned=torch.from_numpy(np.stack([target for target, _ in aligned])) if align else None,
        aligned_mask=torch.from_numpy(np.stack([mask for _, mask in aligned]))[:, None] if align else None,
    )


def _plain(value: Any) -> Any:
    """A decoded scalar as a Python value; None for NaN."""
    plain = value.item() if isinstance(value, np.ndarray | np.generic) else value
    return None if isinstance(plain, float) and math.isnan(plain) else plain
