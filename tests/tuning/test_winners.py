"""Sentences about trials with a known optimum and known noise; pure numpy."""

import numpy as np
import pytest

from tuning import winners
from tuning.winners import Scored, compare, judge, setting_text

SEQUENCES, TILES = 10, 6


def sweep(gains, *, seeds=1, tile_noise=0.05, seed_noise=0.0, random=None, sequences=SEQUENCES, seconds=None):
    """Settings whose true score is 28 dB + gain; sequences differ by decibels, as real ones do."""
    random = random or np.random.default_rng(0)
    names = [f"{sequence:05}/pair@{tile},0" for sequence in range(sequences) for tile in range(TILES)]
    scene = dict(zip(names, random.normal(28, 3, len(names)), strict=True))
    settings = []
    for number, gain in enumerate(gains):
        reaction = random.normal(0, tile_noise, sequences)  # of a sequence to a setting, the same for all seeds
        runs = []
        for _ in range(seeds):
            luck = random.normal(0, seed_noise)
            noise = random.normal(0, tile_noise, len(names))
            runs.append(
                {name: scene[name] + gain + luck + reaction[n // TILES] + noise[n] for n, name in enumerate(names)}
            )
        cost = None if seconds is None else seconds[number]
        settings.append(Scored(f"t{number}", {"model.packing_kernel": 2 ** (number + 1)}, tuple(runs), cost))
    return settings


def test_a_known_optimum_wins_by_its_known_difference():
    settings = sweep([-0.8, 0.0, -0.4, -0.9], seeds=2, seed_noise=0.02)
    verdict = judge(settings, metric="val_psnr", default="t2")
    assert verdict.best == "t1"
    found = compare(settings)
    gain = found.difference(0, 1)
    assert gain.low < 0.4 < gain.high and gain.half < 0.3
    first, second, *rest = verdict.sentences
    assert first == (
        f"packing_kernel=4 is better than 8 by {gain.mean:.2f} dB ({gain.low:.2f} to {gain.high:.2f}, 2 seeds, "
        "10 sequences)."
    )
    assert second.startswith("The best is better than the default setting by ") and not rest


def test_equal_settings_are_called_equal_first():
    verdict = judge(sweep([0.0] * 5, seeds=2, seed_noise=0.02, seconds=[50, 40, 10, 30, 20]), metric="val_psnr")
    assert verdict.sentences[0].startswith("The trials cannot be told apart: no difference larger than the noise (")
    assert "choose the cheapest, packing_kernel=8 (trial t2)." in verdict.sentences[0]
    assert verdict.best == "t2" and 0 < verdict.noise < 0.5


def test_two_level_winners_above_the_rest_are_said():
    verdict = judge(sweep([0.0, 0.01, -2.0, -2.1]), metric="val_psnr", default="t2")
    assert "between the best 2 of 4 trials: choose the cheapest" in verdict.sentences[0]
    assert "better than the default setting" in verdict.sentences[1]
    assert "--repeats 2 measures it" in verdict.sentences[2]


def test_noise_is_seldom_called_a_difference():
    """Eight equal settings, chosen by their scores: a test of single pairs would find a difference in most sweeps."""
    random = np.random.default_rng(1)
    wrong = sum(
        compare(sweep([0.0] * 8, random=random, seeds=2, seed_noise=0.05), seed=number).told_apart
        for number in range(40)
    )
    assert wrong <= 5  # 2 expected at 95 %


def test_few_sequences_widen_the_intervals():
    """Student's t: 2.776 is its 97.5 % quantile at 4 degrees of freedom."""
    assert winners._widened(1.95996, 5) == pytest.approx(2.776 * np.sqrt(5 / 4), rel=1e-3)
    assert winners._widened(1.95996, 1000) == pytest.approx(1.9634, rel=1e-3)
    random = np.random.default_rng(5)
    assert sum(compare(sweep([0.0] * 8, random=random, sequences=5), seed=n).told_apart for n in range(40)) <= 6


def test_real_differences_are_found():
    random = np.random.default_rng(2)
    found = sum(
        compare(sweep([0.0, 0.3, 0.0, 0.0], random=random, seeds=2, seed_noise=0.02)).difference(0, 1).clear
        for _ in range(20)
    )
    assert found >= 18


def test_seeds_that_disagree_widen_the_interval():
    gains = [0.0, 0.3, 0.1]
    calm = compare(sweep(gains, seeds=2, seed_noise=0.0))
    wild = compare(sweep(gains, seeds=2, seed_noise=0.5))
    assert wild.seed_sd > 5 * calm.seed_sd and wild.halves[0, 1] > 2 * calm.halves[0, 1]
    assert compare(sweep(gains)).seed_sd is None


def test_lower_is_better_if_the_mode_says_so():
    settings = sweep([0.0, 1.0, 2.0], seeds=2)
    verdict = judge(settings, metric="val_loss", mode="min", default="t2")
    assert verdict.best == "t0" and verdict.sentences[0].startswith("packing_kernel=2 is better than 4 by ")
    assert compare(settings, mode="min").difference(0, 1).mean == pytest.approx(1.0, abs=0.1)


def test_few_sequences_give_no_verdict_but_say_so():
    settings = sweep([0.0, 5.0], sequences=4)
    verdict = judge(settings, metric="val_psnr", best="t1")
    assert "at least 5 sequences, got 4" in verdict.sentences[0] and verdict.best == "t1"
    none = judge([Scored("a", {}, ()), *settings[:1]], metric="val_psnr", best="a")
    assert "expected two finished trials with scores per tile, got 1" in str(none)


def test_only_tiles_that_all_trials_have_count():
    one, two = sweep([0.0, 1.0])
    extra = dict(two.tiles[0]) | {"99999/pair@0,0": 1000.0}
    first = next(iter(extra))
    extra[first] = float("nan")
    found = compare([one, Scored("t1", two.overrides, (extra,))])
    assert found.difference(0, 1).mean == pytest.approx(1.0, abs=0.1) and found.sequences == SEQUENCES


def test_the_default_is_compared_beyond_the_best():
    gains = [*np.linspace(1, 0.5, winners.MOST_COMPARED + 5), -3.0]
    settings = sweep(gains)
    found = compare(settings, keep=settings[-1].trial_id)
    assert len(found.scored) == winners.MOST_COMPARED + 1 and found.difference(0, len(found.scored) - 1).clear


def test_settings_are_named_by_what_differs():
    overrides = {"loss.align_weight": 0.123456, "model.packing_kernel": 4}
    assert setting_text(overrides) == "align_weight=0.123, packing_kernel=4"
    assert winners.names_of(overrides, overrides | {"model.packing_kernel": 8}) == ("packing_kernel=4", "8")
    other = {"loss.align_weight": 1.0, "model.packing_kernel": 8}
    assert winners.names_of(overrides, other)[1] == "align_weight=1, packing_kernel=8"
