"""`sdan tune`: runs the sweep of tuning/ over the real trainer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from pipelines import cluster, registry
from pipelines import config as configs
from pipelines.config import ExperimentConfig
from pipelines.loader import check_fit, index_split, with_curve_of
from pipelines.sweeping.resources import check_request, command, crops_per_s, full_length, plan_trials, training_s
from pipelines.sweeping.state import SWEEPS
from pipelines.sweeping.trainer import COST, TrialTrainer, register_winner
from pipelines.training.progress import SELECT_BY
from preprocessing.storage import held
from sdan.losses import VGG_WEIGHTS
from sdan.perceptual.features import load_features
from sdan.perceptual.st_lpips import load_st_lpips
from tuning import named_spaces, tracking
from tuning.folder import CROPS, PAGE, RECORD
from tuning.plan import MOST_AT_ONCE, SweepPlan
from tuning.search import SLOT
from tuning.space import Constraint, Space, SweepError, check_space, load_space
from tuning.summary import table
from tuning.sweep import SweepOptions, SweepResult, check_search, check_sweep, run_sweep


@dataclass(frozen=True)
class Options:
    """The options of `sdan tune` beyond those of `sdan train`."""

    trials: int = 8
    space: str = named_spaces.DEFAULT
    """A name of named_spaces.SPACES, or a Python file that defines SPACE and, optionally, CONSTRAINT."""
    search: str = "tpe"
    metrics: tuple[str, ...] = (SELECT_BY,)
    """The first decides; with more the Pareto front is shown. NAME:min or NAME:max sets the direction."""
    grace: int = 1
    """Epochs before ASHA stops a trial."""
    repeats: int = 1
    time_budget_s: float | None = None
    concurrent: int | None = None
    workers: int | None = None
    """Train workers of a trial; None: one per GPU of the trial, or one."""
    gpus_per_trial: float | None = None

    @property
    def objectives(self) -> list[tuple[str, str]]:
        """(metric, min or max) of each."""
        return [_objective(metric) for metric in self.metrics]


def tune(
    shards: str,
    config: ExperimentConfig,
    options: Options,
    *,
    data: Path,
    vgg_weights: Path | None = None,
    name: str = "sweep",
    resume: bool = False,
) -> SweepResult:
    """Sweep a space over the real trainer, starting from `config`.

    Args:
        vgg_weights: as for `train`, in every trial.
        name: the sweep's name; `resume` continues the sweep of that name.

    Raises:
        SweepError, ConfigError, ShardsError, PerceptualError, ClusterError: before any trial starts.
    """
    check_request(options.workers, options.gpus_per_trial)
    check_sweep(name, data / SWEEPS, num_trials=options.trials, resume=resume)
    searched, constraint = _space(options.space, config)
    if "://" not in shards:
        shards = str(Path(shards).resolve())
    sweep = _sweep_options(shards, config, options, searched, constraint)
    searched, trials = check_search(searched, sweep, options.trials)
    vgg_weights = vgg_weights and vgg_weights.resolve()
    pairs = _check_data(shards, config, searched, vgg_weights)
    uri = registry.default_tracking_uri(data)
    registry.prepare_database(uri)
    with _own_folder(data / SWEEPS / name), _trial_lines():
        cluster.start_ray(resources={SLOT: float(MOST_AT_ONCE)})
        plan, at_once = _plan(config, options, trials, data, pairs)
        crops = (data / SWEEPS / name / CROPS).resolve()
        trainer = TrialTrainer(
            shards, config, data.resolve(), plan, name, vgg_weights, crops, COST in dict(options.objectives)
        )
        return run_sweep(
            trainer,
            searched,
            name=name,
            storage_path=data / SWEEPS,
            tracking_uri=uri,
            experiment_id=registry.open_experiment(uri, "sdan-sweeps"),
            num_trials=options.trials,
            max_epochs=config.train.epochs,
            metric=options.objectives[0][0],
            mode=options.objectives[0][1],
            max_concurrent=at_once,
            seed=config.train.seed,
            resume=resume,
            parent_tags={"config": config.name, "shards": shards},
            grace_epochs=options.grace,
            options=sweep,
        )


def _sweep_options(
    shards: str, config: ExperimentConfig, options: Options, searched: Space, constraint: Constraint
) -> SweepOptions:
    return SweepOptions(
        method=options.search,
        also=dict(options.objectives[1:]),
        constraint=constraint,
        default={key: value for key, value in configs.flatten(config).items() if key in searched},
        repeats=options.repeats,
        time_budget_s=options.time_budget_s,
        command=partial(command, shards, config),
    )


def _space(space: str, config: ExperimentConfig) -> tuple[Space, Constraint]:
    """The space by its name or file, and what cannot be built: settings that `config` refuses, and the file's own."""
    own: Constraint | None = None
    if space in named_spaces.SPACES:
        searched: Space = check_space(named_spaces.SPACES[space]())
    elif not space.endswith(".py") and not Path(space).exists():
        names = ", ".join(named_spaces.SPACES)
        raise SweepError(f"--space: expected one of {names}, or a file FILE.py, got {space!r}")
    else:
        searched, own = load_space(space)
    unknown = sorted(key for key in searched if "." not in key or key not in configs.flatten(config))
    if unknown:
        configs.override(config, {unknown[0]: ""})  # raises an error that names the nearest known key

    def constraint(values: dict[str, Any]) -> str | None:
        try:
            configs.override(config, values)
        except ValueError as error:
            return str(error).removeprefix("--set: ")
        return own(values) if own else None

    return searched, constraint


