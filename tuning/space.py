"""The search space: dotted config names -> distributions, for example

    SPACE = {"model.packing_kernel": choice([2, 4, 8]), "loss.align_weight": loguniform(0.1, 10.0)}

The names are the ones of `sdan train --set NAME=VALUE`; this module does not know which exist: the train function does.
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
    """A sweep that cannot start, go on or end with a result; the message is one line that says what to do."""


@dataclass(frozen=True)
class Choice:
    """One of `values`, which have no order."""

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise SweepError("choice([]): got no values, expected at least one")
        for value in self.values:
            if not isinstance(value, bool | int | float | str):
                raise SweepError(f"choice: got {value!r}, expected only bool, int, float or str values")
        if len({repr(value) for value in self.values}) < len(self.values):
            raise SweepError(f"choice({list(self.values)}): a value stands there twice; name each once")


@dataclass(frozen=True)
class Uniform:
    """A float in [low, high]; with `log` each factor is equally likely instead of each difference."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_range("loguniform" if self.log else "uniform", self.low, self.high, self.log)


@dataclass(frozen=True)
class IntUniform:
    """A whole number in [low, high], both ends included."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        kind = "logint" if self.log else "integer"
        if not _is_whole(self.low) or not _is_whole(self.high):
            raise SweepError(f"{kind}({self.low!r}, {self.high!r}): expected two whole numbers")
        _check_range(kind, self.low, self.high, self.log)


Distribution = Choice | Uniform | IntUniform
Space = Mapping[str, Distribution]


def choice(values: Sequence[Value]) -> Choice:
    """One of `values` (bool, int, float or str)."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise SweepError(f"choice({values!r}): expected a list of values such as choice([2, 4, 8])")
    return Choice(tuple(values))


def uniform(low: float, high: float) -> Uniform:
    """A float in [low, high]."""
    return Uniform(low, high)


def loguniform(low: float, high: float) -> Uniform:
    """A float in [low, high], low > 0, evenly spread on a logarithmic axis: for weights and learning rates."""
    return Uniform(low, high, log=True)


def integer(low: int, high: int) -> IntUniform:
    """A whole number in [low, high], both included."""
    return IntUniform(low, high)


def logint(low: int, high: int) -> IntUniform:
    """A whole number in [low, high], low > 0, both included, evenly spread on a logarithmic axis."""
    return IntUniform(low, high, log=True)


def default_space() -> dict[str, Distribution]:
    """The paper's two open questions: how coarsely CPA packs, and how much the aligned image X' weighs in eq. 6."""
    return {"model.packing_kernel": choice([2, 4, 8]), "loss.align_weight": loguniform(0.1, 10.0)}


def load_space(path: str | Path) -> dict[str, Distribution]:
    """Runs the Python file that the user named and returns the SPACE it defines.

    Raises SweepError when the file is missing, does not run, or defines no valid SPACE.
    """
    path = Path(path)
    if not path.is_file():
        raise SweepError(f"{path}: no such file; expected a Python file that defines SPACE = {{name: distribution}}")
    try:
        # The same name on every load, and never __main__: a script's own main block stays asleep.
        names = runpy.run_path(str(path), run_name="sdan_sweep_space")
    except SweepError as error:
        raise SweepError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:
        raise SweepError(f"{path}: {_where(error, path)}{type(error).__name__}: {_first_line(error)}") from error
    if "SPACE" not in names:
        raise SweepError(f"{path}: defines no SPACE; expected SPACE = {{'loss.align_weight': loguniform(0.1, 10.0)}}")
    try:
        return check_space(names["SPACE"])
    except SweepError as error:
        raise SweepError(f"{path}: {error}") from error


def check_space(space: object) -> dict[str, Distribution]:
    """The space as a plain dict sorted by name, or SweepError when it is empty or a name or distribution is wrong."""
    if not isinstance(space, Mapping):
        raise SweepError(f"SPACE: got {type(space).__name__}, expected a dict from dotted names to distributions")
    if not space:
        raise SweepError("the search space is empty; expected at least one name such as 'loss.align_weight'")
    for name, distribution in space.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise SweepError(f"search space: got the name {name!r}, expected a dotted name such as 'loss.align_weight'")
        if not isinstance(distribution, Choice | Uniform | IntUniform):
            raise SweepError(
                f"search space: {name}: got {distribution!r}, "
                "expected one of choice, uniform, loguniform, integer, logint"
            )
    return dict(sorted(space.items()))


def describe(space: Space) -> dict[str, str]:
    """The space as text, for MLflow and for telling whether a resumed sweep still has the same space."""
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
            raise SweepError(f"{kind}({low!r}, {high!r}): expected two finite numbers")
    if low >= high:
        raise SweepError(f"{kind}({low!r}, {high!r}): expected low < high")
    if log and low <= 0:
        raise SweepError(f"{kind}({low!r}, {high!r}): a logarithmic axis needs low > 0")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _where(error: BaseException, path: Path) -> str:
    """'line 3: ' when the error arose in the user's own file."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == str(path):
            line = step.tb_lineno
        step = step.tb_next
    return f"line {line}: " if line else ""
