"""What each trial of a sweep gets of a cluster, on fake nodes; Ray is not started."""

import json
from types import SimpleNamespace

import pytest

from pipelines import cluster
from pipelines import config as configs
from pipelines.sweeping import resources
from pipelines.training import run_folder
from tuning.space import SweepError

EIGHT_GPUS = [{"CPU": 32.0, "GPU": 8.0}]


def plan(nodes, **options):
    asked = {"workers": None, "gpus_per_trial": None, "concurrent": None, "num_trials": 8} | options
    return resources.plan_trials(nodes, **asked)


@pytest.mark.parametrize(
    ("options", "at_once", "workers", "gpus"),
    [
        ({}, 8, 1, 1.0),
        ({"gpus_per_trial": 2}, 4, 2, 1.0),
        ({"gpus_per_trial": 0.5, "num_trials": 40}, 16, 1, 0.5),
        ({"workers": 4}, 2, 4, 1.0),
        ({"workers": 2, "gpus_per_trial": 1}, 8, 2, 0.5),
        ({"concurrent": 3}, 3, 1, 1.0),
    ],
)
def test_eight_gpus_are_divided_among_trials(options, at_once, workers, gpus):
    worker_plan, _, got = plan(EIGHT_GPUS, **options)
    assert (got, worker_plan.workers, worker_plan.gpus_per_worker) == (at_once, workers, gpus)
    assert worker_plan.use_gpu and worker_plan.threads * at_once * workers <= 32


def test_gpus_count_more_than_whole_cpus():
    worker_plan, needs, at_once = plan([{"CPU": 6.0, "GPU": 8.0}])
    assert (at_once, worker_plan.cpus_per_worker, needs.cpus) == (8, 0.5, 0.75)


def test_two_cpus_hold_two_trials_if_asked():
    worker_plan, _, at_once = plan([{"CPU": 2.0}])
    assert (at_once, worker_plan.cpus_per_worker) == (1, 1.0)  # a whole CPU where there is room
    worker_plan, _, at_once = plan([{"CPU": 2.0}], concurrent=2)
    assert (at_once, worker_plan.use_gpu, worker_plan.threads, worker_plan.readers) == (2, False, 1, 1)
    assert plan(EIGHT_GPUS, gpus_per_trial=0)[0].use_gpu is False


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        ([{"CPU": 2.0}], {"concurrent": 3}, "--concurrent 3: expected room .*; use --concurrent 2"),
        ([{"CPU": 2.0}], {"gpus_per_trial": 1}, "expected room for one trial .*got 2 CPUs, 0 GPUs"),
        (EIGHT_GPUS, {"gpus_per_trial": 1.5}, "--gpus-per-trial: expected a share of a GPU, or 1, 2, 3"),
        (EIGHT_GPUS, {"gpus_per_trial": -1}, "--gpus-per-trial: expected a share"),
        (EIGHT_GPUS, {"gpus_per_trial": 2, "workers": 1}, "at most one GPU per worker, got 1 .*--workers-per-trial 2"),
    ],
)
def test_impossible_requests_are_one_line(nodes, options, message):
    with pytest.raises(SweepError, match=message) as caught:
        plan(nodes, **options)
    assert "\n" not in str(caught.value)


def test_nodes_that_the_autoscaler_may_start_count():
    """A cluster that starts with its head only."""
    gpu = SimpleNamespace(resources={"CPU": 8, "GPU": 1}, max_count=4)
    head = SimpleNamespace(resources={"CPU": 8, "trial_slot": 64}, max_count=1)
    config = SimpleNamespace(node_group_configs=[head, gpu])
    nodes = [{"CPU": 8.0, "trial_slot": 64.0}, {"CPU": 8.0, "GPU": 1.0}]
    to_come = cluster._nodes_to_come(config, nodes)
    assert to_come == [{"CPU": 8.0, "GPU": 1.0}] * 3
    assert plan(nodes + to_come)[2] == 4
    assert cluster._nodes_to_come(None, nodes) == []


def test_the_rate_of_an_earlier_run_gives_the_time(tmp_path):
    config = configs.demo()
    assert resources.crops_per_s(tmp_path, config, 1) is None
    folder = run_folder.run_folder(tmp_path, "before")
    run_folder.StoredRun(configs.to_dict(config), "shards", "id", None, 1).write(folder)
    line = {"epoch": 1.0, "epochs": 20, "crops_per_s": 32.0}
    (folder / run_folder.PROGRESS).write_text(json.dumps(line) + "\n")
    rate = resources.crops_per_s(tmp_path, configs.override(config, {"loss.align_weight": 3.0}), 1)
    assert rate == 32.0
    assert resources.training_s(config, pairs=5, rate=rate) == 20 * 160 / 32
    assert resources.crops_per_s(tmp_path, config, 2) is None
    assert resources.crops_per_s(tmp_path, configs.override(config, {"model.blocks": 1}), 1) is None


def test_the_command_trains_the_winner_at_full_length():
    config = configs.override(configs.demo(), {"train.epochs": 3, "train.seed": 4, "train.augment": False})
    text = resources.command("SHARDS", config, {"loss.align_weight": 0.25, "model.packing_kernel": 8})
    assert text.startswith("sdan train SHARDS --config demo --set ")
    given = [part for part in text.split(" ") if "=" in part]
    wanted = configs.override(config, {"train.epochs": 20, "loss.align_weight": 0.25, "model.packing_kernel": 8})
    assert configs.chosen("demo", given) == wanted
