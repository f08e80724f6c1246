"""The plan of a sweep, on fake nodes; nothing here starts Ray."""

import pytest

from tuning.plan import SweepPlan, TrialNeeds, duration, parse_duration, trials_at_once, trials_that_fit
from tuning.space import SweepError

EIGHT_GPUS = [{"CPU": 32.0, "GPU": 8.0}]
ONE_GPU = TrialNeeds(workers=1, cpus=1.25, gpus=1.0)


def test_each_gpu_gets_a_trial():
    assert trials_at_once(EIGHT_GPUS, ONE_GPU, concurrent=None, num_trials=8) == 8
    assert trials_at_once(EIGHT_GPUS, ONE_GPU, concurrent=None, num_trials=5) == 5
    assert trials_at_once(EIGHT_GPUS, ONE_GPU, concurrent=3, num_trials=8) == 3


def test_without_gpus_one_trial_runs_unless_asked():
    laptop, needs = [{"CPU": 2.0}], TrialNeeds(workers=1, cpus=0.75, gpus=0.0)
    assert trials_at_once(laptop, needs, concurrent=None, num_trials=8) == 1
    assert trials_at_once(laptop, needs, concurrent=2, num_trials=8) == 2


@pytest.mark.parametrize(
    ("nodes", "needs", "fits"),
    [
        (EIGHT_GPUS, TrialNeeds(2, 1.25, 1.0), 4),
        (EIGHT_GPUS, TrialNeeds(1, 1.25, 0.5), 16),
        (EIGHT_GPUS, TrialNeeds(1, 1.25, 0.6), 8),  # 8 / 0.6 is 13, but no two share a GPU
        ([{"CPU": 5.0, "GPU": 8.0}], ONE_GPU, 4),  # too few CPUs for the readers of eight
        ([{"CPU": 8.0}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}], TrialNeeds(2, 1.25, 1.0), 1),
        ([{"CPU": 1.0}, {"CPU": 1.0}], TrialNeeds(1, 1.25, 0.0), 0),  # two halves are not a whole
    ],
)
def test_trials_are_counted_node_by_node(nodes, needs, fits):
    assert trials_that_fit(nodes, needs) == fits


@pytest.mark.parametrize(
    ("nodes", "concurrent", "message"),
    [
        ([{"CPU": 8.0}], None, r"expected room for one trial \(1 GPU and 1.25 CPUs in 1 worker\), got 8 CPUs, 0 GPUs"),
        (EIGHT_GPUS, 9, "--concurrent 9: expected room .*, got 32 CPUs, 8 GPUs; use --concurrent 8"),
        (EIGHT_GPUS, 0, "--concurrent: expected 1 to 64, got 0"),
        ([], None, "on 0 nodes"),
    ],
)
def test_an_impossible_plan_is_refused_in_one_line(nodes, concurrent, message):
    with pytest.raises(SweepError, match=message) as caught:
        trials_at_once(nodes, ONE_GPU, concurrent=concurrent, num_trials=9)
    assert "\n" not in str(caught.value)


def test_the_plan_says_trials_time_and_the_winners_training():
    plan = SweepPlan(9, 8, ONE_GPU, repeats=2, trial_s=600.0, winner_s=36000.0, time_budget_s=7200.0)
    assert str(plan).splitlines() == [
        "plan: 9 trials, 8 at once, each with 1 GPU and 1.25 CPUs in 1 worker",
        "then the best three and the default setting again, with 1 more seed each",
        "time: at most 30 min (10 min a trial, by the rate of an earlier run; trials that are stopped early take less)",
        "training the winner at full length takes about 10.0 h",
        "time budget: 2.0 h",
    ]
    unknown = str(SweepPlan(2, 1, TrialNeeds(1, 0.75, 0.0)))
    assert "2 trials, one after the other" in unknown and "not known before the first trial" in unknown


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("0.5d", 43200)]
)
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "2 weeks", "-1h", "0s", "1h x", "1e9h"])
def test_other_durations_are_refused(text):
    with pytest.raises(SweepError, match="--time-budget: expected a time such as"):
        parse_duration(text)


def test_durations_are_written_short():
    assert [duration(value) for value in (42, 600, 7200)] == ["42 s", "10 min", "2.0 h"]
