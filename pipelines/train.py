"""`sdan train`: from shards to a registered model, through Ray Train.

`train` checks everything, records the run (folder and MLflow), lets Ray Train run pipelines/training/worker.py, and
registers the best checkpoint. A resumed run continues from its latest checkpoint with as many workers as there are now:
progress is counted in crops, not in steps.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray.train
import torch
from mlflow.exceptions import MlflowException
from ray.exceptions import RayActorError, RaySystemError
from ray.train import UserCallback
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer
from torch import Tensor

from pipelines import cluster, registry
from pipelines import config as configs
from pipelines.config import ConfigError, ExperimentConfig
from pipelines.jobs import gpus
from pipelines.loader import (
    ShardIndex,
    alignment_shares,
    check_fit,
    index_split,
    require_unchanged,
    with_curve_of,
    with_new,
)
from pipelines.registry import RegistryError
from pipelines.training import run_folder
from pipelines.training.failures import StopOnPermanentError
from pipelines.training.graph import check_graph
from pipelines.training.progress import SELECT_BY, ProgressFile, ProgressLine
from pipelines.training.rendezvous import LocalTorchConfig
from pipelines.training.run_folder import RunShards, StoredRun
from pipelines.training.run_log import deliver, log_data, log_gains
from pipelines.training.seen import log_pairs
from pipelines.training.verdict import Verdict, judge
from pipelines.training.worker import TrainJob, train_worker
from preprocessing.storage import held, require_no_password
from sdan import checkpoint
from sdan.network import SDAN
from sdan.ops.precision import slow_choice
from sdan.perceptual.features import VGG16, load_features, network_name
from sdan.perceptual.st_lpips import load_st_lpips
from tuning.trial import reason_of

CHANGEABLE = (
    "train.epochs",
    "train.learning_rate",
    "train.learning_rate_floor",
    "train.grad_clip",
    "train.max_skipped",
    "train.precision",
    "train.layout",
    "train.tf32",
    "train.compile",
    "train.cuda_graph",
    "train.accumulate",
    "train.picture_every",
)
"""The values that a resumed run may change. They affect neither the network nor which crops it sees."""
RESIZE_CHECK_S = 30.0
"""How often an elastic run checks whether more workers fit. Growing repeats the steps since the last checkpoint."""
START_LIMIT_S = 3600.0
"""For how long starting the workers is tried again. This leaves time to replace a lost machine."""
START_S, ELASTIC_START_S = 60.0, 20.0
"""How long one start waits for room for the workers, and that of an elastic run. Ray still counts a machine that was
just lost, so the first start after that asks for too many; the next one takes the workers that are left."""


class _Trainer(TorchTrainer):
    """Ray's trainer without a handler and actors that a run of SDAN does not need.

    Ray's handler of Ctrl-C aborts the run for up to 14 seconds and then exits, which hides the interrupt from its
    caller; the last checkpoint is safe without that. SDAN reads its crops itself, so no actor has to split datasets. A
    Ray that ends with this process needs no actor that frees the workers' resources when the driver is killed; on a
    cluster, and in a trial, which may die while the sweep goes on, that actor stays. A trial of a sweep is an actor
    itself, in which the controller can run. Each actor less is a process less that loads Ray Train for seconds while
    the workers wait.
    """

    def _initialize_and_run_controller(self, **options: Any) -> ray.train.Result:
        if ray.get_runtime_context().get_actor_id() is None:
            return super()._initialize_and_run_controller(**options)
        controller = TrainController(**options)
        asyncio.run(controller.run())
        return controller.get_result()

    def _register_sigint_handler(self, controller: Any) -> None:
        pass

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        needless = (DatasetsCallback, PlacementGroupCleanerCallback) if cluster.is_our_own() else DatasetsCallback
        return [one for one in super()._create_default_callbacks() if not isinstance(one, needless)]


class TrainError(ValueError):
    """A run that cannot start; the message says what to do."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    name: str
    folder: Path
    model: Path
    """The folder of the checkpoint that was kept."""
    run_id: str
    scores: dict[str, float]
    """Its validation scores."""
    version: str | None
    """Its version in the registry; None if it was not registered."""
    champion: bool
    """Whether it became the champion, as the first model of a registry does."""
    verdict: Verdict
    """What it must beat to be registered."""


