"""How much each parameter matters for the score, and which trials are on the Pareto front."""

from collections.abc import Mapping, Sequence

import numpy as np
import optuna
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import TrialState, create_trial

from tuning.tracking import TrialRow

LEAST_TRIALS = 6
"""With fewer scored trials nothing is said."""
MOST_TRIALS = 200
"""Of more trials, as many are used, evenly spaced from the best to the worst: the forest's time grows with them."""


def importance(
    trials: Sequence[TrialRow],
    distributions: Mapping[str, optuna.distributions.BaseDistribution],
    *,
    mode: str,
) -> dict[str, float]:
    """Share of each parameter in the variance of the score, by fANOVA (Hutter et al. 2014): a random forest predicts
    the score, and its variance is divided among the parameters.

    The forest is scikit-learn's, which MLflow requires. PED-ANOVA, which needs no forest, named the wrong one of two
    parameters in sweeps of 12 trials.

    Returns:
        shares that add up to 1, the largest first; {} for fewer than LEAST_TRIALS scored trials.
    """
    scored = [row for row in trials if row.score is not None and not row.repeat and row.overrides.keys()]
    if len(scored) < LEAST_TRIALS:
        return {}
    if len(scored) > MOST_TRIALS:
        scored.sort(key=lambda row: row.score or 0.0)
        scored = [scored[int(place)] for place in np.linspace(0, len(scored) - 1, MOST_TRIALS).round()]
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(direction="maximize" if mode == "max" else "minimize")
        for row in scored:
            study.add_trial(
                create_trial(
                    params=dict(row.overrides),
                    distributions=dict(distributions),
                    value=row.score,
                    state=TrialState.COMPLETE,
                )
            )
        found = optuna.importance.get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    except (ValueError, RuntimeError):  # e.g. all scores equal
        return {}
    finally:
        optuna.logging.set_verbosity(level)
    return {name: float(share) for name, share in found.items() if share == share}


def pareto_front(trials: Sequence[TrialRow], objectives: Mapping[str, str]) -> list[TrialRow]:
    """The finished trials that no other beats in every objective, by the first objective, best first.

    Args:
        objectives: metric -> max or min.
    """
    points = [(row, objective_values(row, objectives)) for row in trials if row.status == "finished"]
    whole = [(row, values) for row, values in points if values is not None and not row.repeat]

    def beaten(values: Sequence[float]) -> bool:
        return any(other != values and all(o >= v for o, v in zip(other, values, strict=True)) for _, other in whole)

    front = [(row, values) for row, values in whole if not beaten(values)]
    return [row for row, _ in sorted(front, key=lambda each: each[1], reverse=True)]


def objective_values(row: TrialRow, objectives: Mapping[str, str]) -> list[float] | None:
    """The trial's objectives, signed so that higher is better; None if one is missing. The first is its score."""
    values = []
    for number, (name, mode) in enumerate(objectives.items()):
        value = row.score if number == 0 else row.values.get(name)
        if value is None:
            return None
        values.append(value if mode == "max" else -value)
    return values
