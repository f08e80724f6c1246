"""The search space: dotted config names -> distributions, for example

    SPACE = {"model.packing_kernel": choice([2, 4, 8]), "loss.align_weight": loguniform(0.1, 10.0)}

The names are those of `sdan train --set NAME=VALUE`. This module does not know which names exist; the train function
checks them.
"""

import math
import re
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Value = bool | int | float | str
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


def default_space() -> dict[str, Distribution]:
    """The paper's two open questions: CPA's packing kernel and the weight of the aligned image X' in eq. 6."""
    return {"model.packing_kernel": choice([2, 4, 8]), "loss.align_weight": loguniform(0.1, 10.0)}


def load_space(path: str | Path) -> dict[str, Distribution]:
    """Run the user's Python file and return the SPACE that it defines.

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
    try:
        return check_space(names["SPACE"])
    except SweepError as error:
        raise SweepError(f"{path}: {error}") from error


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
