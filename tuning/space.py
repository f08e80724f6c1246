"""The search space: dotted config names -> distributions, for example

    SPACE = {"model.packing_kernel": choice([2, 4, 8]), "loss.align_weight": loguniform(0.1, 10.0)}

The names are those of `sdan train --set NAME=VALUE`. This module does not know which names exist; the train function
checks them.
"""

import itertools
import math
import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

Value = bool | int | float | str
Constraint = Callable[[dict[str, Any]], str | None]
"""The reason why a setting cannot be built; None if it can."""
MOST_COMBINATIONS = 10_000
"""A space of more settings is treated as if it were continuous."""
SAMPLED = 200
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class SweepError(ValueError):
    """A sweep cannot start, resume or give a result; the message is one line that says what to do."""


@dataclass(frozen=True)
class Choice:
    """One of `values`; they are unordered."""

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise SweepError("choice([]): expected at least one value, got none")
        for value in self.values:
            if not isinstance(value, bool | int | float | str):
                raise SweepError(f"choice: expected only bool, int, float or str values, got {value!r}")
        if len({repr(value) for value in self.values}) < len(self.values):
            raise SweepError(f"choice({list(self.values)}): expected each value once, got a duplicate")


@dataclass(frozen=True)
class Uniform:
    """A float in [low, high], uniform or (with `log`) log-uniform."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_range("loguniform" if self.log else "uniform", self.low, self.high, self.log)


@dataclass(frozen=True)
class IntUniform:
    """An integer in [low, high], both included, uniform or (with `log`) log-uniform."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        kind = "logint" if self.log else "integer"
        if not _is_integer(self.low) or not _is_integer(self.high):
            raise SweepError(f"{kind}: expected two integers, got {self.low!r} and {self.high!r}")
        _check_range(kind, self.low, self.high, self.log)


Distribution = Choice | Uniform | IntUniform
Space = Mapping[str, Distribution]


def choice(values: Sequence[Value]) -> Choice:
    """One of `values` (bool, int, float or str)."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise SweepError(f"choice: expected a list of values, got {values!r}; e.g. choice([2, 4, 8])")
    return Choice(tuple(values))


def uniform(low: float, high: float) -> Uniform:
    """A float in [low, high]."""
    return Uniform(low, high)


def loguniform(low: float, high: float) -> Uniform:
    """A float in [low, high], low > 0, log-uniform: for weights and learning rates."""
    return Uniform(low, high, log=True)


def integer(low: int, high: int) -> IntUniform:
    """An integer in [low, high], both included."""
    return IntUniform(low, high)


def logint(low: int, high: int) -> IntUniform:
    """An integer in [low, high], both included, low > 0, log-uniform."""
    return IntUniform(low, high, log=True)


def load_space(path: str | Path) -> tuple[dict[str, Distribution], Constraint | None]:
    """Run the user's Python file and return the SPACE that it defines, and its CONSTRAINT if it has one.

    `CONSTRAINT(values)` returns None, or the reason why a trial with these values is not to be started.

    Raises:
        SweepError: the file is missing, fails to run, or defines no valid SPACE.
    """
    path = Path(path)
    if not path.is_file():
        raise SweepError(f"{path}: expected a Python file that defines SPACE = {{name: distribution}}, got none")
    try:
        # A fixed module name, never __main__, so that the file's `if __name__ == "__main__"` block does not run.
        names = runpy.run_path(str(path), run_name="sdan_sweep_space")
    except SweepError as error:
        raise SweepError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:
        raise SweepError(f"{path}: {_where(error, path)}{type(error).__name__}: {_first_line(error)}") from error
    if "SPACE" not in names:
        raise SweepError(f"{path}: expected SPACE = {{'loss.align_weight': loguniform(0.1, 10.0)}}, got no SPACE")
    constraint = names.get("CONSTRAINT")
    if constraint is not None and not callable(constraint):
        raise SweepError(f"{path}: expected a function CONSTRAINT(values) -> None or a reason, got {constraint!r}")
    try:
        return check_space(names["SPACE"]), constraint and _checked(constraint, path)
    except SweepError as error:
        raise SweepError(f"{path}: {error}") from error


def _checked(constraint: Callable[[dict[str, Any]], Any], path: Path) -> Constraint:
    """The user's CONSTRAINT, with errors in one line."""

    def checked(values: dict[str, Any]) -> str | None:
        try:
            reason = constraint(dict(values))
        except Exception as error:
            raise SweepError(
                f"{path}: CONSTRAINT({values}): {_where(error, path)}{type(error).__name__}: {_first_line(error)}"
            ) from error
        if reason is not None and not isinstance(reason, str):
            raise SweepError(f"{path}: CONSTRAINT({values}): expected None or a reason, got {reason!r}")
        return reason

    return checked