@dataclass(frozen=True)
class Choice:
    """The options of `sdan train` after --config, --set, --seed, --init, --resume and --name were combined."""

    config: ExperimentConfig
    name: str | None
    """None: a new name is made from the config and the time."""
    init_from: Path | None


def choose(
    data: Path,
    *,
    config: str | None = None,
    assignments: Iterable[str] = (),
    seed: int | None = None,
    init: str | None = None,
    name: str | None = None,
    resume: bool = False,
) -> Choice:
    """Combine the options that decide what is trained.

    A new run takes --config (default srraw_4x), then --set and --seed, then the network of --init. A resumed run takes
    its stored config, then --set and --seed.

    Args:
        config: a name of configs.CONFIGS; with `resume` only the run's own.
        assignments: --set values, "KEY=VALUE".
        init: a model URI (registry.resolve_model) whose weights and network to start from.

    Raises:
        TrainError, ConfigError, RunFolderError, RegistryError: options that contradict each other, or an unknown name.
    """
    changes = configs.parse_assignments(assignments)
    if seed is not None:
        changes["train.seed"] = str(seed)
    chosen = configs.override(configs.named(config or configs.DEFAULT), changes)
    if init and resume:
        raise TrainError("--init: expected no --init with --resume, got both; a resumed run has its own weights")
    if resume:
        folder = run_folder.run_folder(data, name) if name else run_folder.newest_unfinished(data)
        stored = configs.from_dict(run_folder.read_run(folder).config)
        if config not in (None, stored.name):
            raise TrainError(f"--config: expected the run's own config {stored.name}, got {config}; leave it out")
        return Choice(configs.override(stored, changes), folder.name, None)
    if init:
        model = registry.resolve_model(registry.default_tracking_uri(data), init)
        return Choice(with_network_of(model, chosen, changes), name, model)
    return Choice(chosen, name, None)


def with_network_of(model: Path, config: ExperimentConfig, overrides: Iterable[str]) -> ExperimentConfig:
    """`config` with the network of the checkpoint folder `model`, to start training from its weights.

    Args:
        overrides: dotted names that --set has already changed in `config`.

    Raises:
        ConfigError: an override that would change the network, or crops that do not suit it.
    """
    stored = checkpoint.load(model).model
    if not isinstance(stored, SDAN):
        raise ConfigError(f"--init {model}: expected an SDAN, got a {type(stored).__name__}; choose another model")
    network = stored.config
    for key in overrides:
        section, _, name = key.partition(".")
        if section == "model" and getattr(config.model, name) != getattr(network, name):
            raise ConfigError(
                f"--set {key}: expected {getattr(network, name)}, the value of the model given by --init, got "
                f"{getattr(config.model, name)}; leave out --set {key} or --init"
            )
    return replace(config, model=network)


