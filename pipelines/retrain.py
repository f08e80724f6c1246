"""`sdan retrain`: preprocess new RAW, fine-tune the champion, and promote the result if it is better.

Champion and fine-tuned model are scored on the same held-out tiles. Without a champion, the new model becomes the
champion. The verb can run on a schedule: the registry records which shards the last training saw, and if none are new
the run ends at once.
"""

from __future__ import annotations

import math
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

FINE_TUNE_EPOCHS = 0.2
"""Share of the first training's epochs that a fine-tuning takes."""
FINE_TUNE_RATE = 0.3
"""Share of the first training's learning rate that a fine-tuning starts from."""
COMPARED_CROPS = 512
"""The largest number of held-out crops on which champion and challenger are compared."""


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
        PreprocessError, TrainError, ShardsError, RegistryError: one line that says what to do.
    """
    uri = registry.default_tracking_uri(data)
    report = preprocess(raw, shards, options, dry_run=dry_run, progress=progress, start_ray=cluster.start_ray)
    champion = registry.get_champion(uri)
    if champion is not None and config is not None:
        report.notes.append("--config and --set are for a first model; the champion is fine-tuned with its own config")
    if dry_run:
        return RetrainResult(report, None, None, None, False, _intention(report, champion is not None, uri, shards))
    registry.prepare_database(uri)
    if champion is None:
        first = config or configs.named(configs.DEFAULT)
        trained = train(shards, first, data=data, workers=workers, vgg_weights=vgg_weights, progress=progress)
        score = evaluate(shards, trained.model, limit=COMPARED_CROPS)
        result = RetrainResult(report, trained, None, score, True, "the first model is the champion")
    elif _trained_on_all(uri, shards):
        result = RetrainResult(report, None, None, None, False, "nothing new to train on; the champion stays")
    else:
        result = _fine_tune(report, str(champion.version), shards, data, workers, vgg_weights, progress)
    status.note_retrain(data, result.reason)
    return result


def summary(result: RetrainResult, shards: str, *, dry_run: bool) -> str:
    """What `sdan retrain` prints at the end."""
    blocks = [job_summary(result.preprocessed, shards, dry_run=dry_run)]
    for label, evaluation in (("champion", result.champion), ("new model", result.challenger)):
        if evaluation:
            blocks.append(f"{label}:\n{evaluation.table(['self'])}")
    return "\n\n".join([*blocks, result.reason])


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
    before = evaluate(held_out, folder, limit=COMPARED_CROPS)
    after = evaluate(held_out, trained.model, limit=COMPARED_CROPS)
    target = "aligned" if math.isfinite(before.rows["SDAN (self)"]["aligned_psnr"]) else "raw"
    gain = after.rows["SDAN (self)"][f"{target}_psnr"] - before.rows["SDAN (self)"][f"{target}_psnr"]
    better = gain > 0
    if better:
        registry.set_champion(uri, str(trained.version))
    verdict = "promoted" if better else "the champion stays"
    reason = f"{gain:+.3f} dB (self, {target}, val, {after.crops} crops): {verdict}"
    return RetrainResult(report, trained, before, after, better, reason)


def _trained_on_all(uri: str, shards: str) -> bool:
    """Whether the last training, promoted or not, saw exactly these shards.

    Digests are compared, because the number of pairs written by this run misses shards of an earlier, interrupted
    run and shards that were copied in.
    """
    return registry.remembered_shards(uri) == index_split(shards, "train").digest


def _intention(report: PreprocessReport, has_champion: bool, uri: str, shards: str) -> str:
    if has_champion and not report.todo and _trained_on_all(uri, shards):
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
