"""Scores of one row: means, intervals, tiles in Parquet, and pictures of held-out crops.

Every row is scored on the same crops and against the same targets, those of the camera's look, by the functions that
`sdan evaluate` uses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines import config as configs
from pipelines.comparing import state
from pipelines.comparing.rows import Row
from pipelines.comparing.state import Ends, RowScores
from pipelines.config import ExperimentConfig, TrainConfig
from pipelines.loader import ShardIndex, check_fit, model_inputs, with_curve_of
from pipelines.scoring.bootstrap import Interval, difference_interval, mean_interval
from pipelines.scoring.held_out import held_out
from pipelines.scoring.parts import by_detail, detail_of
from pipelines.scoring.pictures import to_uint8
from pipelines.scoring.scores import PerCrop, deployed, mean_scores, of_protocol, score_bicubic, score_model
from pipelines.scoring.tile_scores import FILE, tile_rows, write_tiles
from sdan import metrics
from sdan.baselines import Network, SRResNet
from sdan.losses import LossConfig
from sdan.network import SDANConfig
from sdan.ops.precision import compute_plan
from sdan.resample import bicubic

PICTURES = 48
"""The most crops whose pictures are kept."""


@dataclass(frozen=True)
class Trained:
    """A row's trained network."""

    model: Network
    config: ExperimentConfig
    run: str
    features: str | None
    """VGG19, VGG16, or None."""