def train(
    shards: str,
    config: ExperimentConfig,
    *,
    data: Path,
    workers: cluster.Workers | None = None,
    name: str | None = None,
    resume: bool = False,
    storage: str | None = None,
    init_from: Path | None = None,
    seen: Collection[str] = (),
    vgg_weights: Path | None = None,
    run_id: str | None = None,
    callbacks: Sequence[UserCallback] = (),
    register: str | None = registry.MODEL,
    progress: bool = True,
    max_failures: int = 3,
    plan: cluster.WorkerPlan | None = None,
    gpu_wait_s: float = gpus.WAIT_S,
    pairs: RunShards | None = None,
    keep: Literal["best", "last"] = "best",
) -> TrainResult:
    """Train `config` on `shards`.

    Args:
        data: where runs, MLflow's database and artifacts are kept.
        workers: DDP ranks, or (least, most) for an elastic run. None: as stored; in a new run one per GPU, or one.
        name: the run's folder name; None: made from the config and the time.
        resume: continue the run `name` from its latest checkpoint; only values of CHANGEABLE may differ.
        storage: s3:// URI or shared folder for Ray Train's state and checkpoints; None: the run's folder.
        init_from: a checkpoint folder whose weights to start from.
        seen: the pairs (loader.pair_names) that `init_from` was trained on, for train.replay_share.
        vgg_weights: for a loss that compares features, the path of sdan.perceptual.features.load_features.
        run_id: an existing MLflow run (a sweep's child), which the caller terminates; None: a new run.
        callbacks: of Ray Train, called in the controller.
        register: the registered model that gets a version, if that beats the run's start and bicubic; None: none.
        max_failures: maximum number of restarts from the last checkpoint after a worker or machine is lost.
        plan: the workers' resources, in place of `workers`; None: planned from all that Ray has.
        gpu_wait_s: how long to wait for GPUs that the cluster's autoscaler starts.
        pairs: the pairs of a new run; None: all that `shards` has now.
        keep: which checkpoint becomes the run's model: the best by SELECT_BY, or the last.

    Raises:
        TrainError, ConfigError, ShardsError, RunFolderError, PerceptualError, ClusterError: one line.
    """
    cluster.check_workers(workers)
    folder, stored, pairs, config = _checked(shards, config, data, name, resume, init_from, seen, storage, pairs)
    vgg = _features(config, stored, vgg_weights)
    with _own_folder(folder, fixed=bool(name or resume), child=run_id is not None) as folder:
        _start_ray(pairs, vgg, progress)
        workers = workers or (stored.workers if stored else None)
        with gpus.requested(workers, wait_s=gpu_wait_s, needed=plan is None):
            plan = _checked_speed(config, plan or cluster.plan_workers(workers))
            tracking_uri = registry.default_tracking_uri(data)
            run = _record(folder, stored, config, pairs, run_id, init_from, plan, storage, tracking_uri, vgg)
            job = _job(folder, run, config, pairs, plan, vgg, tracking_uri)
            with _mlflow_status(tracking_uri, run.run_id, terminate=run_id is None):
                trainer = _trainer(folder, run, job, plan, callbacks, max_failures)
                result = _fit(trainer, folder, config, progress=progress)
                return _finish(folder, run, result, tracking_uri, register, pairs, keep)


def _features(config: ExperimentConfig, stored: StoredRun | None, vgg_weights: Path | None) -> dict[str, Tensor] | None:
    """The weights of the feature network, or None if the loss needs none: fails here rather than in each worker.

    Those of a resumed run must be of the same network as before.
    """
    if config.loss.st_lpips_weight > 0:
        load_st_lpips()
    if not config.loss.needs_vgg:
        return None
    vgg = load_features(vgg_weights)
    found, before = network_name(vgg), stored.features if stored else None
    if before not in (None, found):
        raise TrainError(f"--resume, feature network: expected {before}, as when the run started, got {found}")
    return vgg


def _start_ray(pairs: RunShards, vgg: dict[str, Tensor] | None, progress: bool) -> None:
    """Start or join Ray; with `progress`, first print what a user should know before the training, on stderr."""
    notes = [alignment_note(pairs.train)]
    if vgg is not None and network_name(vgg) == VGG16:
        notes.append(
            "no VGG-19 weights found, so the losses on features use the VGG16 of stlpips-pytorch; --vgg-weights PATH "
            "names those of VGG-19"
        )
    if not ray.is_initialized():
        notes.append("starting Ray")
    for note in filter(None, notes if progress else ()):
        print(f"train: {note}", file=sys.stderr, flush=True)
    cluster.start_ray()


def alignment_note(index: ShardIndex) -> str | None:
    """One line if a part of the tiles is not aligned, by the column aligned_by; None if all are."""
    shares = alignment_shares(index)
    said = {"unaligned": "do not show the same thing", "scale_fallback": "could not be registered"}
    parts = [
        f"{100 * shares[name]:.1f} % are of pairs that {what} ({name})" for name, what in said.items() if name in shares
    ]
    return f"of the tiles {', and '.join(parts)}; `sdan inspect` shows them" if parts else None