def combinations(space: Space) -> list[dict[str, Value]] | None:
    """Every setting of a finite space, in a fixed order; None if a value is continuous or there are too many."""
    axes: list[Sequence[Value]] = []
    for distribution in space.values():
        if isinstance(distribution, Choice):
            axes.append(distribution.values)
        elif isinstance(distribution, IntUniform):
            axes.append(range(distribution.low, distribution.high + 1))
        else:
            return None
    if math.prod(len(axis) for axis in axes) > MOST_COMBINATIONS:
        return None
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*axes)]


def contains(space: Space, values: Mapping[str, Value]) -> bool:
    """Whether a search in `space` could propose these values."""
    for name, distribution in space.items():
        value = values.get(name)
        if isinstance(distribution, Choice):
            if value not in distribution.values:
                return False
        elif isinstance(value, bool | str | None) or not distribution.low <= value <= distribution.high:
            return False
    return True


def check_buildable(space: Space, constraint: Constraint, *, seed: int = 0) -> int | None:
    """Check that something can be started.

    Returns:
        the number of settings that can be built; None for a space that is not finite.

    Raises:
        SweepError: no setting of a finite space, or none of SAMPLED random ones, can be built; with the first reasons.
    """
    finite = combinations(space)
    random = Random(seed)
    points = finite if finite is not None else [draw(space, random) for _ in range(SAMPLED)]
    reasons = [reason for reason in map(constraint, points) if reason is not None]
    if len(reasons) == len(points):
        shown = "; ".join(dict.fromkeys(reasons[:3]))
        raise SweepError(f"SPACE: expected a setting that can be built, got none among {len(points)}: {shown}")
    return len(points) - len(reasons) if finite is not None else None


def draw(space: Space, random: Random) -> dict[str, Value]:
    """A random setting."""
    return {name: _draw(distribution, random) for name, distribution in space.items()}


def _draw(distribution: Distribution, random: Random) -> Value:
    if isinstance(distribution, Choice):
        return random.choice(distribution.values)
    low, high = distribution.low, distribution.high
    value = math.exp(random.uniform(math.log(low), math.log(high))) if distribution.log else random.uniform(low, high)
    if isinstance(distribution, IntUniform):
        return min(distribution.high, max(distribution.low, round(value)))
    return min(max(value, low), high)


def check_space(space: object) -> dict[str, Distribution]:
    """The space as a plain dict sorted by name.

    Raises:
        SweepError: the space is not a dict, is empty, or has an invalid name or distribution.
    """
    if not isinstance(space, Mapping):
        raise SweepError(f"SPACE: expected a dict from dotted names to distributions, got {type(space).__name__}")
    if not space:
        raise SweepError("SPACE: expected at least one name such as 'loss.align_weight', got an empty dict")
    for name, distribution in space.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise SweepError(f"SPACE: expected a dotted name such as 'loss.align_weight', got {name!r}")
        if not isinstance(distribution, Choice | Uniform | IntUniform):
            raise SweepError(
                f"SPACE, {name}: expected one of choice, uniform, loguniform, integer, logint, got {distribution!r}"
            )
    return dict(sorted(space.items()))


def describe(space: Space) -> dict[str, str]:
    """The space as text, for MLflow and for checking that a resumed sweep has the same space."""
    return {name: _describe(space[name]) for name in sorted(space)}


def _describe(distribution: Distribution) -> str:
    if isinstance(distribution, Choice):
        return f"choice({list(distribution.values)})"
    if isinstance(distribution, Uniform):
        return f"{'loguniform' if distribution.log else 'uniform'}({distribution.low!r}, {distribution.high!r})"
    return f"{'logint' if distribution.log else 'integer'}({distribution.low!r}, {distribution.high!r})"


def _check_range(kind: str, low: float, high: float, log: bool) -> None:
    for value in (low, high):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise SweepError(f"{kind}: expected two finite numbers, got {low!r} and {high!r}")
    if low >= high:
        raise SweepError(f"{kind}: expected low < high, got {low!r} and {high!r}")
    if log and low <= 0:
        raise SweepError(f"{kind}: expected low > 0 for a logarithmic axis, got {low!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _where(error: BaseException, path: Path) -> str:
    """'line 3: ', the line of the user's file where the error occurred; '' if unknown."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == str(path):
            line = step.tb_lineno
        step = step.tb_next
    return f"line {line}: " if line else ""
