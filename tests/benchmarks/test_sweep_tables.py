"""benchmarks/sweep.py: known effects are in its tables, also of half of the settings."""

from random import Random

import pytest
import sweep

EFFECTS = {"model.packing_kernel": {2: 0.5, 8: 0.0}, "loss.self_reference_weight": {0.0: 0.0, 1.0: -0.2}}


@pytest.fixture(scope="module")
def done():
    """Trials of ten scenes whose scores follow EFFECTS, with little noise; the paper's other value has no effect."""
    found, random = {}, Random(0)
    for align in sweep.ALIGNS:
        for seed in range(2):
            for overrides in sweep.grid():
                quality = 25 + sum(by_value[overrides[name]] for name, by_value in EFFECTS.items())
                tiles = {
                    f"{scene:03}/p@{n},0": quality + scene + random.gauss(0, 0.02)
                    for scene in range(10)
                    for n in range(4)
                }
                trial = sweep.Trial(align, overrides, seed)
                score = sum(tiles.values()) / len(tiles)
                line = {"score": score, "epe_px": 1.5, "seconds": 9.0}
                found[trial.key] = line | {"tiles": dict.fromkeys(sweep.TARGETS, tiles)}
    return found


def test_known_effects_are_in_the_tables(done):
    rows = {row.split(" | ")[0]: row for row in sweep.effect_rows("ecc", done, 2)}
    kernel, weight, align = (
        rows[f"| {name}"] for name in ("packing_kernel=8", "self_reference_weight=1", "align_weight=1")
    )
    assert "-0.50" in kernel and "-0.20" in weight
    low, high = align.partition("(")[2].partition(")")[0].split(" to ")
    assert float(low) < 0 < float(high)
    best = list(sweep.setting_rows("scale", done, 2))[2]
    assert "packing_kernel=2" in best and "self_reference_weight=0" in best and "1.50" in best


def test_half_of_the_settings_gives_the_same_effects(done):
    half = sweep.grid()[:4]
    for name, values in sweep.GRID.items():  # balanced
        assert sorted(each[name] for each in half) == sorted(2 * values)
    assert sweep.whole(done, 2) == sweep.grid() and sweep.whole(done, 3) == []
    fewer = dict(done)
    del fewer[sweep.Trial("scale", sweep.grid()[5], 1).key]
    assert sweep.whole(fewer, 2) == half
    rows = {row.split(" | ")[0]: row for row in sweep.effect_rows("ecc", fewer, 2)}
    assert float(rows["| packing_kernel=8"].split(" | ")[2].split()[0]) == pytest.approx(-0.5, abs=0.01)
