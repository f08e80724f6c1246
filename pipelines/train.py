"""`sdan train`: a run from shards to a registered model, through Ray Train.

A run is a folder `data/runs/NAME`: `run.json` (what it is), Ray Train's own state and checkpoints (the latest and the
best), and at the end `model/`, the best checkpoint. Started again with resume=True it goes on from the latest one, with
as many workers as there are now: progress is counted in crops, not in steps.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import torch
from mlflow.tracking import MlflowClient
from ray.train import UserCallback
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.v2.api.config import RunConfig as RayRunConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer
from torch import Tensor

from pipelines import cluster, registry
from pipelines import config as configs
from pipelines.config import ConfigError, RunConfig
from pipelines.loader import ShardIndex, check_fit, index_split
from pipelines.training.failures import StopWhereRetryingIsVain
from pipelines.training.progress import PROGRESS, ProgressFile, ProgressLine
from pipelines.training.run_log import log_data
from pipelines.training.worker import SELECT_BY, train_worker
from sdan import checkpoint
from sdan.network import SDAN
from sdan.ops.precision import emulation_warning
from sdan.perceptual import load_vgg19
from tuning.trial import reason_of

EXPERIMENT = "sdan"
CHANGEABLE = (
    "train.epochs",
    "train.learning_rate",
    "train.learning_rate_floor",
    "train.grad_clip",
    "train.max_skipped",
    "train.precision",
    "train.layout",
    "train.compile",
    "train.accumulate",
    "train.picture_every",
)
"""What a resumed run may change: neither the network nor which crops it sees."""
LOOK_FOR_WORKERS_S = 30.0
"""How often an elastic run looks whether more workers have a place; growing costs what was trained since the last
checkpoint."""
MAX_START_FAILURES = 60
"""How often the workers may fail to start, of a minute each: so long a lost machine's replacement may take."""


class TrainError(ValueError):
    """A run that cannot start; the message says what to do."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    name: str
    folder: Path
    model: Path
    """The best checkpoint's folder."""
    run_id: str
    scores: dict[str, float]
    """The best checkpoint's validation scores."""
    version: str | None
    """Its version in the registry."""
    champion: bool
    """Whether it became the champion: the first model of its name does."""


@dataclass(frozen=True)
class _Run:
    """run.json: what a resumed run must know."""

    config: dict[str, Any]
    shards: str
    run_id: str
    init_from: str | None
    workers: int | tuple[int, int]
    storage: str | None = None

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / "run.json.partial"
        aside.write_text(json.dumps(self.__dict__, indent=2))
        aside.replace(folder / "run.json")


def newest_run(data: Path) -> str:
    """The name of the youngest run that has not finished."""
    runs = [path for path in (data / "runs").glob("*/run.json") if not (path.parent / "model").exists()]
    if not runs:
        raise TrainError(
            f"--resume: an unfinished run expected in {data / 'runs'}, got none; "
            "start one without --resume, or --name one"
        )
    return max(runs, key=lambda path: path.stat().st_mtime).parent.name


def stored_run(data: Path, name: str | None) -> tuple[str, RunConfig]:
    """(name, config) of the run to resume: `name`, or the newest unfinished one.

    Raises:
        TrainError: no such run, or a damaged run.json.
    """
    name = name or newest_run(data)
    return name, configs.from_dict(_read_run(data / "runs" / name).config)


def _read_run(folder: Path) -> _Run:
    path = folder / "run.json"
    if not path.exists():
        raise TrainError(f"--resume --name {folder.name}: a run expected in {folder}, got none")
    try:
        stored = json.loads(path.read_text())
        workers = stored["workers"]
        return _Run(**stored | {"workers": tuple(workers) if isinstance(workers, list) else workers})
    except (ValueError, TypeError, KeyError) as error:
        raise TrainError(f"{path}: a run's description expected, cannot be read ({error}); start a new run") from error


