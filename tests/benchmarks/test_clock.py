"""Times, graphs and peaks of a step. The GPU's calls are replaced by fakes."""

import inspect
import math
import time

import pytest
import torch
from on_gpu import clock
from on_gpu.clock import Clock, clock_of, tf32
from on_gpu.runner import Session
from triton import testing

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def fake_gpu(monkeypatch):
    """PyTorch's memory counters: 100 MB are allocated, and the peak is 350 MB."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350 * 2**20)


def test_a_median_ignores_one_slow_call():
    waits = iter([0.0, 0.2, 0.0, 0.0])
    assert Clock(CPU, repeat_ms=0.0, least=3).median_ms(lambda: time.sleep(next(waits))) < 100


def test_a_gpus_time_is_do_benchs_median(monkeypatch, fake_gpu):
    calls = []
    signature = inspect.signature(testing.do_bench)

    def do_bench(*arguments, **options):
        calls.append(signature.bind(*arguments, **options).arguments)
        return 1.5

    monkeypatch.setattr(testing, "do_bench", do_bench)
    assert Clock(CUDA, repeat_ms=40.0).median_ms(lambda: None) == 1.5
    assert Clock(CUDA, repeat_ms=40.0).median_ms(lambda: time.sleep(0.02)) == 1.5
    short, long = calls
    assert short["return_mode"] == "median" and short["rep"] >= 40
    assert long["rep"] >= 100  # at least five repeats of 20 ms


def test_a_step_that_cannot_be_captured_has_no_graph_time(monkeypatch):
    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(clock, "capture", refuse)
    session, found = Session("cuda", math.inf), Clock(CUDA, repeat_ms=1.0)
    assert found.graph_ms(lambda: None) is None and found.graph_ms(lambda: None) is None
    notes = list(found.notes(session))
    assert len(notes) == 1 and "operation not permitted when stream is capturing" in notes[0]
    assert session.failed == ["a CUDA graph"]


def test_a_captured_step_is_timed(monkeypatch):
    monkeypatch.setattr(clock, "capture", lambda step: step)
    monkeypatch.setattr(Clock, "median_ms", lambda self, step: step())
    found = Clock(CUDA, repeat_ms=1.0)
    assert found.graph_ms(lambda: 0.25) == 0.25
    assert list(found.notes(Session("cuda", math.inf))) == []
    assert Clock(CPU, repeat_ms=1.0).graph_ms(lambda: 0.25) is None


def test_peaks_count_what_a_step_adds(fake_gpu):
    found = Clock(CUDA, repeat_ms=1.0)
    assert found.peak_mb(lambda: None) == 250
    assert found.peak_since_mb(found.allocated_mb()) == 250
    assert Clock(CPU, repeat_ms=1.0).peak_since_mb(0.0) is None


def test_a_rehearsal_runs_each_step_once():
    count = []
    clock_of(Session("cpu", math.inf, rehearsal=True), 100.0).median_ms(lambda: count.append(1))
    assert len(count) == 2  # the warm-up, then the step


def test_tf32_is_switched_back():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(ValueError, match="inside"), tf32(not before[1]):
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (not before[1])
        raise ValueError("inside")
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
