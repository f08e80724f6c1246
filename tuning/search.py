"""The search itself, by Ray Tune: Optuna proposes, ASHA stops early, trials hold a slot instead of a CPU.

A trial holds one unit of the resource `trial_slot` and no CPU, so that what it starts (a Ray Train run) gets the CPUs.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from optuna import distributions, samplers
from optuna import logging as optuna_logging
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from tuning.space import Choice, Distribution, Space, SweepError, Uniform, Value
from tuning.tracking import EndOfTrial, SweepRun

SLOT = "trial_slot"
REDUCTION_FACTOR = 3
"""ASHA: at epochs grace, 3 grace, 9 grace, ... the best third goes on."""


@dataclass(frozen=True)
class SearchPlan:
    """How many trials, how patiently, in what order, how many at once."""

    num_trials: int
    grace_epochs: int
    seed: int
    max_concurrent: int


def search(
    trial: Callable[[dict[str, Value]], None], space: Space, run: SweepRun, plan: SearchPlan, folder: Path
) -> None:
    """Runs all trials, or those that are left where `folder` holds a search that was cut off.

    Ray is started with trial slots when it is not running; a running Ray must offer them (SweepError).
    """
    with _ray_with_slots(plan.max_concurrent), _tune_settings(), _quiet():
        slotted = tune.with_resources(trial, {SLOT: 1})
        if tune.Tuner.can_restore(str(folder)):
            tuner = tune.Tuner.restore(str(folder), slotted, resume_unfinished=True, restart_errored=True)
        else:
            tuner = _new_tuner(slotted, space, run, plan, folder)
        tuner.fit()


def _new_tuner(trial: Any, space: Space, run: SweepRun, plan: SearchPlan, folder: Path) -> tune.Tuner:
    optuna_space = {name: _optuna(distribution) for name, distribution in space.items()}
    asha = ASHAScheduler(
        time_attr="epoch",  # training_iteration starts again after a restore
        max_t=run.max_epochs,
        grace_period=plan.grace_epochs,
        reduction_factor=REDUCTION_FACTOR,
    )
    return tune.Tuner(
        trial,
        tune_config=tune.TuneConfig(
            metric=run.metric,
            mode=run.mode,
            num_samples=plan.num_trials,
            max_concurrent_trials=plan.max_concurrent,
            search_alg=OptunaSearch(optuna_space, metric=run.metric, mode=run.mode, sampler=_sampler(plan)),
            scheduler=asha,
        ),
        run_config=tune.RunConfig(
            name=folder.name, storage_path=str(folder.parent), callbacks=[EndOfTrial(run)], verbose=0
        ),
    )


def _sampler(plan: SearchPlan) -> samplers.TPESampler:
    """TPE that begins to learn after a third of the trials: its default of ten random ones is all of a small sweep."""
    random_trials = min(10, max(3, plan.num_trials // 3))
    return samplers.TPESampler(n_startup_trials=random_trials, seed=plan.seed, constant_liar=plan.max_concurrent > 1)


def _optuna(distribution: Distribution) -> distributions.BaseDistribution:
    if isinstance(distribution, Choice):
        return distributions.CategoricalDistribution(distribution.values)
    if isinstance(distribution, Uniform):
        return distributions.FloatDistribution(distribution.low, distribution.high, log=distribution.log)
    return distributions.IntDistribution(distribution.low, distribution.high, log=distribution.log)


@contextmanager
def _ray_with_slots(max_concurrent: int) -> Iterator[None]:
    """Ray with trial slots: the one that runs, the cluster of RAY_ADDRESS, or a local one for the sweep's time."""
    started = not ray.is_initialized()
    if started and os.environ.get("RAY_ADDRESS"):
        ray.init()
    elif started:
        # The dashboard stays on: without it later trials hang (Ray 2.60).
        ray.init(
            address="local",
            resources={SLOT: max_concurrent},
            include_dashboard=True,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    try:
        slots = ray.cluster_resources().get(SLOT, 0)
        if slots < 1:
            raise SweepError(
                f"Ray runs without the resource {SLOT!r}, so trials could never start; "
                f"start it with resources={{'{SLOT}': {max_concurrent}}} or let the sweep start Ray"
            )
        yield
    finally:
        if started:
            ray.shutdown()


@contextmanager
def _tune_settings() -> Iterator[None]:
    """What Tune takes from the environment only.

    A kill loses what Tune has not yet snapshot, by default up to the last 10 seconds or more; and its boxes and tables
    are not ours.
    """
    settings = {"TUNE_GLOBAL_CHECKPOINT_S": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    missing = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for key in missing:
            del os.environ[key]


@contextmanager
def _quiet() -> Iterator[None]:
    """Tune prints a failed trial's whole traceback; its reason stands in the table and its traceback in error.txt."""
    optuna_level = optuna_logging.get_verbosity()
    optuna_logging.set_verbosity(optuna_logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("ray.tune.execution.tune_controller", "ray.tune.tune")]
    before = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)
        optuna_logging.set_verbosity(optuna_level)