def _objective(text: str) -> tuple[str, str]:
    """'val_psnr' -> ('val_psnr', 'max'); 'train/loss:min' -> ('train/loss', 'min').

    Without a direction, scores are maximised; losses, distances, errors and costs are minimised.
    """
    name, colon, mode = text.partition(":")
    if colon and mode not in ("min", "max"):
        raise SweepError(f"--metric {text}: expected NAME, NAME:min or NAME:max, got {mode!r}")
    if not name:
        raise SweepError(f"--metric: expected a name such as {SELECT_BY}, got {text!r}")
    lower = any(word in name for word in ("loss", "lpips", "epe", COST, "_seconds"))
    return name, mode or ("min" if lower else "max")


def _check_data(shards: str, config: ExperimentConfig, searched: Space, vgg_weights: Path | None) -> int:
    """Check shards and weights before Ray is started; returns the number of training pairs."""
    index = index_split(shards, "train")
    check_fit(index, with_curve_of(index, config))
    index_split(shards, "val")
    if config.loss.needs_vgg or {f"loss.{name}" for name in VGG_WEIGHTS} & set(searched):
        load_features(vgg_weights)  # fail here rather than in each trial
    if config.loss.st_lpips_weight > 0 or "loss.st_lpips_weight" in searched:
        load_st_lpips()
    return len(index.paths)


def _plan(
    config: ExperimentConfig, options: Options, trials: int, data: Path, pairs: int
) -> tuple[cluster.WorkerPlan, int]:
    """Divide the cluster among trials, and print the plan."""
    plan, needs, at_once = plan_trials(
        cluster.node_resources(),
        workers=options.workers,
        gpus_per_trial=options.gpus_per_trial,
        concurrent=options.concurrent,
        num_trials=trials,
        slots=int(ray.cluster_resources().get(SLOT, 0)),
    )
    rate = crops_per_s(data, config, needs.workers)
    shown = SweepPlan(
        trials,
        at_once,
        needs,
        options.repeats,
        training_s(config, pairs=pairs, rate=rate),
        training_s(full_length(config), pairs=pairs, rate=rate),
        options.time_budget_s,
    )
    for line in str(shown).splitlines():
        print(f"tune: {line}", file=sys.stderr, flush=True)
    return plan, at_once


def kept(data: Path, name: str) -> str:
    """What an interrupted `sdan tune` says: what is kept, and how to go on."""
    if not (data / SWEEPS / name / RECORD).is_file():
        return "no trial was started; run the command again"
    return f"sweep {name} keeps its finished trials and the checkpoints of the others; add --resume to go on"


@contextmanager
def _own_folder(folder: Path) -> Iterator[None]:
    """Keep the sweep's folder from other commands."""
    with held(folder) as ours:
        if not ours:
            raise SweepError(
                f"--name {folder.name}: expected a sweep that no other command works on, got one that runs; "
                "wait until that ends, or choose another name"
            )
        yield


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
    """What `sdan tune` prints at the end: the finding, the table of trials, and how to use the chosen one."""
    best = " ".join(f"--set {key}={value}" for key, value in result.best_overrides.items())
    metric = result.metric
    lines = [str(result.verdict), "", table(result.trials, metric=metric), ""]
    lines.append(f"best: {result.best_score:.3f} with {best}")
    if result.command:
        lines.append(f"train the chosen setting at full length: {result.command}")
    if result.ended:
        lines.append(result.ended)
    return "\n".join([*lines, f"page: {result.folder / PAGE} (MLflow run {result.parent_run_id})"])


def register(result: SweepResult, data: Path, name: str) -> str:
    """Register the chosen trial's model as challenger; one line that says so."""
    version = register_winner(data, name, result.chosen.trial_id, result.chosen.run_id)
    return f"registry: {registry.MODEL}, version {version}, as challenger; sdan promote {version} makes it champion"
