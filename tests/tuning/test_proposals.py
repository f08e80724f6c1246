"""Which settings a search proposes: constraints, grids, finite spaces. Ray is not started."""

from types import SimpleNamespace

import pytest
from ray import cloudpickle
from ray.tune import tune as tune_run
from ray.tune.execution.tune_controller import TuneController
from ray.tune.search import Searcher

from tuning.folder import LIMITS, Limits, read_refused, setting_key, write_json
from tuning.search import Proposals, SearchPlan, Trials, _tune_settings
from tuning.space import SweepError, choice, uniform
from tuning.sweep import SweepOptions, check_search
from tuning.tracking import NOTHING_LEFT, SweepRun

GRID = {"kernel": choice([2, 4, 8]), "border": choice([0, 16])}


def proposals(folder, space, *, method="tpe", constraint=None, default=None, also=(), seed=0):
    run = SweepRun("s", "", "0", "parent", "val_psnr", "max", 3, also)
    plan = SearchPlan(100, 1, seed, 1, method, default)
    return Proposals(dict(sorted(space.items())), run, plan, folder, constraint)


def all_of(search, result=lambda values: 20.0, most=50):
    """Propose and end trials until the search has no more."""
    found = []
    for number in range(most):
        values = search.suggest(f"t{number}")
        if values == Searcher.FINISHED:
            break
        found.append(values)
        search.on_trial_result(f"t{number}", {"val_psnr": result(values), "training_iteration": 1})
        search.on_trial_complete(f"t{number}", {"val_psnr": result(values)})
    return found


@pytest.mark.parametrize("method", ["tpe", "random", "grid"])
def test_a_finite_space_is_tried_once_each(tmp_path, method):
    found = all_of(proposals(tmp_path, GRID, method=method))
    assert len(found) == 6 and len({setting_key(values) for values in found}) == 6
    assert read_refused(tmp_path).exhausted


def test_what_cannot_be_built_is_never_proposed(tmp_path):
    def constraint(values):
        return "8 does not divide 12" if values["kernel"] == 8 else None

    found = all_of(proposals(tmp_path, GRID, constraint=constraint))
    assert sorted(values["kernel"] for values in found) == [2, 2, 4, 4]
    refused = read_refused(tmp_path)
    assert refused.reasons == dict.fromkeys(["border=0, kernel=8", "border=16, kernel=8"], "8 does not divide 12")


def test_the_default_setting_comes_first(tmp_path):
    for method in ("tpe", "random", "grid"):
        default = {"border": 16, "kernel": 4}
        assert all_of(proposals(tmp_path, GRID, method=method, default=default))[0] == default


def test_a_space_without_anything_to_build_ends(tmp_path):
    search = proposals(tmp_path, {"rate": uniform(0, 1)}, constraint=lambda values: "never")
    assert all_of(search) == [] and search.exhausted
    assert len(read_refused(tmp_path).reasons) == 200


def test_tpe_learns_from_results(tmp_path):
    search = proposals(tmp_path, {"rate": uniform(0, 1)}, seed=1)
    found = [values["rate"] for values in all_of(search, lambda values: -((values["rate"] - 0.3) ** 2))]
    assert len(found) == 50
    assert sum(abs(rate - 0.3) < 0.1 for rate in found[25:]) > sum(abs(rate - 0.3) < 0.1 for rate in found[:25])


def test_several_objectives_may_miss_in_stopped_trials(tmp_path):
    search = proposals(tmp_path, GRID, also=(("ms_per_megapixel", "min"),))
    assert search.suggest("a") and search.suggest("b")
    search.on_trial_complete("a", {"val_psnr": 20.0, "ms_per_megapixel": 3.0})
    search.on_trial_complete("b", {"val_psnr": 19.0})
    assert search.running == 0 and search.suggest("c")


def test_a_restored_search_goes_on_with_its_constraint(tmp_path):
    """As Ray Tune does: the object by cloudpickle, once; its state by `save`, again and again."""
    limit = 4

    def constraint(values):
        return "too large" if values["kernel"] > limit else None

    search = proposals(tmp_path, GRID, constraint=constraint)
    stored = cloudpickle.dumps(search)
    first = search.suggest("a")
    search.on_trial_complete("a", {"val_psnr": 1.0})
    search.save(str(tmp_path / "state.pkl"))
    assert search.constraint is constraint
    again = cloudpickle.loads(stored)
    again.restore(str(tmp_path / "state.pkl"))
    rest = all_of(again)
    assert len(rest) == 3 and first not in rest and all(values["kernel"] <= limit for values in rest)


def test_limits_that_a_resume_changes_are_read_anew(tmp_path):
    search = proposals(tmp_path, {"rate": uniform(0, 1)})
    trials = Trials(search, tmp_path)
    write_json(tmp_path / LIMITS, Limits(num_trials=2))
    trials._counter = 2
    assert trials.is_finished()
    write_json(tmp_path / LIMITS, Limits(num_trials=3))
    assert not trials.is_finished()
    search.suggest("a")  # runs
    assert trials.next_trial() is None


@pytest.mark.parametrize(
    ("options", "trials", "message"),
    [
        ({"method": "grid"}, 5, "--search grid: expected a trial for each of 6 settings, got 5; use --trials 6"),
        ({"method": "best"}, 5, "--search: expected one of tpe, random, grid"),
        ({"time_budget_s": 0.0}, 5, "--time-budget: expected more than 0 s"),
        ({"constraint": lambda values: "no"}, 5, "got none among 6: no"),
    ],
)
def test_a_wrong_search_is_one_line(options, trials, message):
    with pytest.raises(SweepError, match=message) as caught:
        check_search(GRID, SweepOptions(**options), trials)
    assert "\n" not in str(caught.value)


def test_a_finite_space_bounds_the_trials():
    assert check_search(GRID, SweepOptions(), 100)[1] == 6
    odd = SweepOptions(method="grid", constraint=lambda values: "odd" if values["border"] else None)
    assert check_search(GRID, odd, 5)[1] == 3
    with pytest.raises(SweepError, match="got rate: uniform"):
        check_search({"rate": uniform(0, 1)}, SweepOptions(method="grid"), 5)


@pytest.mark.parametrize(("last_result", "kept"), [({"epoch": 3, NOTHING_LEFT: True}, True), ({"epoch": 1}, False)])
def test_only_a_finished_trials_process_is_kept(monkeypatch, last_result, kept):
    """A trial that ASHA has stopped still trains in its process."""
    monkeypatch.setattr(TuneController, "_maybe_cache_trial_actor", lambda self, trial: True)
    with _tune_settings():
        loop = object.__new__(tune_run.TuneController)
        assert loop._maybe_cache_trial_actor(SimpleNamespace(last_result=last_result)) is kept
    assert tune_run.TuneController is TuneController
