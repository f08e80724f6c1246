"""A histogram of per-tile differences as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT, FOOT = 320, 120, 20
BARS = 25


def limits(all_differences: Sequence[Sequence[float]]) -> tuple[float, float]:
    """A range in dB around 0 that holds all finite differences, so that several histograms have one scale."""
    values = np.concatenate([np.asarray(each, np.float64) for each in all_differences] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    reach = max(float(np.abs(values).max()) if values.size else 0.0, 0.1)
    return -reach, reach


def histogram(differences: Sequence[float], low: float, high: float, label: str) -> str:
    """SVG text: bars left of 0 (worse) and right of it (better) in their own classes.

    Args:
        differences: dB, one per tile; NaN is left out.
        low, high: the ends of the axis, from `limits`.
        label: for screen readers; it must not hold markup.
    """
    values = np.asarray(differences, np.float64)
    counts, edges = np.histogram(values[np.isfinite(values)], bins=BARS, range=(low, high))
    top = max(1, int(counts.max()))
    step = WIDTH / BARS
    bars = []
    for number, count in enumerate(counts):
        if not count:
            continue
        tall = HEIGHT * count / top
        kind = "worse" if edges[number] + edges[number + 1] < 0 else "better"
        place = f'x="{number * step + 0.5:.1f}" y="{HEIGHT - tall:.1f}" width="{step - 1:.1f}" height="{tall:.1f}"'
        bars.append(f'<rect class="{kind}" {place}><title>{_bar(edges, number)}: {count} tiles</title></rect>')
    zero = WIDTH * -low / (high - low)
    ends = (
        f'<text x="0" y="{HEIGHT + 15}">{low:+.1f} dB</text>'
        f'<text x="{zero:.0f}" y="{HEIGHT + 15}" text-anchor="middle">0</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 15}" text-anchor="end">{high:+.1f} dB</text>'
    )
    axis = f'<path d="M0 {HEIGHT}H{WIDTH}M{zero:.1f} 0V{HEIGHT}"/>'
    size = f'viewBox="0 0 {WIDTH} {HEIGHT + FOOT}"'
    return f'<svg {size} role="img" aria-label="{label}">{"".join(bars)}{axis}{ends}</svg>'


def _bar(edges: np.ndarray, number: int) -> str:
    return f"{edges[number]:+.2f} to {edges[number + 1]:+.2f} dB"