def summary(result: TrainResult) -> str:
    """What `sdan train` prints at the end."""
    champion = registry.CHAMPION_URI
    if result.version is None:
        place, then = "not registered", f"not registered, because {result.verdict.fault}; it stays in the run's folder"
    else:
        place = f"registry: {registry.MODEL}, version {result.version}"
        then = (
            f"first model of this registry: it is now {champion}"
            if result.champion
            else f"to make it {champion}: sdan promote {result.version}"
        )
    lines = [
        f"best: {result.verdict}",
        f"model: {result.model} ({place}; curves and all scores: sdan ui)",
        then,
    ]
    return "\n".join(lines)


def kept(data: Path, name: str | None, since: float) -> str:
    """What an interrupted `sdan train` says: what is kept, and how to go on.

    Args:
        name: of the run; None: that of the newest one.
        since: seconds since 1970 when the command began.
    """
    folder = run_folder.run_folder(data, name) if name else next(iter(run_folder.all_runs(data)), data)
    if not run_folder.is_run(folder) or run_folder.started_at(folder) < since:
        return "no run was started; run the command again"
    if run_folder.is_finished(folder):
        return f"run {folder.name} is finished"
    report = run_folder.last_report(folder)
    has = f"its checkpoint of epoch {report['epoch']:.0f} of {report['epochs']}" if report else "no checkpoint yet"
    return f"run {folder.name} has {has}; add --resume --name {folder.name} to go on"


def _checked(
    shards: str,
    config: ExperimentConfig,
    data: Path,
    name: str | None,
    resume: bool,
    init_from: Path | None,
    seen: Collection[str],
    storage: str | None,
    listed: RunShards | None,
) -> tuple[Path, StoredRun | None, RunShards, ExperimentConfig]:
    """Every check that needs neither Ray nor MLflow; writes nothing."""
    require_no_password(storage or "")
    if "://" not in shards:
        shards = str(Path(shards).resolve())  # train workers have other working directories
    folder = _folder(data, config, name, resume)
    stored = run_folder.read_run(folder) if resume else None
    pairs = _pairs(folder, shards, resume, seen, listed)
    if init_from is None and (stored is None or stored.init_from is None):
        config = with_curve_of(pairs.train, config)
    if stored is not None:
        _check_resumed(stored, config, shards)
    check_fit(pairs.train, config)
    if init_from is not None and checkpoint.load(init_from).model.config != config.model:
        raise ConfigError(f"{init_from}: expected the model.* values of that checkpoint, got others; leave them out")
    return folder, stored, pairs, config


def _pairs(folder: Path, shards: str, resume: bool, seen: Collection[str], listed: RunShards | None) -> RunShards:
    """The pairs that the run was started with; a new run (or one of version 0.1) lists them now, unless it gets them
    as `listed`."""
    kept = RunShards.read(folder) if resume else listed
    if kept is None:
        train_index = index_split(shards, "train")
        return RunShards(with_new(train_index, seen) if seen else train_index, index_split(shards, "val"))
    require_unchanged(kept.train)
    require_unchanged(kept.val)
    return kept


def _folder(data: Path, config: ExperimentConfig, name: str | None, resume: bool) -> Path:
    if resume:
        return run_folder.run_folder(data, name) if name else run_folder.newest_unfinished(data)
    if name is None:
        name = run_folder.new_name(f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}", data / run_folder.RUNS)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise TrainError(f"--name: expected letters, digits, '.', '_' and '-', got {name!r}; choose another name")
    folder = run_folder.run_folder(data, name)
    if run_folder.is_run(folder):
        raise TrainError(f"--name {name}: expected a new name, got one that exists; add --resume to continue that run")
    return folder


@contextmanager
def _own_folder(folder: Path, *, fixed: bool, child: bool) -> Iterator[Path]:
    """The run's folder, in which no other command trains meanwhile.

    Args:
        fixed: the user named the run, or resumes it; else another name is made if a run has taken this one since.
        child: of a sweep or a comparison, which holds a folder of its own.
    """
    if child:
        yield folder
        return
    name, began = folder.name, run_folder.is_run(folder)
    while True:
        with held(folder) as ours:
            if ours and run_folder.is_run(folder) == began:
                yield folder
                return
        if fixed:
            raise TrainError(
                f"--name {name}: expected a run that no other command trains, got one that is being trained; "
                "wait until that ends, or choose another name"
            )
        folder = folder.with_name(run_folder.new_name(name, folder.parent))


