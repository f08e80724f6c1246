"""`sdan retrain`: preprocess new RAW, fine-tune the champion, and promote the result if it is better.

Champion and fine-tuned model are scored on the same held-out tiles. Without a champion, a first model is trained; it
becomes the champion if it beats bicubic (training/verdict.py), and is only registered if it does not. The verb can run
on a schedule: the registry records which shards the last training saw, and if none are new the run ends at once. One
retraining at a time works on a data folder; a second one says so and ends.
"""

from __future__ import annotations

import fcntl
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines import cluster, registry, status
from pipelines import config as configs
from pipelines.config import ExperimentConfig
from pipelines.evaluate import Evaluation, evaluate
from pipelines.loader import index_split
from pipelines.train import TrainResult, train
from preprocessing.report.job_summary import job_summary
from preprocessing.shards import PreprocessOptions, PreprocessReport, preprocess
from sdan import checkpoint
from sdan.perceptual.features import load_features

FINE_TUNE_EPOCHS = 0.2
"""Share of the first training's epochs that a fine-tuning takes."""
FINE_TUNE_RATE = 0.3
"""Share of the first training's learning rate that a fine-tuning starts from."""
LOCK = "retrain.lock"
COMPARED_CROPS = 512
"""The largest number of held-out crops on which champion and challenger are compared."""


class RetrainRunning(Exception):
    """Another retraining works on the data folder. Not an error: what this one would do, the other does."""


@dataclass(frozen=True)
class RetrainResult:
    """What a retraining did."""

    preprocessed: PreprocessReport
    trained: TrainResult | None
    """None: nothing was new."""
    champion: Evaluation | None
    """Scores of the champion before the retraining; None: there was no champion."""
    challenger: Evaluation | None
    """Scores of the new model; None: nothing was trained."""
    promoted: bool
    reason: str
    """One line: what was done and why."""


