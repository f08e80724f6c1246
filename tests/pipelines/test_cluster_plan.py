"""Too many workers for the cluster are refused before anything starts."""

import pytest

from pipelines.cluster import ClusterError, parse_workers, plan_workers


def test_two_workers_on_two_cpus_leave_room_for_readers():
    plan = plan_workers(2, {"CPU": 2.0})
    assert plan.workers * plan.cpus_per_worker < 2
    assert (plan.use_gpu, plan.threads) == (False, 1)


def test_gpus_set_the_default():
    plan = plan_workers(None, {"CPU": 32.0, "GPU": 8.0})
    assert (plan.workers, plan.use_gpu, plan.cpus_per_worker, plan.readers) == (8, True, 1.0, 3)


@pytest.mark.parametrize(("workers", "cpus"), [(1, 1.0), (2, 2.0), (8, 9.0), (5, 6.0), (12, 9.0)])
def test_a_plan_fits_with_its_readers(workers, cpus):
    plan = plan_workers(workers, {"CPU": cpus})
    assert plan.workers * (plan.cpus_per_worker + 0.25) <= cpus


@pytest.mark.parametrize(
    ("workers", "resources", "said"),
    [
        (8, {"CPU": 2.0}, "use --workers 2 or fewer"),
        (0, {"CPU": 2.0}, "at least 1"),
        (4, {"CPU": 16.0, "GPU": 2.0}, "use --workers 2"),
        ((3, 8), {"CPU": 2.0}, "use --workers 2 or fewer"),
    ],
)
def test_too_few_cpus_or_gpus_name_what_fits(workers, resources, said):
    with pytest.raises(ClusterError, match=said):
        plan_workers(workers, resources)


def test_the_lower_end_of_a_range_must_fit():
    plan = plan_workers((1, 4), {"CPU": 1.0})
    assert (plan.workers, plan.cpus_per_worker, plan.threads) == ((1, 4), 0.75, 1)
    assert plan_workers((2, 8), {"CPU": 32.0, "GPU": 4.0}).use_gpu


def test_workers_are_a_number_or_a_range():
    assert parse_workers("4") == parse_workers("4-4") == 4
    assert parse_workers("1-4") == (1, 4)
    for text in ("0", "4-1", "two", "-1", "1-"):
        with pytest.raises(ClusterError, match="--workers"):
            parse_workers(text)
