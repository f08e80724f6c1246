"""The search by Ray Tune: Optuna proposes values and ASHA stops weak trials early.

A trial holds one unit of the resource `trial_slot` and no CPU, so that the Ray Train run that it starts gets the CPUs.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

import ray
from optuna import distributions, samplers
from optuna import logging as optuna_logging
from optuna.trial import TrialState
from ray import tune
from ray.tune import tune as tune_run
from ray.tune.execution.tune_controller import TuneController
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher, SearchGenerator
from ray.tune.search.optuna import OptunaSearch

from tuning.folder import REFUSED, Refused, read_limits, setting_key, write_json
from tuning.space import Choice, Constraint, Distribution, Space, SweepError, Uniform, Value, combinations
from tuning.tracking import NOTHING_LEFT, REPEAT, EndOfTrial, SweepRun, TimeIsUpError, repeat_config

SLOT = "trial_slot"
"""The Ray resource that limits how many trials run at once."""
REDUCTION_FACTOR = 3
"""ASHA: after grace, 3 grace, 9 grace, ... epochs only the best third of the trials continues."""


METHODS = ("tpe", "random", "grid")
MOST_IN_A_ROW = 200
"""The search ends after this many proposals in a row that cannot be built or were tried before."""


@dataclass(frozen=True)
class SearchPlan:
    """The size of the search."""

    num_trials: int
    grace_epochs: int
    """ASHA stops no trial before this epoch."""
    seed: int
    max_concurrent: int
    method: str = "tpe"
    """tpe, random or grid."""
    default: Mapping[str, Value] | None = None
    """The setting of the first trial; None: proposed like the others."""


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
    trial: Callable[[dict[str, Any]], None],
    space: Space,
    run: SweepRun,
    plan: SearchPlan,
    folder: Path,
    constraint: Constraint | None = None,
) -> bool:
    """Run all trials, or the remaining ones if `folder` holds an interrupted search. Needs `require_slots`.

    Returns:
        False if the time budget was spent first; the unfinished trials can be resumed.
    """
    with _tune_settings(), _quiet():
        slotted = tune.with_resources(trial, {SLOT: 1})
        if tune.Tuner.can_restore(str(folder)):
            tuner = tune.Tuner.restore(str(folder), slotted, resume_unfinished=True, restart_errored=True)
        else:
            tuner = _new_tuner(slotted, space, run, plan, folder, constraint)
        return _fit(tuner)


def repeat(
    trial: Callable[[dict[str, Any]], None],
    missing: Sequence[tuple[str, int, Mapping[str, Value]]],
    run: SweepRun,
    max_concurrent: int,
    folder: Path,
) -> bool:
    """Train settings again with other seeds.

    Args:
        missing: (trial_id in the search, number of the repeat from 1, overrides) of each.

    Returns:
        False if the time budget was spent first.
    """
    if not missing:
        return True
    with _tune_settings(), _quiet():
        tuner = tune.Tuner(
            tune.with_resources(trial, {SLOT: 1}),
            param_space={REPEAT: tune.grid_search([repeat_config(*each) for each in missing])},
            tune_config=tune.TuneConfig(max_concurrent_trials=max_concurrent, reuse_actors=True),
            run_config=tune.RunConfig(
                name=f"repeats-{int(time.time())}",  # what is missing is known from MLflow, so nothing is restored
                storage_path=str(folder),
                callbacks=[EndOfTrial(run, folder)],
                verbose=0,
            ),
        )
        return _fit(tuner)


def _fit(tuner: tune.Tuner) -> bool:
    try:
        tuner.fit()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # Tune wraps what its callbacks raise
            if isinstance(cause, TimeIsUpError):
                return False
            cause = cause.__cause__
        raise
    return True


def _new_tuner(
    trial: Any, space: Space, run: SweepRun, plan: SearchPlan, folder: Path, constraint: Constraint | None
) -> tune.Tuner:
    asha = ASHAScheduler(
        time_attr="epoch",  # training_iteration restarts after a restore
        metric=run.metric,
        mode=run.mode,
        max_t=run.max_epochs,
        grace_period=plan.grace_epochs,
        reduction_factor=REDUCTION_FACTOR,
    )
    return tune.Tuner(
        trial,
        tune_config=tune.TuneConfig(
            num_samples=1,  # Trials decides
            search_alg=Trials(Proposals(space, run, plan, folder, constraint), folder),
            scheduler=asha,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=folder.name, storage_path=str(folder.parent), callbacks=[EndOfTrial(run, folder)], verbose=0
        ),
    )


class _Controller(TuneController):
    """Ray Tune's loop, which keeps the processes of trials for the next ones if their train functions have returned.

    In the process of a trial that ASHA has stopped the training goes on until the process ends.
    """

    def _maybe_cache_trial_actor(self, trial: Any) -> bool:
        return NOTHING_LEFT in trial.last_result and bool(super()._maybe_cache_trial_actor(trial))


class Trials(SearchGenerator):
    """Starts as many trials as limits.json says, and as many of them at once. A resume may change both, which Tune's
    own num_samples and max_concurrent_trials do not allow."""

    def __init__(self, proposals: "Proposals", folder: Path) -> None:
        super().__init__(proposals)
        self.folder = folder

    def next_trial(self) -> Any:
        """The next trial; None if enough run, or all have been started."""
        proposals = cast("Proposals", self.searcher)
        if self.is_finished() or proposals.running >= read_limits(self.folder).at_once:
            return None
        trial = self.create_trial_if_possible(cast("Any", self._experiment).spec)
        self._finished = False  # Tune would keep it over a resume; the searcher knows better
        return trial

    def is_finished(self) -> bool:
        """Whether no further trial will be started."""
        proposals = cast("Proposals", self.searcher)
        return self._counter >= read_limits(self.folder).num_trials or proposals.exhausted


class Proposals(OptunaSearch):
    """Optuna's proposals without those that cannot be built or, in a finite space, were tried before. They are written
    to refused.json with their reasons."""

    def __init__(
        self, space: Space, run: SweepRun, plan: SearchPlan, folder: Path, constraint: Constraint | None
    ) -> None:
        self.folder, self.constraint = folder, constraint
        self.tried: set[str] = set()
        self.refused: dict[str, str] = {}
        self.exhausted = False
        self.combinations = combinations(space)
        self.random = Random(plan.seed)
        points: list[dict[str, Value]] = [dict(plan.default)] if plan.default else []
        if plan.method == "grid":
            points += [point for point in self.combinations or [] if point != plan.default]
        several = len(run.objectives) > 1
        super().__init__(
            optuna_space(space),
            metric=list(run.objectives) if several else run.metric,
            mode=list(run.objectives.values()) if several else run.mode,
            points_to_evaluate=points,
            sampler=_sampler(plan),
        )
        self.points_left = len(points)
        self.grid = plan.method == "grid"

    @property
    def running(self) -> int:
        """Trials that were proposed and have not ended."""
        return len(self._ot_trials) - len(self._completed_trials)

    def suggest(self, trial_id: str) -> Any:
        """The values of the next trial, as a dict; FINISHED if there are no more."""
        study: Any = self._ot_study
        for _ in range(MOST_IN_A_ROW):
            if self.grid and not self.points_left:
                break
            values: dict[str, Any] = super().suggest(trial_id) or {}
            self.points_left = max(0, self.points_left - 1)
            key = setting_key(values)
            reason = self.refused.get(key) or (self.constraint(values) if self.constraint else None)
            if reason is None and not (self.combinations is not None and key in self.tried):
                self.tried.add(key)
                return dict(values)
            # TPE counts a pruned trial as worse than all others, and so learns to avoid its values; not a failed one.
            state = TrialState.FAIL if reason is None else TrialState.PRUNED
            study.tell(self._ot_trials.pop(trial_id), state=state)
            if reason is not None:
                self.refused[key] = reason
            elif not self._try_another():
                break
        else:
            logging.getLogger(__name__).info("the search ends: %d proposals in a row were no use", MOST_IN_A_ROW)
        self.exhausted = True
        self.note()
        return Searcher.FINISHED

    def _try_another(self) -> bool:
        """Make Optuna propose a setting of a finite space that was not tried yet; False if there is none."""
        known = self.tried | self.refused.keys()
        left = [point for point in self.combinations or [] if setting_key(point) not in known]
        if left:
            cast("Any", self._ot_study).enqueue_trial(self.random.choice(left))
        return bool(left)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how a trial ended, and write what was refused since."""
        super().on_trial_complete(trial_id, result, error)
        self.note()

    def save(self, checkpoint_path: str) -> None:
        """Write the state, as the base class does, without the constraint: a function of the user's file, which plain
        pickle cannot write. A restored sweep has it from Tune's own state."""
        constraint, self.constraint = self.constraint, None
        try:
            super().save(checkpoint_path)
        finally:
            self.constraint = constraint

    def restore(self, checkpoint_path: str) -> None:
        """Read what `save` wrote."""
        constraint = self.constraint
        super().restore(checkpoint_path)
        self.constraint = constraint

    def note(self) -> None:
        """Write refused.json."""
        if self.refused or self.exhausted:
            write_json(self.folder / REFUSED, Refused(self.refused, self.exhausted))


def _sampler(plan: SearchPlan) -> samplers.BaseSampler:
    """TPE with random values for the first third of the trials; its default of ten could be all of a small sweep."""
    if plan.method != "tpe":
        return samplers.RandomSampler(seed=plan.seed)
    random_trials = min(10, max(3, plan.num_trials // 3))
    return samplers.TPESampler(n_startup_trials=random_trials, seed=plan.seed, constant_liar=plan.max_concurrent > 1)


def optuna_space(space: Space) -> dict[str, distributions.BaseDistribution]:
    """The space in Optuna's classes."""
    return {name: _optuna(distribution) for name, distribution in space.items()}


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
    It writes no files of results, which MLflow has: at the end it would read all of them. Its loop is _Controller.
    """
    settings = {
        "TUNE_GLOBAL_CHECKPOINT_S": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # further objectives may come with the last report only
    }
    missing = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(missing)
    module = cast("Any", tune_run)
    loop, module.TuneController = module.TuneController, _Controller
    try:
        yield
    finally:
        module.TuneController = loop
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
