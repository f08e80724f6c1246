"""Regroups the rows that arrive for a file, and compresses strips of them on all cores."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]
Item = TypeVar("Item")
Result = TypeVar("Result")
_WAITING_PER_CORE = 2


def strips(parts: Iterable[Pixels], rows: int) -> Iterator[Pixels]:
    """The same rows, `rows` at a time; the last strip may be shorter."""
    held: Pixels | None = None
    for part in parts:
        at = 0
        if held is not None:
            at = rows - len(held)
            held = np.concatenate((held, part[:at]))
            if len(held) == rows:
                yield held
                held = None
        for first in range(at, len(part) - rows + 1, rows):
            yield part[first : first + rows]
            at = first + rows
        if at < len(part):
            held = part[at:].copy()  # a view would keep the part
        del part
    if held is not None:
        yield held


def on_all_cores(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """As map, in threads. A few items per core are in work at once, also while the next are waited for."""
    cores = len(os.sched_getaffinity(0))
    working: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(cores) as pool:
        for item in items:
            working.append(pool.submit(function, item))
            del item  # the next one needs memory
            if len(working) > _WAITING_PER_CORE * cores:
                yield working.popleft().result()
        while working:
            yield working.popleft().result()
