"""Confidence intervals of mean scores, by resampling whole sequences (Efron and Tibshirani 1993, chapter 8).

Tiles of one sequence resemble each other, so single tiles are no independent samples. Each replicate draws as many
sequences as there are, with replacement, and takes the mean over all of their tiles. Differences between two methods
are taken tile by tile first, which removes the variation between scenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REPLICATES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float
    """Both ends are NaN for fewer than two sequences."""
    sequences: int

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float], sequences: Sequence[str], *, seed: int = 0) -> Interval:
    """The mean of the finite values and its percentile interval at LEVEL.

    Args:
        values: one per tile.
        sequences: the sequence of each tile.
        seed: of the resampling; the same seed gives the same interval.
    """
    array = np.asarray(values, np.float64)
    known = np.isfinite(array)
    if not known.any():
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    names, number = np.unique(np.asarray(sequences)[known], return_inverse=True)
    sums = np.bincount(number, array[known])
    counts = np.bincount(number)
    mean = float(sums.sum() / counts.sum())
    if len(names) < 2:
        return Interval(mean, float("nan"), float("nan"), len(names))
    drawn = np.random.default_rng(seed).integers(len(names), size=(REPLICATES, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(mean, float(low), float(high), len(names))


def difference_interval(
    values: Sequence[float], baseline: Sequence[float], sequences: Sequence[str], *, seed: int = 0
) -> Interval:
    """The mean of values - baseline, tile by tile, and its interval."""
    return mean_interval(np.subtract(values, baseline).tolist(), sequences, seed=seed)