def train(
    shards: str,
    config: RunConfig,
    *,
    data: Path,
    workers: cluster.Workers | None = None,
    name: str | None = None,
    resume: bool = False,
    storage: str | None = None,
    init_from: Path | None = None,
    vgg_weights: Path | None = None,
    run_id: str | None = None,
    callbacks: Sequence[UserCallback] = (),
    register: str | None = registry.MODEL,
    progress: bool = True,
    max_failures: int = 3,
) -> TrainResult:
    """Train `config` on `shards`.

    Args:
        data: where runs, MLflow's database and artifacts live.
        workers: DDP ranks, or the least and the most of them: the run then grows and shrinks with the cluster. None:
            one per GPU, or one (a resumed run: as before).
        name: the run's folder; None: from the config and the time.
        resume: go on with the run `name` from its latest checkpoint; shards must be its own, and of the config only
            values of CHANGEABLE may differ.
        storage: an s3:// URI (or a folder that all machines share) for Ray Train's state and checkpoints; None: the
            run's folder.
        init_from: a checkpoint folder whose weights to start from.
        vgg_weights: a torchvision vgg19 state dict, for a loss that compares its features; None: through torchvision.
        run_id: an MLflow run that exists already (a sweep's child); None: one is made.
        callbacks: Ray Train callbacks, called in the controller after each report.
        register: the registered model that the best checkpoint becomes a version of; None: none.
        max_failures: how often training goes on from the last checkpoint after a worker or its machine was lost.

    Raises:
        TrainError, ConfigError, ShardsError, PerceptualError, ClusterError: one clear line, before anything starts.
    """
    if "://" not in shards:
        shards = str(Path(shards).resolve())  # train workers have working folders of their own
    index = index_split(shards, "train")
    check_fit(index, config)
    held_out = index_split(shards, "val")
    folder = _folder(data, config, name, resume)
    stored = _read_run(folder) if resume else None
    if stored is not None:
        _check_resumed(stored, config, shards)
        workers = workers or stored.workers
    if init_from is not None and checkpoint.load(init_from).model.config != config.model:
        raise ConfigError(f"{init_from}: the same model.* values expected as in that checkpoint; leave them")
    vgg = load_vgg19(vgg_weights) if config.loss.needs_vgg else None
    cluster.start_ray()
    plan = cluster.plan_workers(workers)
    slow = None if plan.use_gpu else emulation_warning(config.train.precision, torch.device("cpu"))
    if slow:
        logging.getLogger(__name__).warning(slow)
    tracking_uri = registry.default_tracking_uri(data)
    run = _record(folder, stored, config, shards, run_id, init_from, plan, storage, tracking_uri)
    if stored is None:
        log_data(tracking_uri, run.run_id, [index, held_out])
    client = MlflowClient(tracking_uri=tracking_uri)
    client.update_run(run.run_id, status="RUNNING")
    trainer = _trainer(folder, run, plan, vgg, tracking_uri, callbacks, max_failures)
    status = "KILLED"
    try:
        with ProgressLine(folder, config.train.epochs, enabled=progress):
            result = trainer.fit()
        finished = _finish(folder, run, result, tracking_uri, register, index)
        status = "FINISHED"
    except TrainingFailedError as error:
        status = "FAILED"
        raise TrainError(
            f"run {folder.name} failed: {reason_of(error)}; mend that and go on with --resume --name {folder.name}"
        ) from error
    finally:
        if run_id is None:  # a sweep ends its children itself
            client.set_terminated(run.run_id, status)
    return finished


