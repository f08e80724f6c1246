"""Champion and challenger: paired differences, the interval over sequences, and the decision."""

import math

import numpy as np
import pytest

from pipelines.evaluate import Evaluation
from pipelines.retraining.compare import compare, decide, table
from pipelines.scoring.bootstrap import difference_interval


def scored(values, *, sequences=6, metric="aligned_psnr", method="SDAN (self)"):
    """An evaluation whose tiles have these values, spread over the sequences."""
    tiles = [
        {"method": method, "sequence": f"{n % sequences:05d}", "pair": "00005-00001", "row": n, "col": 0, metric: value}
        for n, value in enumerate(values)
    ]
    return Evaluation({}, ("aligned",), len(tiles), 16, "val", False, 1.0, math.nan, {}, tiles=tiles)


def test_the_difference_is_paired_and_its_interval_is_over_sequences():
    random = np.random.default_rng(0)
    before = random.normal(30, 5, 24)
    after = before + random.normal(0.2, 0.05, 24)
    (found,) = compare(scored(before), scored(after))
    names = [f"{n % 6:05d}" for n in range(24)]
    assert found.difference == difference_interval(after.tolist(), before.tolist(), names)
    assert found.difference.mean == pytest.approx(np.mean(after - before))
    # Scenes vary by 5 dB, but the pairs by 0.05 dB only.
    assert 0.15 < found.difference.low < found.difference.high < 0.25
    assert found.tiles == 24 and found.champion == pytest.approx(before.mean())


def test_other_tiles_are_refused():
    with pytest.raises(ValueError, match="expected scores of the same tiles, got 3 and 4 tiles of which 3"):
        compare(scored([1, 2, 3]), scored([1, 2, 3, 4]))


def test_tiles_without_a_score_are_left_out_and_raw_decides_then():
    (found,) = compare(scored([30.0, math.nan, 30.0]), scored([31.0, 31.0, math.nan]))
    assert (found.tiles, found.difference.mean) == (1, 1.0)
    raw = compare(scored([30.0] * 4, metric="raw_psnr"), scored([31.0] * 4, metric="raw_psnr"))
    assert [row.metric for row in raw] == ["raw_psnr"]


@pytest.mark.parametrize(
    ("gains", "margin", "promoted", "why"),
    [
        ([0.2, 0.25, 0.2, 0.3, 0.2, 0.2], 0.05, True, "reaches the margin of 0.05 dB and the interval is above 0"),
        ([0.03] * 6, 0.05, False, "the gain is below the margin of 0.05 dB"),
        ([0.03] * 6, 0.0, True, "promoted"),
        ([1.5, -0.2, -0.2, -0.2, -0.2, -0.2], 0.05, False, "the interval is not above 0"),
        ([-0.4] * 6, 0.0, False, "the champion stays"),
        ([0.0] * 6, 0.0, False, "the interval is not above 0"),
    ],
)
def test_margin_and_interval_decide_together(gains, margin, promoted, why):
    comparisons = compare(scored([30.0] * 6), scored([30.0 + gain for gain in gains]))
    decision = decide(comparisons, margin)
    assert decision.promoted is promoted and why in decision.sentence
    assert decision.difference_db == pytest.approx(np.mean(gains)) and "6 tiles of 6 sequences" in decision.sentence


def test_one_sequence_gives_no_interval_and_no_promotion():
    comparisons = compare(scored([30.0] * 4, sequences=1), scored([33.0] * 4, sequences=1))
    decision = decide(comparisons, 0.05)
    assert not decision.promoted and decision.low_db is None
    assert "+3.000 dB (self, aligned, val, 4 tiles of 1 sequence)" in decision.sentence
    assert "takes two held-out sequences or more" in decision.sentence
    assert "n/a" in table(comparisons)


def test_nothing_to_compare_promotes_nothing():
    assert not decide(compare(scored([math.nan]), scored([math.nan])), 0.0).promoted
