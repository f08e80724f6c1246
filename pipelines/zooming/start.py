"""The start of the process: imports of large packages."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Import torch inside: nothing is collected meanwhile, and never what was imported.

    The collector would look through all of torch's objects several times during the import and again at the end of the
    process, which adds tenths of a second to both.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