def _check_resumed(stored: StoredRun, config: ExperimentConfig, shards: str) -> None:
    if shards != stored.shards:
        raise TrainError(f"--resume, SHARDS: expected {stored.shards} (as when the run started), got {shards}")
    before, now = configs.flatten(configs.from_dict(stored.config)), configs.flatten(config)
    for key, value in before.items():
        if now[key] != value and key not in CHANGEABLE:
            raise TrainError(
                f"--resume, {key}: expected {value} (as when the run started), got {now[key]}; "
                f"only {', '.join(CHANGEABLE)} may change"
            )


def _checked_speed(config: ExperimentConfig, plan: cluster.WorkerPlan) -> cluster.WorkerPlan:
    """The plan, after a check of train.cuda_graph and a warning of settings that are much slower than auto's."""
    train, device = config.train, torch.device("cuda" if plan.use_gpu else "cpu")
    check_graph(config, device_type=device.type, workers=plan.workers, precision=train.precision)
    warning = slow_choice(device, train.precision, train.layout, tf32=train.use_tf32)
    if warning:
        logging.getLogger(__name__).warning(warning)
    return plan


def _record(
    folder: Path,
    stored: StoredRun | None,
    config: ExperimentConfig,
    pairs: RunShards,
    run_id: str | None,
    init_from: Path | None,
    plan: cluster.WorkerPlan,
    storage: str | None,
    tracking_uri: str,
    vgg: dict[str, Tensor] | None,
) -> StoredRun:
    """Write the run's folder and the MLflow run's params; from here on the run can be resumed."""
    registry.prepare_database(tracking_uri)
    shards, features = pairs.train.shards, network_name(vgg) if vgg is not None else None
    if stored is not None:
        run = replace(stored, config=configs.to_dict(config), workers=plan.workers)
    else:
        run_id = run_id or registry.create_run(tracking_uri, registry.EXPERIMENT, folder.name)
        start_from = str(init_from.resolve()) if init_from else None
        run = StoredRun(configs.to_dict(config), shards, run_id, start_from, plan.workers, storage, features)
    also = {"shards": shards} | ({"feature_network": features} if features else {})
    registry.log_config(tracking_uri, run.run_id, configs.flatten(config) | also)
    folder.mkdir(parents=True, exist_ok=True)
    pairs.write(folder)
    run.write(folder)
    if stored is None:
        log_data(tracking_uri, run.run_id, [pairs.train, pairs.val])
    return run


def _job(
    folder: Path,
    run: StoredRun,
    config: ExperimentConfig,
    pairs: RunShards,
    plan: cluster.WorkerPlan,
    vgg: dict[str, Tensor] | None,
    tracking_uri: str,
) -> TrainJob:
    return TrainJob(
        config=config,
        shards=pairs,
        folder=str(folder.resolve()),
        threads=plan.threads,
        readers=plan.readers,
        tracking_uri=tracking_uri,
        run_id=run.run_id,
        init_from=run.init_from,
        vgg=vgg,
    )


def _trainer(
    folder: Path,
    run: StoredRun,
    job: TrainJob,
    plan: cluster.WorkerPlan,
    callbacks: Sequence[UserCallback],
    max_failures: int,
) -> TorchTrainer:
    start_s = ELASTIC_START_S if isinstance(plan.workers, tuple) else START_S
    os.environ[WORKER_GROUP_START_TIMEOUT_S_ENV_VAR] = str(start_s)  # Ray hands it to its controller
    return _Trainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=LocalTorchConfig(),
        scaling_config=ScalingConfig(
            num_workers=plan.workers,
            elastic_resize_monitor_interval_s=RESIZE_CHECK_S,
            use_gpu=plan.use_gpu,
            resources_per_worker={"CPU": plan.cpus_per_worker}
            | ({"GPU": plan.gpus_per_worker} if plan.use_gpu else {}),
            placement_strategy=plan.placement,
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=run.storage or str(folder.parent.resolve()),
            failure_config=FailureConfig(
                max_failures=max_failures,
                controller_failure_limit=min(max_failures, 1) * round(START_LIMIT_S / start_s),
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute=SELECT_BY),
            callbacks=[*callbacks, ProgressFile(folder), StopOnPermanentError()],
        ),
    )


