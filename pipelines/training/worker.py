"""One train worker: steps over its crops, validates, checkpoints, and on rank 0 writes to MLflow.

Runs inside Ray Train, alone or as one of many; the same code serves CPUs (gloo) and GPUs (nccl). `TrainWorker.run` is
the training loop: read it first, then step.py.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device, prepare_model
from torch import Tensor, nn

from pipelines import config as configs
from pipelines.config import ExperimentConfig
from pipelines.loader import model_inputs, training_batches, training_stream
from pipelines.monitoring import published
from pipelines.scoring.held_out import HeldOut, held_out
from pipelines.scoring.pictures import training_sheet
from pipelines.scoring.scores import PerCrop, mean_scores, score_bicubic, score_model
from pipelines.training import step
from pipelines.training.meter import EpochMeter, LiveFile
from pipelines.training.progress import SELECT_BY
from pipelines.training.run_folder import HELD_OUT, RunShards
from pipelines.training.run_log import RunLog, machine_metrics
from pipelines.training.verdict import BICUBIC
from preprocessing.schema import SCHEMA_VERSION
from sdan import checkpoint
from sdan.ops.precision import common_plan


@dataclass(frozen=True)
class TrainJob:
    """What the driver hands to every worker, and again to every restart."""

    config: ExperimentConfig
    shards: RunShards
    """The pairs to train and validate on, as the driver listed them when the run was first started."""
    folder: str
    """The run's folder; workers on other machines may not see it."""
    threads: int
    """PyTorch's intra-op threads per worker."""
    readers: int
    """Tasks that read crops for each worker at the same time."""
    tracking_uri: str = field(repr=False)
    """It may hold a password, and Ray's dashboard shows the text of this object."""
    run_id: str
    """Of the MLflow run."""
    init_from: str | None
    """A checkpoint folder whose weights to start from."""
    vgg: dict[str, Tensor] | None = field(repr=False)
    """features.load_features' weights, for a loss that needs them."""


