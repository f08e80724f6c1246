"""Means of an epoch with skipped steps, and live.json."""

import json
import math

import pytest
import torch

from pipelines.training.meter import EpochMeter, LiveFile, TimeLeft
from pipelines.training.progress import describe
from pipelines.training.step import NotFiniteError


def terms(loss, norm=1.0, skipped=0.0):
    return {name: torch.tensor(v) for name, v in (("loss", loss), ("grad_norm", norm), ("skipped", skipped))}


def test_skipped_steps_are_counted_but_not_averaged():
    meter = EpochMeter()
    for step in (terms(1.0), terms(math.nan, math.nan, 1.0), terms(3.0), terms(math.inf, 2.0, 1.0)):
        meter.add(step, 0.0)
    means = meter.means(crops_per_step=2)
    assert (means["train_loss"], means["train_grad_norm"], means["skipped_steps"]) == (2.0, 1.0, 2.0)
    assert means["crops_per_s"] > 0
    assert "train_skipped" not in means


def test_steps_skipped_by_the_loss_scaler_are_not_counted():
    meter = EpochMeter()
    for step in (terms(1.0), terms(3.0, math.inf)):
        meter.add(step, 0.0)
    means = meter.means(1)
    assert (means["train_loss"], means["train_grad_norm"], means["skipped_steps"]) == (2.0, 0.5, 0.0)


def test_an_epoch_of_skipped_steps_ends_the_run():
    meter = EpochMeter()
    meter.add(terms(math.nan, skipped=1.0), 0.0)
    assert meter.loss is None
    with pytest.raises(NotFiniteError, match="all 1 steps of an epoch"):
        meter.means(1)


def test_the_live_file_has_epoch_loss_and_time_left(tmp_path):
    meter = EpochMeter()
    meter.add(terms(0.5), 0.0)
    live = LiveFile(tmp_path, epochs=4, crops_per_epoch=10)
    live.update(15, meter, crops_per_step=5)
    now = json.loads((tmp_path / "live.json").read_text())
    assert (now["epoch"], now["epochs"], now["loss"], now["left_s"]) == (1.5, 4, 0.5, None)
    live.update(20, meter, 5)  # too soon
    assert json.loads((tmp_path / "live.json").read_text()) == now
    live.stage(20, "validating")
    shown = describe(json.loads((tmp_path / "live.json").read_text()), {})
    assert shown == "epoch 2.0/4, validating"
    live.update(25, meter, 5)  # at once after a stage
    now = json.loads((tmp_path / "live.json").read_text())
    assert now["epoch"] == 2.5 and now["left_s"] > 0 and "stage" not in now
    LiveFile(tmp_path / "elsewhere", 4, 10).update(15, meter, 5)  # a folder on another machine
    assert not (tmp_path / "elsewhere").exists()


def test_the_live_file_says_how_the_run_computes_at_once(tmp_path):
    LiveFile(tmp_path, 4, 10, started="computes in fp32, channels_last").stage(15, "waiting for the first batch")
    now = json.loads((tmp_path / "live.json").read_text())
    assert now["started"] == "computes in fp32, channels_last" and now["epoch"] == 1.5
    assert now["loss"] is None and now["crops_per_s"] is None and now["left_s"] is None
    assert describe(now, {}) == "epoch 1.5/4, waiting for the first batch"


def test_the_time_left_counts_the_validations():
    """10 epochs of 20 crops: 60 s for the first step, then 1 s per crop, and 30 s for each of 5 validations."""
    left = TimeLeft(epochs=10, crops_per_epoch=20, validate_every=2)
    left.validated(30.0)  # before the first step
    left.step(5, clock=60.0)
    assert left.left_s(5, 60.0) is None
    left.step(40, clock=95.0)
    assert left.left_s(25, 80.0) == pytest.approx(175 + 5 * 30)
    left.validated(30.0)
    assert left.left_s(80, 165.0) == pytest.approx(120 + 3 * 30)
    assert TimeLeft(3, 20, 2).left_s(0, 0.0) is None
