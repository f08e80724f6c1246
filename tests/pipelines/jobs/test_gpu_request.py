"""GPUs that a training asks of the autoscaler: how many, how long, and that the request is withdrawn."""

import pytest

from pipelines import cluster
from pipelines.cluster import ClusterError
from pipelines.jobs import gpus


class FakeCluster:
    """A cluster of `have` GPUs whose autoscaler may start more; each look at it brings one that was requested."""

    def __init__(self, monkeypatch, have, most, *, broken=False):
        self.have, self.broken, self.requests = have, broken, []
        monkeypatch.setattr(gpus, "request_resources", lambda bundles: self.requests.append(len(bundles)))
        monkeypatch.setattr(gpus.ray, "is_initialized", lambda: True)
        monkeypatch.setattr(gpus.ray, "cluster_resources", self.resources)
        monkeypatch.setattr(cluster, "node_resources", lambda: [{"GPU": float(most)}])
        monkeypatch.setattr(gpus, "LOOK_S", 0.0)

    def resources(self):
        if self.requests and self.have < self.requests[-1] and not self.broken:
            self.have += 1
        return {"GPU": float(self.have), "CPU": 8.0}


def test_missing_gpus_are_requested_waited_for_and_withdrawn(monkeypatch):
    made, said = FakeCluster(monkeypatch, 0, 8), []
    with gpus.requested(4, say=said.append):
        assert made.have == 4 and made.requests == [4, 0]
    assert made.requests[-1] == 0
    assert said[0].startswith("waiting for 4 GPUs") and said[-1].startswith("4 GPUs are there")


def test_an_elastic_run_starts_with_the_least_and_keeps_its_request(monkeypatch):
    made = FakeCluster(monkeypatch, 1, 8)
    with gpus.requested((1, 4), say=lambda line: pytest.fail(line)):
        assert made.requests == [4]
    assert made.requests == [4, 0]


def test_the_wait_ends_and_says_what_to_do(monkeypatch):
    made = FakeCluster(monkeypatch, 1, 8, broken=True)
    said = pytest.raises(ClusterError, match=r"expected 4 GPUs within 0 s, got 1; .* or use --workers 1")
    with said, gpus.requested(4, wait_s=0.0, say=lambda line: None):
        pytest.fail("it has not enough")
    assert made.requests == [4, 0]


def test_an_interrupted_wait_withdraws_the_request(monkeypatch):
    made = FakeCluster(monkeypatch, 0, 8)

    def interrupted(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), gpus.requested(4, say=interrupted):
        pass
    assert made.requests == [4, 0]


@pytest.mark.parametrize(("have", "most", "workers"), [(4, 4, 4), (0, 0, 2), (2, 2, 4), (2, 2, None), (0, 0, None)])
def test_nothing_is_requested_that_is_there_or_cannot_come(monkeypatch, have, most, workers):
    made = FakeCluster(monkeypatch, have, most)
    with gpus.requested(workers, say=lambda line: pytest.fail(line)):
        assert made.requests == []


def test_without_a_number_one_gpu_is_asked_for(monkeypatch):
    made = FakeCluster(monkeypatch, 0, 8)
    with gpus.requested(None, say=lambda line: None):
        assert made.requests == [1, 0]
