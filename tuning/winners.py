"""Which trials of a sweep differ by more than noise: a paired bootstrap over held-out sequences, and sentences.

All trials are scored on the same tiles, so each difference is taken tile by tile. Tiles of one sequence show one scene
and are not independent: the bootstrap draws whole sequences. If settings were trained with several seeds, the spread
between their seeds is added. The intervals hold for all pairs of trials at once (95 %): the best of many trials was
chosen because it scored highest, and an interval for a single pair would call noise a difference.

The bootstrap's intervals are too narrow for few sequences. They are widened as Hesterberg (2015, "What Teachers Should
Know About the Bootstrap") does: quantiles of Student's t in place of the normal ones, times sqrt(n / (n - 1)).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from tuning.space import Value

LEAST_SEQUENCES = 5
"""With fewer held-out sequences nothing is said about noise."""
MOST_COMPARED = 24
"""The best trials that are compared with each other, the default setting included."""
DRAWS = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Scored:
    """One setting and its scores."""

    trial_id: str
    overrides: Mapping[str, Value]
    tiles: tuple[Mapping[str, float], ...]
    """One mapping per seed: tile name -> score. A tile's sequence is its name up to the first '/'."""
    seconds: float | None = None
    """Time of its training; None: unknown."""


@dataclass(frozen=True)
class Difference:
    """How much better one setting is than another."""

    mean: float
    half: float
    """Half the width of its interval."""

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.mean) > self.half


@dataclass(frozen=True)
class Comparison:
    """All settings against each other."""

    scored: tuple[Scored, ...]
    """Best first, by the mean over seeds and common tiles."""
    means: tuple[float, ...]
    halves: NDArray[np.float64]
    """[K, K]: half widths of the intervals of all differences."""
    sequences: int
    sign: float
    """1 if higher scores are better, else -1."""
    seed_sd: float | None
    """Standard deviation of a setting's mean score between seeds; None: each setting had one seed."""

    def difference(self, first: int, second: int) -> Difference:
        """How much better setting `first` is than `second` (numbers in `scored`)."""
        mean = self.sign * (self.means[first] - self.means[second])
        return Difference(mean, float(self.halves[first, second]))

    @property
    def told_apart(self) -> bool:
        """Whether any two settings differ by more than noise."""
        count = len(self.scored)
        return any(self.difference(i, j).clear for i in range(count) for j in range(i + 1, count))

    def number(self, trial_id: str | None) -> int | None:
        """The place of a trial in `scored`."""
        return next((n for n, each in enumerate(self.scored) if each.trial_id == trial_id), None)


def compare(
    settings: Sequence[Scored], *, mode: str = "max", keep: str | None = None, seed: int = 0
) -> Comparison | None:
    """Compare settings on the tiles that all of them have.

    Args:
        mode: max or min, whichever is better.
        keep: a trial_id that is compared even if it is not among the best MOST_COMPARED.

    Returns:
        None with fewer than two settings, or fewer than LEAST_SEQUENCES sequences.
    """
    settings = [each for each in settings if each.tiles]
    names = _common_tiles(settings)
    groups = sorted({name.partition("/")[0] for name in names})
    if len(settings) < 2 or len(groups) < LEAST_SEQUENCES:
        return None
    sign = -1.0 if mode == "min" else 1.0
    settings = sorted(settings, key=lambda each: -sign * _mean(each, names))
    settings = settings[:MOST_COMPARED] + [each for each in settings[MOST_COMPARED:] if each.trial_id == keep]
    spread = _seed_spread(settings, names)
    deviations = _deviations(settings, names, groups, spread, np.random.default_rng(seed))
    halves = _simultaneous_halves(deviations, len(groups))
    means = tuple(_mean(each, names) for each in settings)
    return Comparison(tuple(settings), means, halves, len(groups), sign, spread[0] if spread else None)


def _common_tiles(settings: Sequence[Scored]) -> list[str]:
    """Names of the tiles that have a finite score in every seed of every setting."""
    every = [
        {name for name, value in tiles.items() if math.isfinite(value)} for each in settings for tiles in each.tiles
    ]
    return sorted(set.intersection(*every)) if every else []


def _mean(each: Scored, names: Sequence[str]) -> float:
    return float(np.mean([[tiles[name] for name in names] for tiles in each.tiles]))


