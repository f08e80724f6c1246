"""Regroups the rows that arrive for a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]


def strips(parts: Iterable[Pixels], rows: int) -> Iterator[Pixels]:
    """The same rows, `rows` at a time; the last strip may be shorter."""
    held: Pixels | None = None
    for part in parts:
        held = part if held is None else np.concatenate((held, part))
        while len(held) >= rows:
            yield held[:rows]
            held = held[rows:]
    if held is not None and len(held):
        yield held
