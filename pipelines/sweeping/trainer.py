"""One trial of `sdan tune`: trains a setting with the real trainer, and measures what the sweep compares."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from ray.train import UserCallback

from pipelines import cluster, registry
from pipelines import config as configs
from pipelines.config import ExperimentConfig
from pipelines.loader import index_split, model_inputs, with_curve_of
from pipelines.registry import RegistryError
from pipelines.scoring.held_out import HeldOut, held_out
from pipelines.scoring.pictures import CELL_PX, labelled_grid, to_uint8
from pipelines.train import TrainError, TrainResult, train
from pipelines.training.run_folder import HELD_OUT, is_run, run_folder
from pipelines.training.run_log import grouped
from sdan import checkpoint
from sdan.ops.precision import compute_plan
from sdan.resample import bicubic

COST = "ms_per_megapixel"
"""Metric: milliseconds that the trained network takes per megapixel of its input, on the trial's kind of processor."""
CROPS = 3
"""Held-out crops in the picture of a trial."""
_PATIENCE = 5
"""How often a trial that MLflow's silence ended is continued from its checkpoint."""
_WAIT_S = 30.0


class Reporter(UserCallback):
    """Passes every validation of a trial to the sweep; runs in Ray Train's controller, in the trial's process."""

    def __init__(self, report: Callable[..., None]) -> None:
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        """Ray Train also sends it to the workers, which do not call it: without `report`, which needs a queue there."""
        return UserCallback, ()

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        # The names under which the run's own log has them.
        self.report(grouped(metrics[0]), tiles_of(checkpoint))


def tiles_of(saved: Any) -> dict[str, float] | None:
    """The per-crop scores in a Ray Train checkpoint; None if it has none."""
    if saved is None:
        return None
    with saved.as_directory() as folder:
        path = Path(folder) / HELD_OUT
        return json.loads(path.read_text()) if path.is_file() else None


@dataclass(frozen=True)
class TrialTrainer:
    """The train function that the sweep calls once per trial."""

    shards: str
    config: ExperimentConfig
    data: Path
    plan: cluster.WorkerPlan
    sweep: str
    vgg_weights: Path | None
    crops: Path
    """Folder for the trials' pictures."""
    measure_cost: bool = False
    """Whether to measure COST."""

    def __call__(self, overrides: Mapping[str, Any], report: Any) -> dict[str, float]:
        config = configs.override(self.config, overrides)
        if report.repeat:
            config = replace(config, train=replace(config.train, seed=config.train.seed + report.repeat))
        result = self._train(config, report)
        scores = grouped(result.scores)
        index = index_split(self.shards, "val")
        held = held_out(index, with_curve_of(index, config), limit=CROPS, align=False)
        save_crops(result.model, held, self.crops / f"{report.trial_id}.jpg")
        if self.measure_cost:
            gpus = self.plan.gpus_per_worker if self.plan.use_gpu else 0
            # DEFAULT: outside the trial's own placement group, which has no GPU.
            task = ray.remote(num_cpus=0, num_gpus=gpus, scheduling_strategy="DEFAULT")(cost)
            scores[COST] = ray.get(task.remote(checkpoint.load(result.model).model, held))
        return scores

    def _train(self, config: ExperimentConfig, report: Any) -> TrainResult:
        """Train; if MLflow does not answer at the start, at the end or to a report, wait and go on from the last
        checkpoint."""
        name = f"{self.sweep}-{report.trial_id}"
        for left in reversed(range(_PATIENCE)):
            try:
                return train(
                    self.shards,
                    config,
                    data=self.data,
                    name=name,
                    resume=is_run(run_folder(self.data, name)),
                    vgg_weights=self.vgg_weights,
                    run_id=report.run_id,
                    callbacks=[Reporter(report)],
                    register=None,
                    progress=False,
                    max_failures=0,  # a setting that failed would fail again
                    plan=self.plan,
                )
            except (TrainError, RegistryError, MlflowException) as error:
                reporting = getattr(error.__cause__, "controller_failure", None)
                silent = [
                    isinstance(each, RegistryError | MlflowException) for each in (error, error.__cause__, reporting)
                ]
                if not any(silent) or not left:
                    raise
                time.sleep(_WAIT_S)
        raise AssertionError("unreachable")


def save_crops(model: Path, held: HeldOut, path: Path) -> None:
    """Write a JPG of held-out crops: enlarged bicubically, by the model (self), and the target."""
    network = checkpoint.load(model).model
    plan = compute_plan(torch.device("cpu"), "fp32", "contiguous")
    inputs = model_inputs(held.batch, network.config, plan.device)
    with plan.inference():
        output = network(inputs.x, inputs.self_reference, inputs.rendering).zoomed
    columns = {"bicubic": bicubic(inputs.camera, network.config.scale), "SDAN (self)": output, "target": inputs.target}
    rows = []
    for number in range(len(held)):
        middle = [_middle(to_uint8(images[number])) for images in columns.values()]
        rows.append(middle)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labelled_grid(rows, list(columns))).save(path, quality=88)


def _middle(image: Any) -> Any:
    """The central CELL_PX of a picture [H, W, 3], not scaled."""
    top, left = (max(0, (size - CELL_PX) // 2) for size in image.shape[:2])
    return image[top : top + CELL_PX, left : left + CELL_PX]


def cost(model: Any, held: HeldOut) -> float:
    """COST of a network, the median of five passes over one training crop; what tiles repeat is not counted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = compute_plan(device, "auto", "auto")
    inputs = model_inputs(held.select(range(1)).batch, model.config, device)
    network = model.to(device).eval()
    seconds = []
    with plan.inference():
        for _ in range(6):
            began = time.perf_counter()
            network(inputs.x, inputs.self_reference, inputs.rendering)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    height, width = inputs.rendering.shape[-2:]
    return 1e3 * statistics.median(seconds[1:]) / (height * width / 1e6)


def register_winner(data: Path, sweep: str, trial_id: str, run_id: str) -> str:
    """Register a trial's model as challenger, never as champion.

    Returns:
        its version.

    Raises:
        RegistryError: the trial was stopped early and so has no model, or MLflow does not answer.
    """
    uri = registry.default_tracking_uri(data)
    folder = run_folder(data, f"{sweep}-{trial_id}") / "model"
    if not folder.is_dir():
        raise RegistryError(
            f"--register, {folder}: expected the model of trial {trial_id}, got none, because the trial was stopped "
            "early; train the setting at full length"
        )
    version = registry.register_model(uri, run_id, folder)
    registry.connect(uri, write=True).set_registered_model_alias(registry.MODEL, registry.CHALLENGER, version)
    return version