def retrain(
    raw: str,
    shards: str,
    *,
    data: Path,
    options: PreprocessOptions,
    config: ExperimentConfig | None = None,
    workers: int | None = None,
    vgg_weights: Path | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> RetrainResult:
    """Preprocess what is new, fine-tune, compare, promote; `sdan status` shows the outcome.

    Args:
        config: for the first model; later ones take the champion's config, and a note says so.
        workers, vgg_weights: as for `train`.
        dry_run: say what would be preprocessed and trained; change nothing.

    Raises:
        RetrainRunning: another retraining works on this data folder; the message says which.
        ClusterError, PerceptualError: before anything is done.
        PreprocessError, TrainError, ShardsError, RegistryError: one line that says what to do.
    """
    cluster.check_workers(workers)
    if vgg_weights is not None or (config is not None and config.loss.needs_vgg):
        load_features(vgg_weights)  # fail here rather than after preprocessing
    uri = registry.default_tracking_uri(data)
    if dry_run:
        report = preprocess(raw, shards, options, dry_run=True, progress=progress, start_ray=cluster.start_ray)
        has_champion = registry.get_champion(uri) is not None
        return RetrainResult(report, None, None, None, False, _intention(report, has_champion, uri, shards))
    with _only_one(data):
        report = preprocess(raw, shards, options, progress=progress, start_ray=cluster.start_ray)
        registry.prepare_database(uri)
        champion = registry.get_champion(uri)
        if champion is not None and config is not None:
            report.notes.append("--config and --set are for a first model; the champion is fine-tuned with its own")
        if _trained_on_all(uri, shards):
            stays = "the champion stays" if champion else "there is no champion; try other settings with `sdan train`"
            result = RetrainResult(report, None, None, None, False, f"nothing new to train on; {stays}")
        elif champion is None:
            first = config or configs.named(configs.DEFAULT)
            trained = train(shards, first, data=data, workers=workers, vgg_weights=vgg_weights, progress=progress)
            result = _first_model(report, trained, shards, uri)
        else:
            result = _fine_tune(report, str(champion.version), shards, data, workers, vgg_weights, progress)
        status.note_retrain(data, result.reason)
    return result


@contextmanager
def _only_one(data: Path) -> Iterator[None]:
    """Hold the data folder's lock; the system releases it when this process ends, however it ends."""
    data.mkdir(parents=True, exist_ok=True)
    with (data / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise RetrainRunning(f"{data / LOCK}: a retraining is running ({holder}); this one ends") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def summary(result: RetrainResult, shards: str, *, dry_run: bool) -> str:
    """What `sdan retrain` prints at the end."""
    blocks = [job_summary(result.preprocessed, shards, dry_run=dry_run)]
    for label, evaluation in (("champion", result.champion), ("new model", result.challenger)):
        if evaluation:
            blocks.append(f"{label}:\n{evaluation.table(['self'])}")
    return "\n\n".join([*blocks, result.reason])


def _first_model(report: PreprocessReport, trained: TrainResult, shards: str, uri: str) -> RetrainResult:
    """`train` has made it the champion if it beat bicubic; else it is registered here."""
    score = evaluate(shards, trained.model, limit=COMPARED_CROPS, perceptual=False)
    if trained.champion:
        return RetrainResult(report, trained, None, score, True, "the first model is the champion")
    version = _registered(uri, trained, shards)
    reason = f"the first model is version {version}, but not the champion: {trained.verdict.fault}"
    return RetrainResult(report, trained, None, score, False, reason)


def _registered(uri: str, trained: TrainResult, shards: str) -> str:
    """The model's version; it is registered here if `train` did not."""
    if trained.version is not None:
        return trained.version
    version = registry.register_model(uri, trained.run_id, trained.model)
    registry.remember_shards(uri, index_split(shards, "train").digest)
    return version


def _fine_tune(
    report: PreprocessReport,
    version: str,
    shards: str,
    data: Path,
    workers: int | None,
    vgg_weights: Path | None,
    progress: bool,
) -> RetrainResult:
    """Fine-tune the champion, score both on the same held-out tiles, and promote the better."""
    uri = registry.default_tracking_uri(data)
    # A temporary folder would not do, because the workers of a cluster read it, too.
    cache = data / "models" / f"{registry.MODEL}-{version}"
    folder = registry.resolve_model(uri, registry.CHAMPION_URI, cache)
    tuned = fine_tuning(configs.from_dict(checkpoint.load(folder).config))
    trained = train(
        shards, tuned, data=data, workers=workers, init_from=folder, vgg_weights=vgg_weights, progress=progress
    )
    held_out = index_split(shards, "val")
    before = evaluate(held_out, folder, limit=COMPARED_CROPS, perceptual=False)
    after = evaluate(held_out, trained.model, limit=COMPARED_CROPS, perceptual=False)
    target = "aligned" if math.isfinite(before.rows["SDAN (self)"]["aligned_psnr"]) else "raw"
    gain = after.rows["SDAN (self)"][f"{target}_psnr"] - before.rows["SDAN (self)"][f"{target}_psnr"]
    better = gain > 0
    version = _registered(uri, trained, shards)
    if better:
        registry.set_champion(uri, version)
    verdict = "promoted" if better else "the champion stays"
    reason = f"{gain:+.3f} dB (self, {target}, val, {after.crops} crops): {verdict}"
    return RetrainResult(report, trained, before, after, better, reason)


def _trained_on_all(uri: str, shards: str) -> bool:
    """Whether the last training, promoted or not, saw exactly these shards.

    Digests are compared, because the number of pairs written by this run misses shards of an earlier, interrupted
    run and shards that were copied in.
    """
    remembered = registry.remembered_shards(uri)
    return remembered is not None and remembered == index_split(shards, "train").digest


def _intention(report: PreprocessReport, has_champion: bool, uri: str, shards: str) -> str:
    if not report.todo and _trained_on_all(uri, shards):
        return "nothing to do: no new pairs, and the last training saw all existing ones"
    action = "fine-tune the champion" if has_champion else "train a first model"
    return f"would preprocess {report.todo} pairs and {action}"


def fine_tuning(config: ExperimentConfig) -> ExperimentConfig:
    """The champion's config for a fine-tuning: fixed shares of its first training's epochs and learning rate.

    The shares refer to the first training, so repeated fine-tunings do not shrink.
    """
    first = config.first_schedule or (config.train.epochs, config.train.learning_rate)
    epochs = max(1, round(first[0] * FINE_TUNE_EPOCHS))
    rate = max(first[1] * FINE_TUNE_RATE, config.train.learning_rate_floor)
    train_config = replace(config.train, epochs=epochs, restart_epochs=epochs, learning_rate=rate)
    return replace(config, train=train_config, first_schedule=first)