class TrainWorker:
    """One rank's part of a run."""

    def __init__(self, job: TrainJob) -> None:
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.job = job
        self.index = job.shards.train
        self.device = get_device()
        self.config = self._as_all_ranks(job.config)
        torch.set_num_threads(job.threads)
        if self.config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs this to be deterministic
            torch.use_deterministic_algorithms(True)
        wrap = self._distributed if self.world > 1 else (lambda model: model)
        self.training = step.start(self.config, job.init_from, self.device, wrap, job.vgg)
        self.log = RunLog(job.tracking_uri, job.run_id, Path(job.folder)) if self.rank == 0 else None
        self.started = self.log.environment(self.world, self.training.plan) if self.log else ""

    def _as_all_ranks(self, config: ExperimentConfig) -> ExperimentConfig:
        """The config with precision, layout and TF32 that all ranks can use; checkpoints keep the job's own values."""
        own = step.plan_of(config.train, self.device)
        plans = [own] * self.world
        if self.world > 1:
            dist.all_gather_object(plans, own)
        plan = common_plan(plans, own)
        train = replace(config.train, precision=plan.precision, layout=plan.layout, tf32=plan.tf32)
        return replace(config, train=train)

    def _distributed(self, model: nn.Module) -> nn.Module:
        return prepare_model(model, parallel_strategy_kwargs=step.bucket_options(self.config.train))

    @cached_property
    def validation(self) -> HeldOut:
        """This rank's part of the held-out crops."""
        crops = held_out(self.job.shards.val, self.config, limit=self.config.train.val_crops, align=True)
        return crops.select(range(self.rank, len(crops), self.world))

    @property
    def crops_per_step(self) -> int:
        """Crops that all workers together consume in one step."""
        return self.config.train.batch_per_worker * self.world

    @property
    def crops_per_epoch(self) -> int:
        """Crops in an epoch; by default one per pair."""
        return self.config.train.crops_per_epoch or len(self.index.paths)

    @property
    def epoch(self) -> int:
        """Completed epochs. A step may extend past the end of an epoch; none of its crops is dropped."""
        return min(self.config.train.epochs, self.training.crops // self.crops_per_epoch)

    def run(self) -> None:
        """Train from the last checkpoint (if any) to the last epoch."""
        resumed = self._restore()
        if self.rank == 0:
            print(self.started, flush=True)  # to the worker's log; the driver shows live.json's copy
        self._stage("reading the held-out crops")
        _ = self.validation
        if not resumed:
            self._report(0, self._bicubic())  # before the first step
        self._stage("waiting for the first batch")
        meter, waiting = EpochMeter(), time.perf_counter()
        for batch in self._batches():
            waited_s = time.perf_counter() - waiting
            before = self.epoch
            rate = step.learning_rate(self.training.step, self.training.crops / self.crops_per_epoch, self.config.train)
            inputs = model_inputs(batch, self.config.model, self.device)
            meter.add(step.train_step(self.training, inputs, self.config, rate), waited_s)
            self.training.crops += self.crops_per_step
            self.training.check_finite(self.config.train)
            if self.live:
                self.live.update(self.training.crops, meter, self.crops_per_step)
            if self.epoch > before:
                self._end_epoch(before, meter.means(self.crops_per_step) | {"learning_rate": rate})
                meter = EpochMeter()
            waiting = time.perf_counter()

    @cached_property
    def live(self) -> LiveFile | None:
        """Rank 0's file for the line of progress; None on other ranks."""
        train = self.config.train
        if self.rank > 0:
            return None
        return LiveFile(Path(self.job.folder), train.epochs, self.crops_per_epoch, train.validate_every, self.started)

    def _stage(self, stage: str) -> None:
        if self.live:
            self.live.stage(self.training.crops, stage)

    def _restore(self) -> bool:
        """Restore the last checkpoint; False if there is none yet."""
        previous = ray.train.get_checkpoint()
        if previous is None:
            return False
        with previous.as_directory() as folder:
            self.training.restore(Path(folder))
        return True

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        train = self.config.train
        return training_batches(
            training_stream(self.index, self.config),
            batch=train.batch_per_worker,
            rank=self.rank,
            world=self.world,
            first_crop=self.training.crops,
            last_crop=train.epochs * self.crops_per_epoch,
            readers=self.job.readers,
        )

    def _end_epoch(self, before: int, metrics: dict[str, float]) -> None:
        """Validate and checkpoint if the epochs since `before` include a validation (one step may end several)."""
        epoch, every = self.epoch, self.config.train.validate_every
        if epoch // every > before // every or epoch == self.config.train.epochs:
            self._report(epoch, metrics)
        elif self.log:
            self.log.metrics(epoch, metrics)

    def _report(self, epoch: int, metrics: dict[str, float]) -> None:
        """Validate, write to MLflow, and hand the checkpoint to Ray Train."""
        self._stage("validating")
        began = time.perf_counter()
        self._validated(epoch, metrics)
        if self.live:
            self.live.time_left.validated(time.perf_counter() - began)

    def _validated(self, epoch: int, metrics: dict[str, float]) -> None:
        metrics = metrics | self._validate() | {"workers": float(self.world)}
        if self.rank == 0:
            published.gauge("sdan_train_psnr_db", metrics[SELECT_BY], run=Path(self.job.folder).name)
        if self.log and self.log.metrics(epoch, metrics):
            every = self.config.train.validate_every * self.config.train.picture_every
            if epoch % every == 0 or epoch == self.config.train.epochs:
                sheet = training_sheet(self.training.averaged, self.validation, self.training.plan)
                self.log.picture(epoch, "validation", sheet)
        reported = metrics | {"epoch": epoch, "epochs": self.config.train.epochs}
        if self.rank > 0:
            ray.train.report(reported)
            return
        with tempfile.TemporaryDirectory() as folder:
            saved = checkpoint.save(
                Path(folder) / "checkpoint",
                self.training.averaged,
                config=configs.to_dict(self.job.config) | {"schema_version": SCHEMA_VERSION},
                scores=metrics,
                trainer_state=self.training.state(),
            )
            (saved / HELD_OUT).write_text(json.dumps(self.per_crop))
            ray.train.report(reported, checkpoint=ray.train.Checkpoint.from_directory(str(saved)))

    def _validate(self) -> dict[str, float]:
        """Scores of the averaged weights by both protocols, over all ranks' crops."""
        scores = self._of_all_ranks(score_model(self.training.averaged, self.validation, self.training.plan))
        means = {f"val_{name}": value for name, value in mean_scores(scores).items()}
        target = "aligned" if math.isfinite(means.get("val_self_aligned_psnr", math.nan)) else "raw"
        selected = zip(self._crop_names, scores[f"self_{target}_psnr"], strict=True)
        self.per_crop = {name: value for name, value in selected if math.isfinite(value)}
        return means | {SELECT_BY: means[f"val_self_{target}_psnr"]}

    def _bicubic(self) -> dict[str, float]:
        """PSNR of the bicubic enlargement of the picture whose tones the network learns (verdict.py)."""
        has_rendering = "lr_render" in self.validation.batch
        source = "rendering" if self.config.train.look == "rendering" and has_rendering else "camera"
        scores = self._of_all_ranks(score_bicubic(self.training.averaged, self.validation, self.device, source))
        return {f"{BICUBIC}_{name}": value for name, value in mean_scores(scores).items() if name.endswith("_psnr")}

    @cached_property
    def _crop_names(self) -> list[str]:
        """Names of all ranks' crops, in the order of `_of_all_ranks`."""
        parts: list[tuple[str, ...]] = [self.validation.names] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, self.validation.names)
        return [name for part in parts for name in part]

    def _of_all_ranks(self, per_crop: PerCrop) -> PerCrop:
        """The scores of all ranks' crops, rank by rank."""
        if self.world == 1:
            return per_crop
        parts: list[PerCrop] = [{} for _ in range(self.world)]
        dist.all_gather_object(parts, per_crop)
        names = sorted({name for part in parts for name in part})  # a rank without crops has no scores
        return {name: [value for part in parts for value in part.get(name, [])] for name in names}


def train_worker(config: dict[str, TrainJob]) -> None:
    """Ray Train's per-worker function.

    Args:
        config: {"job": TrainJob}; Ray Train passes a dictionary.
    """
    job = config["job"]
    worker, context = TrainWorker(job), ray.train.get_context()
    with ExitStack() as stack:
        if context.get_local_rank() == 0:
            stack.enter_context(machine_metrics(job.tracking_uri, job.run_id, context.get_node_rank()))
        worker.run()
        if worker.log:
            worker.log.close()
