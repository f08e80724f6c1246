"""What each trial of a sweep gets of the cluster, and how long a trial takes by the rate of an earlier run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines import cluster
from pipelines import config as configs
from pipelines.config import ExperimentConfig
from pipelines.training import run_folder
from tuning.plan import MOST_AT_ONCE, TrialNeeds, trials_at_once
from tuning.space import SweepError

_RATE_DEPENDS_ON = ("train.crop_px", "train.batch_per_worker", "train.precision", "train.deterministic")
"""Values besides model.* that change the crops per second."""


def check_request(workers: int | None, gpus_per_trial: float | None) -> None:
    """Check, before Ray is started, what the user asks for a trial.

    Raises:
        ClusterError, SweepError: numbers out of range, or GPUs that the workers cannot share.
    """
    cluster.check_workers(workers)
    if gpus_per_trial is None or gpus_per_trial == 0:
        return
    if not 0 < gpus_per_trial < math.inf or (gpus_per_trial > 1 and gpus_per_trial != int(gpus_per_trial)):
        raise SweepError(f"--gpus-per-trial: expected a share of a GPU, or 1, 2, 3, ..., got {gpus_per_trial:g}")
    if workers is not None and gpus_per_trial > workers:
        raise SweepError(
            f"--gpus-per-trial {gpus_per_trial:g}: expected at most one GPU per worker, got {workers} workers a trial; "
            f"use --workers-per-trial {gpus_per_trial:g}"
        )


def plan_trials(
    nodes: Sequence[Mapping[str, float]],
    *,
    workers: int | None,
    gpus_per_trial: float | None,
    concurrent: int | None,
    num_trials: int,
    slots: int = MOST_AT_ONCE,
) -> tuple[cluster.WorkerPlan, TrialNeeds, int]:
    """Divide the cluster among trials.

    Args:
        nodes: resources of each node (cluster.node_resources).
        workers: train workers of a trial; None: one per GPU of the trial, or one.
        gpus_per_trial: None: one if there are GPUs, shared by `workers`; 0: train on CPUs.
        concurrent: trials at once; None: as many as there is room for, or one without GPUs.
        slots: the head's processes for trials (the resource trial_slot).

    Returns:
        the workers of each trial, what a trial needs, and how many trials run at once.

    Raises:
        SweepError: the cluster has no room for that.
    """
    check_request(workers, gpus_per_trial)
    if concurrent is not None and slots < concurrent <= MOST_AT_ONCE:
        raise SweepError(
            f"--concurrent {concurrent}: expected as many of the resource trial_slot, got {slots}; use --concurrent "
            f"{slots}, or start Ray's head with more"
        )
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    gpus_each = float(workers or 1) if gpus_per_trial is None else gpus_per_trial
    if gpus_per_trial is None and gpus < 1:
        gpus_each = 0.0
    count = workers or max(1, math.ceil(gpus_each))
    plans: list[tuple[int, float, TrialNeeds]] = []
    for worker_cpus in (1.0, 0.5):  # as cluster.plan_workers: half a CPU each where whole ones do not suffice
        needs = TrialNeeds(count, worker_cpus + cluster.READER_CPUS, gpus_each / count)
        try:
            at_once = trials_at_once(nodes, needs, concurrent=concurrent, num_trials=min(num_trials, slots))
        except SweepError:
            if worker_cpus == 0.5 and not plans:
                raise
            continue
        plans.append((at_once, worker_cpus, needs))
    at_once, worker_cpus, needs = max(plans, key=lambda each: each[:2])
    ranks = at_once * count
    plan = cluster.WorkerPlan(
        workers=count,
        use_gpu=gpus_each > 0,
        cpus_per_worker=worker_cpus,
        threads=max(1, int(cpus / ranks)),
        readers=max(1, int((cpus - ranks * worker_cpus) / ranks)),
        gpus_per_worker=needs.gpus or 1.0,
    )
    return plan, needs, at_once


def crops_per_s(data: Path, config: ExperimentConfig, workers: int) -> float | None:
    """The rate of the newest run in DATA with the same network, crops and number of workers; None: there is none."""
    for folder in run_folder.all_runs(data):
        try:
            stored = run_folder.read_run(folder)
            before = configs.from_dict(stored.config)
        except (run_folder.RunFolderError, configs.ConfigError, OSError):
            continue  # sdan status shows damaged runs
        rate = run_folder.last_report(folder).get("crops_per_s")
        if rate and stored.workers == workers and _rate_values(before) == _rate_values(config):
            return float(rate)
    return None


def _rate_values(config: ExperimentConfig) -> dict[str, object]:
    flat = configs.flatten(config)
    return {name: flat[name] for name in flat if name.startswith("model.") or name in _RATE_DEPENDS_ON}


def training_s(config: ExperimentConfig, *, pairs: int, rate: float | None) -> float | None:
    """Seconds of a training with `config` at `rate` crops per second, validations not counted; None: rate unknown."""
    return config.train.epochs * (config.train.crops_per_epoch or pairs) / rate if rate else None


def full_length(config: ExperimentConfig) -> ExperimentConfig:
    """`config` with the epochs of the named config that it was made from."""
    epochs = configs.named(config.name).train.epochs if config.name in configs.CONFIGS else config.train.epochs
    return configs.override(config, {"train.epochs": max(epochs, config.train.epochs)})


def command(shards: str, config: ExperimentConfig, overrides: Mapping[str, object]) -> str:
    """The command that trains `config` with a trial's `overrides` at full length."""
    base = configs.flatten(configs.named(config.name) if config.name in configs.CONFIGS else config)
    wanted = configs.flatten(configs.override(full_length(config), overrides))
    changes = " ".join(f"--set {name}={_text(wanted[name])}" for name in wanted if wanted[name] != base[name])
    return " ".join(f"sdan train {shards} --config {config.name} {changes}".split())


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    return str(value)