def with_network_of(model: Path, config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """`config` with the network that the checkpoint folder `model` holds, for training that starts from its weights.

    Args:
        overrides: dotted names that `--set` has changed in `config` already.

    Raises:
        ConfigError: an override that would change that network, or crops that do not suit it.
    """
    stored = checkpoint.load(model).model
    if not isinstance(stored, SDAN):
        raise ConfigError(f"--init {model}: an SDAN expected, got a {type(stored).__name__}")
    network = stored.config
    for key in overrides:
        section, _, name = key.partition(".")
        if section == "model" and getattr(config.model, name) != getattr(network, name):
            raise ConfigError(
                f"--set {key}: a model that is started from keeps its network ({key}={getattr(network, name)}); "
                "leave it, or leave --init"
            )
    return replace(config, model=network)


def _record(
    folder: Path,
    stored: _Run | None,
    config: RunConfig,
    shards: str,
    run_id: str | None,
    init_from: Path | None,
    plan: cluster.WorkerPlan,
    storage: str | None,
    tracking_uri: str,
) -> _Run:
    """Write run.json and the MLflow run's params; from here on there is something to resume."""
    registry.prepare_database(tracking_uri)
    if stored is not None:
        run = replace(stored, config=configs.to_dict(config), workers=plan.workers)
    else:
        run_id = run_id or registry.create_run(tracking_uri, EXPERIMENT, folder.name)
        start_from = str(init_from.resolve()) if init_from else None
        run = _Run(configs.to_dict(config), shards, run_id, start_from, plan.workers, storage)
    registry.log_config(tracking_uri, run.run_id, configs.flatten(config) | {"shards": shards})
    run.write(folder)
    return run


def _folder(data: Path, config: RunConfig, name: str | None, resume: bool) -> Path:
    if resume:
        return data / "runs" / (name or newest_run(data))
    name = name or f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise TrainError(f"--name: letters, digits, '.', '_' and '-' expected, got {name!r}")
    folder = data / "runs" / name
    if (folder / "run.json").exists():
        raise TrainError(f"--name {name}: a new name expected, {folder} exists; add --resume to go on with it")
    return folder


def _check_resumed(stored: _Run, config: RunConfig, shards: str) -> None:
    if shards != stored.shards:
        raise TrainError(f"--resume: the run's own shards expected, {stored.shards}, got {shards}")
    before, now = configs.flatten(configs.from_dict(stored.config)), configs.flatten(config)
    for key, value in before.items():
        if now[key] != value and key not in CHANGEABLE:
            raise TrainError(
                f"--resume: {key} = {value} expected, as the run was started, got {now[key]}; "
                f"only {', '.join(CHANGEABLE)} may change"
            )


def _trainer(
    folder: Path,
    run: _Run,
    plan: cluster.WorkerPlan,
    vgg: dict[str, Tensor] | None,
    tracking_uri: str,
    callbacks: Sequence[UserCallback],
    max_failures: int,
) -> TorchTrainer:
    job = {
        "config": run.config,
        "shards": run.shards,
        "folder": str(folder.resolve()),
        "threads": plan.threads,
        "readers": plan.readers,
        "tracking_uri": tracking_uri,
        "run_id": run.run_id,
        "init_from": run.init_from,
        "vgg": vgg,
    }
    return TorchTrainer(
        train_worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=plan.workers,
            elastic_resize_monitor_interval_s=LOOK_FOR_WORKERS_S,
            use_gpu=plan.use_gpu,
            resources_per_worker={"CPU": plan.cpus_per_worker} | ({"GPU": 1} if plan.use_gpu else {}),
        ),
        run_config=RayRunConfig(
            name=folder.name,
            storage_path=run.storage or str(folder.parent.resolve()),
            failure_config=FailureConfig(
                max_failures=max_failures, controller_failure_limit=min(max_failures, 1) * MAX_START_FAILURES
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute=SELECT_BY),
            callbacks=[*callbacks, ProgressFile(folder / PROGRESS), StopWhereRetryingIsVain()],
        ),
    )


def _finish(
    folder: Path, run: _Run, result: ray.train.Result, tracking_uri: str, register: str | None, index: ShardIndex
) -> TrainResult:
    """Put the best checkpoint at `model/` (without the trainer's state) and register it."""
    if not result.best_checkpoints:
        raise TrainError(f"{folder}: at least one checkpoint expected, got none; see Ray's logs")
    best, metrics = max(result.best_checkpoints, key=lambda pair: pair[1].get(SELECT_BY, float("-inf")))
    model = folder / "model"
    with best.as_directory() as source:
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(source, model, ignore=shutil.ignore_patterns("trainer.pt", ".*"))
    scores = {name: float(value) for name, value in metrics.items() if name.startswith("val_")}
    version, champion = None, False
    if register:
        version = registry.register_model(tracking_uri, run.run_id, model, register)
        registry.remember_shards(tracking_uri, index.digest, register)
        if registry.get_champion(tracking_uri, register) is None:
            registry.set_champion(tracking_uri, version, register)
            champion = True
    return TrainResult(folder.name, folder, model, run.run_id, scores, version, champion)