class Scorer:
    """Scores rows on the held-out crops, which are read once.

    Args:
        index: the split that is scored.
        crop_px: side of the crops in packed pixels, that of the training crops.
        limit: the most crops.
        out: the output folder.

    Raises:
        ShardsError: tiles that are too small, or a shard that cannot be read.
    """

    def __init__(self, index: ShardIndex, crop_px: int, limit: int, out: Path) -> None:
        self.index, self.out, self.scale = index, out, index.info.scale
        config = _crops_config(crop_px, self.scale)
        self.held = held_out(index, with_curve_of(index, config), limit=limit, align=True)
        self.tiles = [state.tile_name(name) for name in self.held.names]
        self.simulated = "true_rgb" in self.held.batch
        count = min(PICTURES, len(self.held))
        self.shown = np.linspace(0, len(self.held) - 1, count).round().astype(int).tolist()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.plan = compute_plan(device)
        self.baseline = self._bicubic("camera")

    def check(self, config: ExperimentConfig) -> None:
        """Raise ShardsError unless the shards have what a row's network reads."""
        check_fit(self.index, with_curve_of(self.index, config))

    @property
    def has_rendering(self) -> bool:
        """Whether the crops have LibRaw's rendering: pairs without RAW have none."""
        return "lr_render" in self.held.batch

    def score_picture(self, row: Row) -> RowScores:
        """Score a bicubic row and write its files."""
        source = row.picture or "camera"
        scores = self.baseline if source == "camera" else self._bicubic(source)
        name = "lr_rgb" if source == "camera" else "lr_render"
        for number in self.shown:
            picture = bicubic(self.held.batch[name][number : number + 1].float() / 255, self.scale)
            self._save(state.CROPS, number, row.name, picture[0])
        return self._written(row, {"self": scores}, None)

    def score_network(self, row: Row, trained: Trained) -> RowScores:
        """Score a trained row by both protocols (one, for a network that ignores the reference) and write its files."""
        model = trained.model.to(self.plan.device).to(memory_format=self.plan.memory_format)
        found = score_model(model, self.held, self.plan, row.protocols, perceptual=True, by_plane=True)
        per_protocol = {protocol: of_protocol(found, protocol) for protocol in row.protocols}
        self._save_outputs(row, model, trained.config.model)
        return self._written(row, per_protocol, trained)

    def save_targets(self) -> None:
        """Write target.png, and for simulated data true.png, of each crop whose pictures are kept."""
        for number in self.shown:
            for column, name in (("hr_rgb", state.TARGET), ("true_rgb", state.TRUE)):
                if column in self.held.batch:
                    self._save(state.CROPS, number, Path(name).stem, self.held.batch[column][number].float() / 255)

    def examples(self, count: int) -> list[int]:
        """The numbers of crops for the grid: of those with pictures, from the most detailed to the median one."""
        targets = self.held.batch["true_rgb" if self.simulated else "hr_rgb"][self.shown]
        return list(dict.fromkeys(self.shown[place] for place in by_detail(detail_of(targets), count)))

    def _bicubic(self, source: str) -> PerCrop:
        # score_bicubic needs only a network's config.
        shape = SRResNet(_crops_config(1, self.scale).model)
        return score_bicubic(shape, self.held, self.plan.device, source, perceptual=True, by_plane=True)

    def _save_outputs(self, row: Row, model: Network, config: SDANConfig) -> None:
        for number in self.shown:
            part = self.held.select(range(number, number + 1))
            inputs = model_inputs(part.batch, config, self.plan.device)
            with self.plan.inference():
                self._save(state.CROPS, number, row.name, deployed(model, inputs)[0])
                if "oracle" not in row.protocols:
                    continue
                output = model(inputs.x, inputs.oracle_reference, inputs.rendering)
            self._save(state.ORACLE, number, row.name, output.zoomed[0])
            offset = (output.offset[0] * config.mosaic_factor).half().cpu().numpy()
            path = self.out / state.OFFSETS / self.tiles[number] / f"{row.name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, offset)

    def _save(self, folder: str, number: int, name: str, picture: Tensor) -> None:
        path = self.out / folder / self.tiles[number] / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(to_uint8(picture)).save(path)

    def _written(self, row: Row, per_protocol: Mapping[str, PerCrop], trained: Trained | None) -> RowScores:
        """Write tiles.parquet, then scores.json, which marks the row as finished."""
        folder = state.row_folder(self.out, row.name)
        folder.mkdir(parents=True, exist_ok=True)
        write_tiles(folder / FILE, list(self._tile_rows(row, per_protocol)))
        sequences = self.held.sequences
        intervals, differences = {}, {}
        for protocol, scores in per_protocol.items():
            known = [name for name in scores if name in self.baseline]
            intervals[protocol] = {name: _ends(mean_interval(scores[name], sequences)) for name in known}
            differences[protocol] = {
                name: _ends(difference_interval(scores[name], self.baseline[name], sequences)) for name in known
            }
        result = RowScores(
            row=row.name,
            label=row.label,
            input=row.input,
            scores={
                protocol: {name: _plain(mean) for name, mean in mean_scores(scores).items()}
                for protocol, scores in per_protocol.items()
            },
            intervals=intervals,
            differences={} if row.picture == "camera" else differences,
            crops=len(self.held),
            sequences=len(set(sequences)),
            simulated=self.simulated,
            missing={name: said for name, (_, why) in metrics.PERCEPTUAL.items() if (said := why())},
            **_of_network(trained),
        )
        result.write(self.out)
        return result

    def _tile_rows(self, row: Row, per_protocol: Mapping[str, PerCrop]) -> Iterator[dict[str, object]]:
        for protocol, scores in per_protocol.items():
            rows = tile_rows({row.label: scores}, self.held.columns)
            for values, tile in zip(rows, self.tiles, strict=True):
                yield {"method": values.pop("method"), "row": row.name, "protocol": protocol, "tile": tile, **values}


def _crops_config(crop_px: int, scale: int) -> ExperimentConfig:
    """A config that cuts crops of pictures with or without RAW, in the camera's look."""
    model = SDANConfig(input="rgb", scale=scale, features=1, blocks=1, attention="none")
    return ExperimentConfig("crops", model, LossConfig(border_px=0), TrainConfig(crop_px=crop_px))


def _of_network(trained: Trained | None) -> dict[str, Any]:
    if trained is None:
        return {}
    return {
        "features": trained.features,
        "parameters": sum(each.numel() for each in trained.model.parameters()),
        "run": trained.run,
        "config": configs.to_dict(trained.config),
    }


def _ends(found: Interval) -> Ends:
    return [_plain(value) for value in (found.mean, found.low, found.high)]


def as_interval(ends: Sequence[float | None], sequences: int) -> Interval:
    """What `RowScores` stores as [mean, low, high]."""
    mean, low, high = (math.nan if value is None else value for value in ends)
    return Interval(mean, low, high, sequences)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