@contextmanager
def _mlflow_status(tracking_uri: str, run_id: str, *, terminate: bool) -> Iterator[None]:
    """The MLflow run is RUNNING inside; with `terminate` it then becomes FINISHED, FAILED (TrainError) or KILLED."""
    registry.connect(tracking_uri, write=True).update_run(run_id, status="RUNNING")
    status = "KILLED"
    try:
        yield
        status = "FINISHED"
    except TrainError:
        status = "FAILED"
        raise
    finally:
        # If MLflow is dead, the error that ended the run says more than MLflow's own.
        with suppress(*(() if status == "FINISHED" else (RegistryError, MlflowException))):
            if terminate:
                registry.connect(tracking_uri, write=True).set_terminated(run_id, status)


def _fit(trainer: TorchTrainer, folder: Path, config: ExperimentConfig, *, progress: bool) -> ray.train.Result:
    try:
        with ProgressLine(folder, config.train.epochs, enabled=progress):
            return trainer.fit()
    except (TrainingFailedError, RayActorError, RaySystemError) as error:
        if not folder.is_dir():
            raise TrainError(
                f"run {folder.name}: expected its folder {folder} to stay while it trains, got none; "
                f"put it back and continue with --resume --name {folder.name}"
            ) from error
        raise TrainError(
            f"run {folder.name}: expected to finish, got {reason_of(error)}; "
            f"fix that and continue with --resume --name {folder.name}"
        ) from error


def _finish(
    folder: Path,
    run: StoredRun,
    result: ray.train.Result,
    tracking_uri: str,
    register: str | None,
    pairs: RunShards,
    keep: Literal["best", "last"],
) -> TrainResult:
    """Register the best checkpoint (or the last) if it is worth it, and put it in the run's model folder, which marks
    the run as finished."""
    if not result.best_checkpoints:
        raise TrainError(f"{folder}: expected at least one checkpoint, got none; see Ray's logs")
    order = (lambda pair: pair[1]["epoch"]) if keep == "last" else (lambda pair: pair[1].get(SELECT_BY, -math.inf))
    best, metrics = max(result.best_checkpoints, key=order)
    aside = folder / f"{run_folder.MODEL}.partial"
    with best.as_directory() as source:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(source, aside, ignore=shutil.ignore_patterns(checkpoint.TRAINER, run_folder.HELD_OUT, ".*"))
    scores = {name: float(value) for name, value in metrics.items() if name.startswith("val_")}
    verdict = judge(folder, metrics)
    version, champion = None, False
    try:
        if register and verdict.fault is None:
            version = registry.register_model(tracking_uri, run.run_id, aside, register)
            log_pairs(tracking_uri, run.run_id, pairs.train)
            registry.remember_shards(tracking_uri, pairs.train.digest, register)
            if registry.get_champion(tracking_uri, register) is None:
                registry.set_champion(tracking_uri, version, register)
                champion = True
        deliver(tracking_uri, run.run_id, folder)
        log_gains(tracking_uri, run.run_id, verdict.gains, verdict.epoch)
    except (RegistryError, MlflowException) as error:
        reason = str(error).splitlines()[0].partition("; ")[0]
        raise TrainError(
            f"run {folder.name}, {aside}: expected to register the trained model, got {reason}; "
            f"when MLflow works again, run `sdan train {run.shards} --resume --name {folder.name}`, which registers it"
        ) from error
    model = folder / run_folder.MODEL
    shutil.rmtree(model, ignore_errors=True)
    aside.rename(model)  # last: a run that is killed before this is resumed, and registers the same version
    return TrainResult(folder.name, folder, model, run.run_id, scores, version, champion, verdict)
