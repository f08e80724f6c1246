"""The outcome of a check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One check's outcome."""

    name: str
    state: str
    """ok, absent (SDAN works without it) or broken."""
    detail: str
    """What was found; if it is broken, also what to do."""
    node: str = ""
    """The node of a cluster; "": this machine, or all nodes together."""

    def line(self) -> str:
        """One line of the report."""
        where = f"{self.node} " if self.node else ""
        return f"{self.state:7} {where}{self.name:10} {self.detail}"


def run(name: str, check: Callable[[], Finding]) -> Finding:
    """The check's finding. An error that it raises becomes a finding, too."""
    try:
        return check()
    except ModuleNotFoundError as error:
        return Finding(name, "absent", f"the package {error.name} is not installed; pip install 'sdan[train]'")
    except Exception as error:
        return Finding(name, "broken", " ".join(f"{type(error).__name__}: {error}".split()))
