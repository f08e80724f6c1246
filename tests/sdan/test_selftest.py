"""The operators' self-test, and the choice between Triton and plain PyTorch."""

import logging

import pytest
import torch

from sdan.ops import backend, rows, selftest


def test_old_gpus_and_missing_triton_are_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    backend.why_not_triton.cache_clear()
    with caplog.at_level(logging.WARNING, logger="sdan.ops.backend"):
        assert [backend.why_not_triton(0) for _ in range(3)] == ["this GPU is sm_75, older than sm_80"] * 3
    assert len(caplog.records) == 1
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    backend.why_not_triton.cache_clear()
    assert backend.why_not_triton(0) is None
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    backend.why_not_triton.cache_clear()
    assert backend.why_not_triton(0) == "Triton is not installed"
    backend.why_not_triton.cache_clear()


def test_selftest_reports_every_check():
    checks = {check.name: check for check in selftest()}
    assert checks["squared deformable convolution, CPU"].status == "ok"
    assert checks["packed attention, CPU"].status == "ok"
    gpus = torch.cuda.device_count()
    assert len(checks) == (3 + 3 * gpus if gpus else 4)
    assert all(check.status != "failed" for check in checks.values())


def test_selftest_finds_a_wrong_operator(monkeypatch):
    def equal_weights(self, dtype):
        return torch.full((self.invalid.numel(), 4), 0.25, dtype=dtype)

    monkeypatch.setattr(rows.Corners, "weights_P4", equal_weights)
    assert selftest()[0].status == "failed"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
def test_gpu_selftest_passes():
    assert [check for check in selftest() if check.status == "failed"] == []
