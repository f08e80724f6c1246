"""Stand-ins without Ray and MLflow: for `pipelines.train.train`, one that leaves what a finished run leaves; for
`CompareRuns`, one that only gives ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines import config as configs
from pipelines.comparing.rows import Row
from pipelines.comparing.state import Comparison
from pipelines.loader import with_curve_of
from pipelines.train import TrainError
from pipelines.training import run_folder
from pipelines.training.run_folder import StoredRun
from sdan import checkpoint
from sdan.perceptual.features import load_features, network_name

TINY = (
    *("model.features=8", "model.blocks=1", "model.packing_kernel=4", "train.crop_px=16"),
    *("train.batch_per_worker=2", "loss.border_px=16"),
)
"""--set of a comparison that takes a second a row."""


class StandIn:
    """Calls are recorded; rows in `fail` raise TrainError, and the row `stop_at` raises KeyboardInterrupt half-way."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.fail: set[str] = set()
        self.stop_at: str | None = None

    @property
    def trained(self) -> list[str]:
        """The names of the rows that it was called for."""
        return [call["config"].name for call in self.calls]

    def __call__(self, shards: str, config: configs.ExperimentConfig, *, data: Path, name: str, **options: Any) -> None:
        self.calls.append({"shards": shards, "config": config, "name": name, **options})
        config = with_curve_of(options["pairs"].train, config)
        features = network_name(load_features(options["vgg_weights"])) if config.loss.needs_vgg else None
        if config.name in self.fail:
            raise TrainError(f"run {name}: expected to finish,\n got NaN")
        folder = run_folder.run_folder(data, name)
        run = StoredRun(configs.to_dict(config), shards, options["run_id"], None, 1, None, features)
        run.write(folder)
        if config.name == self.stop_at:
            raise KeyboardInterrupt
        model = checkpoint.ARCHITECTURES[config.architecture](config.model)
        draw_weights(model, config.train.seed)
        checkpoint.save(folder / run_folder.MODEL, model, config=configs.to_dict(config), scores={})


def draw_weights(model: nn.Module, seed: int) -> None:
    """Replace what a new network holds by values that depend on the seed alone. Rows are made by several threads here,
    which would share PyTorch's generator; a real row is trained in a process of its own."""
    generator = torch.Generator().manual_seed(seed)
    for values in model.parameters():
        if values.dim() > 1 and values.any():
            values.data = torch.randn(values.shape, generator=generator) / values[0].numel() ** 0.5
        elif not (values == 1).all():
            values.data.zero_()


class NoRuns:
    """CompareRuns without MLflow."""

    def __init__(self, tracking_uri: str, comparison: Comparison) -> None:
        self.comparison = comparison

    def with_parent(self, out: Path) -> Comparison:
        self.comparison = replace(self.comparison, parent_run="parent")
        self.comparison.write(out)
        return self.comparison

    def child(self, row: Row) -> str:
        return f"run-of-{row.name}"

    def finished(self, row: Row, scores: object) -> None: ...

    def set_aside(self, row: Row, reason: str) -> None: ...

    def artifacts(self, paths: list[Path]) -> None: ...

    @contextmanager
    def running(self) -> Iterator[None]:
        yield
