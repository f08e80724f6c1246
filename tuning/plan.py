"""The plan of a sweep: how many trials run at once, with what each, and how long that takes.

Nothing here starts Ray: the nodes' resources are arguments.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tuning.space import SweepError

MOST_AT_ONCE = 64
"""Largest number of trials at once. Each has a process of its own on the head, which uses no CPU."""
REPEATED = 3
"""How many of the best trials --repeats trains again with other seeds, besides the default setting."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_ROUNDING = 1e-6


@dataclass(frozen=True)
class TrialNeeds:
    """What one trial takes while it runs."""

    workers: int
    cpus: float
    """CPUs per worker, its readers included."""
    gpus: float
    """GPUs per worker, between 0 and 1."""

    def __str__(self) -> str:
        kinds = [f"{self.workers * self.cpus:g} CPUs"]
        if self.gpus:
            total = self.workers * self.gpus
            kinds.insert(0, f"{total:g} GPU{'s' if total > 1 else ''}")
        return f"{' and '.join(kinds)} in {self.workers} worker{'s' if self.workers > 1 else ''}"


@dataclass(frozen=True)
class SweepPlan:
    """What is printed before a sweep starts."""

    num_trials: int
    at_once: int
    needs: TrialNeeds
    repeats: int = 1
    trial_s: float | None = None
    """Seconds of one whole trial; None: unknown until the first one ends."""
    winner_s: float | None = None
    """Seconds that the winner's training at full length takes; None: unknown."""
    time_budget_s: float | None = None

    @property
    def longest_s(self) -> float | None:
        """Seconds of the whole sweep if no trial is stopped early; None: unknown."""
        if self.trial_s is None:
            return None
        again = rounds(repeated_trials(self.repeats), self.at_once)
        return self.trial_s * (rounds(self.num_trials, self.at_once) + again)

    def __str__(self) -> str:
        at_once = f"{self.at_once} at once" if self.at_once > 1 else "one after the other"
        lines = [f"plan: {self.num_trials} trials, {at_once}, each with {self.needs}"]
        if self.repeats > 1:
            more = f"{self.repeats - 1} more seed{'s' if self.repeats > 2 else ''}"
            lines.append(f"then the best three and the default setting again, with {more} each")
        if self.longest_s is None or self.trial_s is None:
            lines.append("time: not known before the first trial has ended; each later line says what is left")
        else:
            lines.append(
                f"time: at most {duration(self.longest_s)} ({duration(self.trial_s)} a trial, by the rate of an "
                "earlier run; trials that are stopped early take less)"
            )
        if self.winner_s is not None:
            lines.append(f"training the winner at full length takes about {duration(self.winner_s)}")
        if self.time_budget_s is not None:
            lines.append(f"time budget: {duration(self.time_budget_s)}")
        return "\n".join(lines)


def repeated_trials(repeats: int) -> int:
    """How many trainings --repeats adds: REPEATED trials and the default setting, with each further seed."""
    return (REPEATED + 1) * (repeats - 1)


def rounds(trials: int, at_once: int) -> int:
    """How often `at_once` trials must be started for `trials` of them."""
    return -(-trials // at_once)


def trials_that_fit(nodes: Sequence[Mapping[str, float]], needs: TrialNeeds) -> int:
    """How many trials the nodes hold at once. A worker lies on one node; a trial's workers may lie on several."""
    workers = 0
    for node in nodes:
        room = [node.get("CPU", 0.0) / needs.cpus] if needs.cpus else []
        room += [node.get("GPU", 0.0) / needs.gpus] if needs.gpus else []
        # GPUs are shared by whole workers: of two GPUs, workers of 0.6 take one each.
        if 0 < needs.gpus < 1:
            room[-1] = int(node.get("GPU", 0.0)) * int(1 / needs.gpus + _ROUNDING)
        workers += int(min(room, default=0) + _ROUNDING)
    return workers // needs.workers


def trials_at_once(
    nodes: Sequence[Mapping[str, float]], needs: TrialNeeds, *, concurrent: int | None, num_trials: int
) -> int:
    """How many trials to run at once: as many as have a GPU; without GPUs one; `concurrent` sets another number.

    Args:
        nodes: resources of each node, e.g. [{"CPU": 16.0, "GPU": 8.0}].
        concurrent: the number that the user wants; None: see above.

    Raises:
        SweepError: not even one trial fits, or fewer than `concurrent`.
    """
    if concurrent is not None and not 1 <= concurrent <= MOST_AT_ONCE:
        raise SweepError(f"--concurrent: expected 1 to {MOST_AT_ONCE}, got {concurrent}")
    fits = trials_that_fit(nodes, needs)
    have = ", ".join(f"{sum(node.get(kind, 0.0) for node in nodes):g} {kind}s" for kind in ("CPU", "GPU"))
    if fits < 1:
        raise SweepError(
            f"sweep: expected room for one trial ({needs}), got {have} on {len(nodes)} node"
            f"{'s' if len(nodes) != 1 else ''}; use a smaller --gpus-per-trial or --workers-per-trial"
        )
    if concurrent is None:
        return max(1, min(num_trials, fits if needs.gpus else 1, MOST_AT_ONCE))
    if concurrent > fits:
        raise SweepError(
            f"--concurrent {concurrent}: expected room for as many trials ({needs} each), got {have}; "
            f"use --concurrent {fits}"
        )
    return min(concurrent, num_trials)


def parse_duration(text: str) -> float:
    """'90s', '30m', '2h', '1h30m', '1.5h' -> seconds.

    Raises:
        SweepError: another text, or no time at all.
    """
    found = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    seconds = sum(float(number) * _UNITS[unit] for number, unit in found)
    if "".join(number + unit for number, unit in found) != text.strip() or not 0 < seconds <= 1e8:
        raise SweepError(f"--time-budget: expected a time such as 30m, 2h or 1h30m, got {text!r}")
    return seconds


def duration(seconds: float) -> str:
    """42 -> '42 s', 600 -> '10 min', 7200 -> '2.0 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
