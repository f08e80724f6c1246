"""Means of an epoch with skipped steps, and live.json."""

import json
import math

import pytest
import torch

from pipelines.training.meter import EpochMeter, LiveFile
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
    assert (now["epoch"], now["epochs"], now["loss"]) == (1.5, 4, 0.5)
    assert now["left_s"] == pytest.approx(25 / now["crops_per_s"])
    live.update(20, meter, 5)  # too soon
    assert json.loads((tmp_path / "live.json").read_text()) == now
    LiveFile(tmp_path / "elsewhere", 4, 10).update(15, meter, 5)  # a folder on another machine
    assert not (tmp_path / "elsewhere").exists()


def test_the_live_file_says_how_the_run_computes_at_once(tmp_path):
    LiveFile(tmp_path, 4, 10, "computes in fp32, channels_last").update(15, EpochMeter(), 5)
    now = json.loads((tmp_path / "live.json").read_text())
    assert now["started"] == "computes in fp32, channels_last" and now["epoch"] == 1.5
    assert now["loss"] is None and now["crops_per_s"] is None and now["left_s"] is None
    assert describe(now, {}) == "epoch 1.5/4"