def _seed_spread(settings: Sequence[Scored], names: Sequence[str]) -> tuple[float, int] | None:
    """(standard deviation between the seeds of a setting, degrees of freedom), pooled over the settings."""
    squares, degrees = 0.0, 0
    for each in settings:
        means = np.array([np.mean([tiles[name] for name in names]) for tiles in each.tiles])
        squares += float(np.square(means - means.mean()).sum())
        degrees += len(means) - 1
    return (math.sqrt(squares / degrees), degrees) if degrees else None


def _deviations(
    settings: Sequence[Scored],
    names: Sequence[str],
    groups: Sequence[str],
    spread: tuple[float, int] | None,
    random: np.random.Generator,
) -> NDArray[np.float64]:
    """[DRAWS, K]: means of the settings over drawn sequences, minus the mean over all."""
    of_group = np.array([groups.index(name.partition("/")[0]) for name in names])
    counts = np.bincount(of_group, minlength=len(groups)).astype(float)
    scores = np.array([np.mean([[tiles[name] for name in names] for tiles in each.tiles], axis=0) for each in settings])
    sums = np.array([np.bincount(of_group, weights=row, minlength=len(groups)) for row in scores])
    weights = random.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=DRAWS).astype(float)
    deviations: NDArray[np.float64] = (weights @ sums.T) / (weights @ counts)[:, None] - scores.mean(axis=1)
    if spread:
        sd, degrees = spread
        seeds = np.sqrt([len(each.tiles) for each in settings])
        deviations = deviations + sd * random.standard_t(degrees, size=deviations.shape) / seeds
    return deviations


def _simultaneous_halves(deviations: NDArray[np.float64], sequences: int) -> NDArray[np.float64]:
    """[K, K]: half widths that hold for all pairs at once: each pair's standard error times one factor."""
    count = deviations.shape[1]
    first, second = np.triu_indices(count, 1)
    pairs = deviations[:, first] - deviations[:, second]
    own = np.maximum(pairs.std(axis=0), 1e-12)
    factor = float(np.quantile(np.abs(pairs / own).max(axis=1), CONFIDENCE))
    # Among many pairs some standard errors come out too small by chance: none counts as less than the median.
    errors = np.maximum(own, np.median(own))
    halves = np.zeros((count, count))
    halves[first, second] = halves[second, first] = _widened(factor, sequences) * errors
    return halves


def _widened(factor: float, sequences: int) -> float:
    """The factor for standard errors that were themselves estimated from few sequences: the quantile of Student's t
    where the normal distribution has `factor`, times sqrt(n / (n - 1)).

    With t = sqrt(d) tan(angle) the density of t at d degrees of freedom is cos(angle)^(d - 1), up to a constant.
    """
    degrees = sequences - 1
    coverage = 2 * NormalDist().cdf(factor) - 1
    angles = np.linspace(0, math.pi / 2, 200_001)
    mass = np.cumsum(np.cos(angles) ** (degrees - 1))
    angle = float(np.interp(coverage * mass[-1], mass, angles))
    return math.sqrt(degrees) * math.tan(angle) * math.sqrt(sequences / degrees)


@dataclass(frozen=True)
class Verdict:
    """What a sweep found, in words."""

    sentences: tuple[str, ...]
    """The most important one first."""
    best: str | None
    """The trial_id to choose: the best, or the cheapest of those that cannot be told from it."""
    noise: float | None
    """Half the width of the interval of a difference; None: unknown."""

    def __str__(self) -> str:
        return " ".join(self.sentences)


def unit_of(metric: str) -> str:
    """' dB', ' ms' or ''."""
    return " dB" if "psnr" in metric else " ms" if metric.startswith("ms_") else ""


