"""What one train worker does: steps over its crops, validates, checkpoints, and - on rank 0 - writes to MLflow.

Runs inside Ray Train, alone or as one of many: the same code on CPUs (gloo) and GPUs (nccl).
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device, prepare_model
from torch import nn

from pipelines import config as configs
from pipelines.loader import CropStream, HeldOut, check_fit, held_out, index_split, model_inputs, training_batches
from pipelines.scoring.pictures import training_sheet
from pipelines.scoring.scores import mean_scores, score_model
from pipelines.training import step
from pipelines.training.meter import EpochMeter, LiveFile
from pipelines.training.progress import SCORE
from pipelines.training.run_log import RunLog, machine_metrics
from preprocessing.schema import SCHEMA_VERSION
from sdan import checkpoint
from sdan.ops.precision import resolve

SELECT_BY = SCORE
"""The best checkpoint has the highest of these: self protocol (what a user gets) against the aligned target (what real
data has, too); against the raw target where no crop could be aligned."""


class Worker:
    """One rank's part of a run."""

    def __init__(self, job: dict[str, Any]) -> None:
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.job = job
        self.config = configs.from_dict(job["config"])
        self.device = get_device()
        torch.set_num_threads(job["threads"])
        if self.config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's own condition for the same bits
            torch.use_deterministic_algorithms(True)
        self.index = index_split(job["shards"], "train")
        check_fit(self.index, self.config)
        wrap = self._distributed if self.world > 1 else (lambda model: model)
        self.training = step.start(self.config, job["init_from"], self.device, wrap, job["vgg"])
        self.log = RunLog(job["tracking_uri"], job["run_id"]) if self.rank == 0 else None
        if self.log:
            self.log.environment(self.world, self.device, resolve(self.config.train.precision, self.device))

    def _distributed(self, model: nn.Module) -> nn.Module:
        return prepare_model(model, parallel_strategy_kwargs=step.bucket_options(self.config.train))

    @cached_property
    def validation(self) -> HeldOut:
        """This rank's part of the held-out crops."""
        crops = held_out(self.job["shards"], "val", self.config, limit=self.config.train.val_crops, align=True)
        return crops.select(range(self.rank, len(crops), self.world))

    @property
    def crops_per_step(self) -> int:
        return self.config.train.batch_per_worker * self.world

    @property
    def crops_per_epoch(self) -> int:
        return self.config.train.crops_per_epoch or len(self.index.paths)

    @property
    def epoch(self) -> int:
        """Whole epochs' worth of crops seen. A step may reach over an epoch's end: none of its crops is lost."""
        return min(self.config.train.epochs, self.training.crops // self.crops_per_epoch)

    def run(self) -> None:
        """Train from the last checkpoint (if any) to the last epoch."""
        previous = ray.train.get_checkpoint()
        if previous is not None:
            with previous.as_directory() as folder:
                self.training.restore(Path(folder))
        else:
            self._report(0, {})
        train = self.config.train
        truth = self.config.loss.self_target == "truth" and self.config.loss.self_reference_weight > 0
        stream = CropStream(
            self.index, train.seed, train.crop_px, train.augment, truth=truth, match_exposure=train.match_exposure
        )
        batches = training_batches(
            stream,
            batch=train.batch_per_worker,
            rank=self.rank,
            world=self.world,
            first_crop=self.training.crops,
            last_crop=train.epochs * self.crops_per_epoch,
            readers=self.job["readers"],
        )
        live = LiveFile(Path(self.job["folder"]), train.epochs, self.crops_per_epoch) if self.rank == 0 else None
        meter, waiting = EpochMeter(), time.perf_counter()
        for batch in batches:
            waited_s = time.perf_counter() - waiting
            before = self.epoch
            rate = step.learning_rate(self.training.step, self.training.crops / self.crops_per_epoch, train)
            inputs = model_inputs(batch, self.config.model, self.device)
            meter.add(step.train_step(self.training, inputs, self.config, rate), waited_s)
            self.training.crops += self.crops_per_step
            self.training.check_finite(train)
            if live:
                live.update(self.training.crops, meter, self.crops_per_step)
            if self.epoch > before:
                self._end_epoch(before, meter.means(self.crops_per_step) | {"learning_rate": rate})
                meter = EpochMeter()
            waiting = time.perf_counter()

    def _end_epoch(self, before: int, metrics: dict[str, float]) -> None:
        """Validate where the epochs since `before` ask for it; several may end in one large step."""
        epoch, every = self.epoch, self.config.train.validate_every
        if epoch // every > before // every or epoch == self.config.train.epochs:
            self._report(epoch, metrics)
        elif self.log:
            self.log.metrics(epoch, metrics)

    def _report(self, epoch: int, metrics: dict[str, float]) -> None:
        """Validate, write to MLflow, hand Ray Train the checkpoint."""
        metrics = metrics | self._validate() | {"workers": float(self.world)}
        if self.log and self.log.metrics(epoch, metrics):
            every = self.config.train.validate_every * self.config.train.picture_every
            if epoch % every == 0 or epoch == self.config.train.epochs:
                self.log.picture(
                    epoch, "validation", training_sheet(self.training.averaged, self.validation, self.device)
                )
        reported = metrics | {"epoch": epoch, "epochs": self.config.train.epochs}
        if self.rank > 0:
            ray.train.report(reported)
            return
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(
                Path(folder) / "checkpoint",
                self.training.averaged,
                config=configs.to_dict(self.config) | {"schema_version": SCHEMA_VERSION},
                scores=metrics,
                trainer_state=self.training.state(),
            )
            ray.train.report(reported, checkpoint=ray.train.Checkpoint.from_directory(str(Path(folder) / "checkpoint")))

    def _validate(self) -> dict[str, float]:
        """Scores of the averaged weights by both protocols, over all ranks' crops."""
        per_crop = score_model(
            self.training.averaged, self.validation, self.device, precision=self.config.train.precision
        )
        if self.world > 1:
            parts: list[dict[str, list[float]]] = [{} for _ in range(self.world)]
            dist.all_gather_object(parts, per_crop)
            names = sorted({name for part in parts for name in part})  # a rank without crops has none
            per_crop = {name: [value for part in parts for value in part.get(name, [])] for name in names}
        means = {f"val_{name}": value for name, value in mean_scores(per_crop).items()}
        aligned = means.get("val_self_aligned_psnr", math.nan)
        return means | {SELECT_BY: aligned if math.isfinite(aligned) else means["val_self_raw_psnr"]}


def train_worker(job: dict[str, Any]) -> None:
    """Ray Train's per-worker function.

    Args:
        job: config (configs.to_dict), shards, folder (the run's), threads, readers, tracking_uri, run_id, init_from (a
            folder or None), vgg (perceptual.load_vgg19's weights, or None).
    """
    worker, context = Worker(job), ray.train.get_context()
    with ExitStack() as stack:
        if context.get_local_rank() == 0:
            stack.enter_context(machine_metrics(job["tracking_uri"], job["run_id"], context.get_node_rank()))
        worker.run()
