"""Lets the training step be imported on a GPU machine without the packages that only feed and record trainings.

`pipelines.training.step` needs `Inputs` and `model_inputs` of `pipelines.loader`, which also imports Ray and PyArrow.
Machines that are lent for a measurement often have neither.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NOT_MEASURED = ("ray", "pyarrow")


def provide_missing(packages: Sequence[str] = NOT_MEASURED) -> list[str]:
    """Make imports of those packages that are not installed give empty modules; return their names."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        sys.meta_path.append(_Finder(missing))
    return missing


class _Finder(MetaPathFinder, Loader):
    """Finds empty modules for packages and everything below them."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Empty(ModuleType):
    """A module in which every name is a class that accepts any arguments, e.g. for a decorator or a column's type."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {})
