"""Publishing needs no Ray; with one, names, kinds and tags are those of METRICS."""

import sys
from typing import ClassVar

import pytest

from pipelines.monitoring import published


class FakeMetric:
    made: ClassVar[dict] = {}

    def __init__(self, name, description, tag_keys):
        self.tag_keys, self.values = tag_keys, []
        FakeMetric.made[name] = self

    def set(self, value, tags):
        assert set(tags) == set(self.tag_keys)
        self.values.append(value)

    inc = set


@pytest.fixture
def connected(monkeypatch):
    """A Ray that is connected, whose metrics keep what they get."""
    import ray
    from ray.util import metrics

    context = type("Context", (), {"get_job_id": lambda self: "1"})()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(metrics, "Gauge", FakeMetric)
    monkeypatch.setattr(metrics, "Counter", FakeMetric)
    monkeypatch.setattr(published, "_MADE", {})
    monkeypatch.setattr(FakeMetric, "made", {})
    return FakeMetric.made


def test_without_ray_nothing_happens(monkeypatch):
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    published.gauge("sdan_train_psnr_db", 30.0, run="a")
    published.pair_finished("written", 40)
    assert "ray" not in sys.modules


def test_a_pair_counts_itself_and_its_tiles(connected):
    published.pair_finished("written", 40)
    published.pair_finished("quarantined", 0)
    assert connected["sdan_preprocess_pairs"].values == [1.0, 1.0]
    assert connected["sdan_preprocess_tiles"].values == [40.0]


def test_a_metric_is_made_once_per_session(connected):
    published.gauge("sdan_train_psnr_db", 30.0, run="a")
    published.gauge("sdan_train_psnr_db", 31.0, run="b")
    assert connected["sdan_train_psnr_db"].values == [30.0, 31.0]


def test_a_counter_is_not_set():
    with pytest.raises(TypeError, match="expected a counter"):
        published.gauge("sdan_preprocess_pairs", 1.0, outcome="written")


def test_the_service_publishes_its_queue(connected, tmp_path):
    import asyncio
    from types import SimpleNamespace

    from pipelines.serving.desk import Desk
    from pipelines.serving.limits import SEATS, Limits

    async def enter():
        desk = Desk(SimpleNamespace(), Limits(), tmp_path)
        places = [desk.place(None) for _ in range(SEATS + 1)]
        for place in places:
            place.__enter__()
        for place in places:
            place.__exit__(None, None, None)

    asyncio.run(enter())
    assert max(connected["sdan_serve_waiting"].values) == 1 and connected["sdan_serve_waiting"].values[-1] == 0
    assert max(connected["sdan_serve_in_work"].values) == SEATS and connected["sdan_serve_in_work"].values[-1] == 0
    assert len(connected["sdan_serve_photographs"].values) == SEATS + 1
