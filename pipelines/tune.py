"""`sdan tune`: runs the sweep of tuning/ over the real trainer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from pipelines import cluster, registry
from pipelines import config as configs
from pipelines.config import ExperimentConfig
from pipelines.loader import check_fit, index_split, with_curve_of
from pipelines.train import train
from pipelines.training.progress import SELECT_BY
from pipelines.training.run_folder import is_run, run_folder
from pipelines.training.run_log import grouped
from sdan.losses import VGG_WEIGHTS
from sdan.perceptual.st_lpips import load_st_lpips
from sdan.perceptual.vgg19 import load_vgg19
from tuning import tracking
from tuning.search import SLOT
from tuning.space import check_space, default_space, load_space
from tuning.summary import table
from tuning.sweep import RECORD, SweepResult, check_sweep, run_sweep

SWEEPS = "sweeps"
"""Folder below DATA of the sweeps' folders."""


class _Report(UserCallback):
    """Passes every validation of a trial to the sweep; runs in Ray Train's controller."""

    def __init__(self, report: Callable[[dict[str, float]], None]) -> None:
        self.report = report

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self.report(grouped(metrics[0]))  # the names under which the run's own log has them


@dataclass(frozen=True)
class TrialTrainer:
    """The train function that the sweep calls once per trial."""

    shards: str
    config: ExperimentConfig
    data: Path
    workers: int | None
    sweep: str
    vgg_weights: Path | None

    def __call__(self, overrides: Mapping[str, Any], report: Any) -> dict[str, float]:
        name = f"{self.sweep}-{report.trial_id}"
        result = train(
            self.shards,
            configs.override(self.config, overrides),
            data=self.data,
            workers=self.workers,
            name=name,
            resume=is_run(run_folder(self.data, name)),
            vgg_weights=self.vgg_weights,
            run_id=report.run_id,
            callbacks=[_Report(report)],
            register=None,
            progress=False,
            max_failures=0,  # a setting that failed would fail again
        )
        return grouped(result.scores)


def tune(
    shards: str,
    config: ExperimentConfig,
    *,
    data: Path,
    trials: int,
    space: Path | None = None,
    workers: int | None = None,
    vgg_weights: Path | None = None,
    name: str = "sweep",
    resume: bool = False,
) -> SweepResult:
    """Sweep `space` (default: tuning.space.default_space) over the real trainer, starting from `config`.

    Args:
        trials: number of settings to try.
        space: a Python file that defines SPACE.
        workers, vgg_weights: as for `train`, in every trial.
        name: the sweep's name; `resume` continues the sweep of that name.

    Raises:
        SweepError, ConfigError, ShardsError, PerceptualError, ClusterError: before any trial starts.
    """
    cluster.check_workers(workers)
    check_sweep(name, data / SWEEPS, num_trials=trials, resume=resume)
    searched = check_space(load_space(space) if space else default_space())
    unknown = sorted(key for key in searched if "." not in key or key not in configs.flatten(config))
    if unknown:
        configs.override(config, {unknown[0]: ""})  # raises an error that names the nearest known key
    if "://" not in shards:
        shards = str(Path(shards).resolve())
    index = index_split(shards, "train")
    check_fit(index, with_curve_of(index, config))
    index_split(shards, "val")
    if config.loss.needs_vgg or {f"loss.{name}" for name in VGG_WEIGHTS} & set(searched):
        load_vgg19(vgg_weights)  # fail here rather than in each trial
    if config.loss.st_lpips_weight > 0 or "loss.st_lpips_weight" in searched:
        load_st_lpips()
    uri = registry.default_tracking_uri(data)
    registry.prepare_database(uri)
    cluster.start_ray(resources={SLOT: 1.0})
    cluster.plan_workers(workers)
    with _trial_lines():
        return run_sweep(
            TrialTrainer(shards, config, data.resolve(), workers, name, vgg_weights and vgg_weights.resolve()),
            searched,
            name=name,
            storage_path=data / SWEEPS,
            tracking_uri=uri,
            experiment_id=registry.open_experiment(uri, "sdan-sweeps"),
            num_trials=trials,
            max_epochs=config.train.epochs,
            metric=SELECT_BY,
            seed=config.train.seed,
            resume=resume,
            parent_tags={"config": config.name, "shards": shards},
        )


def kept(data: Path, name: str) -> str:
    """What an interrupted `sdan tune` says: what is kept, and how to go on."""
    if not (data / SWEEPS / name / RECORD).is_file():
        return "no trial was started; run the command again"
    return f"sweep {name} keeps its finished trials and the checkpoints of the others; add --resume to go on"


@contextmanager
def _trial_lines() -> Iterator[None]:
    """Print the lines that tuning/tracking.py logs, at the start and end of each trial, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("tune: %(message)s"))
    before = tracking.logger.level
    tracking.logger.setLevel(logging.INFO)
    tracking.logger.addHandler(handler)
    try:
        yield
    finally:
        tracking.logger.removeHandler(handler)
        tracking.logger.setLevel(before)


def summary(result: SweepResult) -> str:
    """What `sdan tune` prints at the end: the table of trials, and how to use the best one."""
    best = " ".join(f"--set {key}={value}" for key, value in result.best_overrides.items())
    lines = [table(result.trials, metric=SELECT_BY), "", f"best: {result.best_score:.3f} with {best}"]
    return "\n".join([*lines, f"pictures and table: {result.folder} (MLflow run {result.parent_run_id})"])
