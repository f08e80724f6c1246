"""The search by Ray Tune: Optuna proposes values and ASHA stops weak trials early.

A trial holds one unit of the resource `trial_slot` and no CPU, so that the Ray Train run that it starts gets the CPUs.
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
"""The Ray resource that limits how many trials run at once."""
REDUCTION_FACTOR = 3
"""ASHA: after grace, 3 grace, 9 grace, ... epochs only the best third of the trials continues."""


@dataclass(frozen=True)
class SearchPlan:
    """The size of the search."""

    num_trials: int
    grace_epochs: int
    """ASHA stops no trial before this epoch."""
    seed: int
    max_concurrent: int


def require_slots() -> None:
    """Raise SweepError unless Ray runs and offers the resource SLOT, without which trials would wait forever.

    Ray's dashboard must be on (the default): without it later trials hang (Ray 2.60).
    """
    if not ray.is_initialized():
        got = "no running Ray"
    elif ray.cluster_resources().get(SLOT, 0) < 1:
        got = "a Ray without it"
    else:
        return
    raise SweepError(
        f"sweep: expected a running Ray with the resource {SLOT!r}, got {got}; start Ray with that resource"
    )


def search(
    trial: Callable[[dict[str, Value]], None], space: Space, run: SweepRun, plan: SearchPlan, folder: Path
) -> None:
    """Run all trials, or the remaining ones if `folder` holds an interrupted search. Needs `require_slots`."""
    with _tune_settings(), _quiet():
        slotted = tune.with_resources(trial, {SLOT: 1})
        if tune.Tuner.can_restore(str(folder)):
            tuner = tune.Tuner.restore(str(folder), slotted, resume_unfinished=True, restart_errored=True)
        else:
            tuner = _new_tuner(slotted, space, run, plan, folder)
        tuner.fit()


def _new_tuner(trial: Any, space: Space, run: SweepRun, plan: SearchPlan, folder: Path) -> tune.Tuner:
    optuna_space = {name: _optuna(distribution) for name, distribution in space.items()}
    asha = ASHAScheduler(
        time_attr="epoch",  # training_iteration restarts after a restore
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
    """TPE with random values for the first third of the trials; its default of ten could be all of a small sweep."""
    random_trials = min(10, max(3, plan.num_trials // 3))
    return samplers.TPESampler(n_startup_trials=random_trials, seed=plan.seed, constant_liar=plan.max_concurrent > 1)


def _optuna(distribution: Distribution) -> distributions.BaseDistribution:
    if isinstance(distribution, Choice):
        return distributions.CategoricalDistribution(distribution.values)
    if isinstance(distribution, Uniform):
        return distributions.FloatDistribution(distribution.low, distribution.high, log=distribution.log)
    return distributions.IntDistribution(distribution.low, distribution.high, log=distribution.log)


@contextmanager
def _tune_settings() -> Iterator[None]:
    """Settings that Tune reads only from the environment.

    Tune saves its state every second (default: 10 seconds or more), because a kill loses everything since the last
    save. Its progress tables are off, and so is its handler of Ctrl-C, which would hide the interrupt from the caller.
    """
    settings = {
        "TUNE_GLOBAL_CHECKPOINT_S": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }
    missing = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for key in missing:
            del os.environ[key]


@contextmanager
def _quiet() -> Iterator[None]:
    """Do not print the traceback of a failed trial: the table has its reason, and error.txt has the traceback."""
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
