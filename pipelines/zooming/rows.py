"""Changes a zoomed photograph's rows on their way into the file: crop, grey, scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import gcd
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]
_CONTEXT = 4
"""Steps of rows above and below that bicubic enlargement needs, and one more."""
_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)


def cropped(parts: Iterable[Pixels], top: int, left: int, height: int, width: int) -> Iterator[Pixels]:
    """That window of the rows [rows, W, C]."""
    at = 0
    for part in parts:
        first, last = max(top - at, 0), min(top + height - at, len(part))
        at += len(part)
        if first < last:
            yield part[first:last, left : left + width]
        del part  # the next one needs memory


def grey(parts: Iterable[Pixels]) -> Iterator[Pixels]:
    """Each pixel's luma in all three channels."""
    for part in parts:
        luma = np.rint(part.astype(np.float32) @ _LUMA).astype(part.dtype)
        yield np.repeat(luma[..., None], 3, axis=2)
        del part, luma


def resampled(parts: Iterable[Pixels], width: int, scale: int, wanted: int) -> Iterator[Pixels]:
    """Rows enlarged by `scale` -> rows enlarged by `wanted`: area average where that is less, else bicubic.

    The number of rows and `width`, their number of columns, are multiples of `scale`.
    """
    step = scale // gcd(scale, wanted)
    over, columns = step * _CONTEXT, width // scale * wanted
    context = over if wanted > scale else 0

    def resized(rows: Pixels, above: int, below: int) -> Pixels:
        size = (columns, len(rows) // step * (wanted * step // scale))
        mode = cv2.INTER_CUBIC if context else cv2.INTER_AREA
        done = cv2.resize(np.ascontiguousarray(rows), size, interpolation=mode)
        factor = wanted * step // scale
        return done[above // step * factor : len(done) - below // step * factor]

    held: Pixels | None = None
    above = 0
    for part in parts:
        held = part if held is None else np.concatenate((held, part))
        del part
        ready = (len(held) - above - context) // step * step
        if ready > 0:
            yield resized(held[: above + ready + context], above, context)
            keep = max(above + ready - context, 0)
            above, held = above + ready - keep, held[keep:].copy()  # a view would keep the part
    if held is not None and len(held) > above:
        yield resized(held, above, 0)