def judge(
    settings: Sequence[Scored], *, metric: str, mode: str = "max", default: str | None = None, best: str | None = None
) -> Verdict:
    """Say which setting to choose, and how sure that is.

    Args:
        settings: the finished trials, each with the tiles of all its seeds.
        default: trial_id of the default setting.
        best: trial_id of the trial with the best score, for the case that nothing can be compared.
    """
    found = compare(settings, mode=mode, keep=default)
    if found is None:
        return Verdict((_not_compared(settings),), best, None)
    level = [n for n in range(len(found.scored)) if n == 0 or not found.difference(0, n).clear]
    noise = float(np.median([found.halves[0, n] for n in range(1, len(found.scored))]))
    noise = float(found.halves[0, 1]) if len(level) > 1 and found.told_apart else noise
    seeds = max(len(each.tiles) for each in found.scored)
    chosen = _cheapest([found.scored[n] for n in level])
    sentences = [_main_sentence(found, level, noise, chosen, unit_of(metric), seeds)]
    number = found.number(default)
    if number and found.told_apart:
        sentences.append(_against_default(found, number, unit_of(metric)))
    elif number == 0:
        sentences.append("The best trial is the default setting.")
    if found.seed_sd is None:
        sentences.append("One seed a setting: the noise between two trainings is not counted; --repeats 2 measures it.")
    return Verdict(tuple(sentences), chosen.trial_id, noise)


def _not_compared(settings: Sequence[Scored]) -> str:
    have = [each for each in settings if each.tiles]
    if len(have) < 2:
        return f"Nothing to compare: expected two finished trials with scores per tile, got {len(have)}."
    names = _common_tiles(have)
    got = len({name.partition("/")[0] for name in names})
    return (
        f"Whether the trials differ is not known: expected held-out tiles of at least {LEAST_SEQUENCES} sequences, "
        f"got {got}; the order below may be noise."
    )


def _cheapest(level: Sequence[Scored]) -> Scored:
    """The best of those that trained fastest, within 10 %; the best of all if a time is unknown."""
    seconds = [each.seconds for each in level if each.seconds is not None]
    if len(seconds) < len(level):
        return level[0]
    return next(each for each in level if (each.seconds or 0.0) <= 1.1 * min(seconds))


def _main_sentence(found: Comparison, level: Sequence[int], noise: float, chosen: Scored, unit: str, seeds: int) -> str:
    counted = f"{seeds} seed{'s' if seeds > 1 else ''}, {found.sequences} sequences"
    advice = f"choose the cheapest, {setting(chosen)}"
    if not found.told_apart:
        return (
            f"The trials cannot be told apart: no difference larger than the noise ({noise:.2g}{unit}; {counted}): "
            f"{advice}."
        )
    if len(level) > 1:
        return (
            f"No difference larger than the noise ({noise:.2g}{unit}; {counted}) between the best "
            f"{len(level)} of {len(found.scored)} trials: {advice}."
        )
    gain = found.difference(0, 1)
    first, second = names_of(found.scored[0].overrides, found.scored[1].overrides)
    return f"{first} is better than {second} by {_interval(gain, unit)}, {counted})."


def _against_default(found: Comparison, number: int, unit: str) -> str:
    gain = found.difference(0, number)
    if gain.clear:
        return f"The best is better than the default setting by {_interval(gain, unit)})."
    return f"No difference larger than the noise ({gain.half:.2g}{unit}) between the best and the default setting."


def _interval(gain: Difference, unit: str) -> str:
    digits = max(2, 1 - math.floor(math.log10(max(abs(gain.mean), 1e-9))))
    return f"{gain.mean:.{digits}f}{unit} ({gain.low:.{digits}f} to {gain.high:.{digits}f}"


def names_of(first: Mapping[str, Value], second: Mapping[str, Value]) -> tuple[str, str]:
    """Both settings in words: 'packing_kernel=4' and '8' if they differ in one value, else all that differ."""
    differ = [name for name in sorted(first) if first[name] != second.get(name)]
    if len(differ) == 1:
        return setting_text({differ[0]: first[differ[0]]}), _value(second.get(differ[0], "-"))
    return setting_text({name: first[name] for name in differ}), setting_text(
        {name: second[name] for name in differ if name in second}
    )


def setting(each: Scored) -> str:
    """'packing_kernel=4, align_weight=0.3 (trial 1f2a_00002)'."""
    return f"{setting_text(each.overrides)} (trial {each.trial_id})"


def setting_text(overrides: Mapping[str, Value]) -> str:
    """'packing_kernel=4, align_weight=0.3': names without their sections."""
    return ", ".join(f"{name.rpartition('.')[2]}={_value(value)}" for name, value in sorted(overrides.items()))


def _value(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
