"""`sdan retrain`: new RAW in, a better model out - or the old one kept.

Only new sequences are preprocessed. The champion is fine-tuned on everything, both are scored on the same held-out
tiles, and the new one is promoted in the registry if it is better. With no champion yet, the first model becomes it.
Written to be run by a schedule: what the last training saw is noted in the registry; with nothing new it ends at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines import cluster, registry
from pipelines import config as configs
from pipelines.config import RunConfig
from pipelines.evaluate import Evaluation, evaluate
from pipelines.loader import index_split
from pipelines.train import TrainResult, train
from preprocessing.shards import PreprocessOptions, PreprocessReport, preprocess
from sdan import checkpoint

FINE_TUNE_EPOCHS = 0.2
"""Share of the config's epochs that a fine-tuning takes."""
FINE_TUNE_RATE = 0.3
"""Share of the config's learning rate that it starts from."""
COMPARED_CROPS = 512
"""Held-out crops that champion and challenger are compared on, at most, spread evenly."""


@dataclass(frozen=True)
class RetrainResult:
    """What a retraining did."""

    preprocessed: PreprocessReport
    trained: TrainResult | None
    """None: nothing was new."""
    champion: Evaluation | None
    """The champion's scores before; None: there was none."""
    challenger: Evaluation | None
    promoted: bool
    reason: str


def retrain(
    raw: str,
    shards: str,
    *,
    data: Path,
    options: PreprocessOptions,
    config: RunConfig | None = None,
    workers: int | None = None,
    vgg_weights: Path | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> RetrainResult:
    """Preprocess what is new, fine-tune, compare, promote.

    Args:
        config: for the first model; later ones take the champion's own.
        vgg_weights: as for `train`.
        dry_run: say what would be preprocessed and trained; change nothing.
    """
    uri = registry.default_tracking_uri(data)
    cluster.start_ray()
    report = preprocess(raw, shards, options, dry_run=dry_run, progress=progress)
    champion = registry.get_champion(uri)
    if dry_run:
        return RetrainResult(report, None, None, None, False, _intention(report, champion is not None, uri, shards))
    registry.prepare_database(uri)
    if champion is None:
        first = config or configs.srraw_4x()
        trained = train(shards, first, data=data, workers=workers, vgg_weights=vgg_weights, progress=progress)
        score = evaluate(shards, trained.model, limit=COMPARED_CROPS)
        return RetrainResult(report, trained, None, score, True, "the first model is the champion")
    if _trained_on_all(uri, shards):
        return RetrainResult(report, None, None, None, False, "nothing new to train on; the champion stays")
    cache = data / "models" / f"{registry.MODEL}-{champion.version}"  # where a cluster's workers can read it, too
    folder = registry.resolve_model(uri, f"models:/{registry.MODEL}@{registry.CHAMPION}", cache)
    tuned = fine_tuning(configs.from_dict(checkpoint.load(folder).config))
    trained = train(
        shards,
        tuned,
        data=data,
        workers=workers,
        init_from=folder,
        vgg_weights=vgg_weights,
        progress=progress,
    )
    before = evaluate(shards, folder, limit=COMPARED_CROPS)
    after = evaluate(shards, trained.model, limit=COMPARED_CROPS)
    target = "aligned" if math.isfinite(before.rows["SDAN (self)"]["aligned_psnr"]) else "raw"
    gain = after.rows["SDAN (self)"][f"{target}_psnr"] - before.rows["SDAN (self)"][f"{target}_psnr"]
    better = gain > 0
    if better:
        registry.set_champion(uri, str(trained.version))
    verdict = f"{gain:+.3f} dB (self, {target}, val, {after.crops} crops): " + (
        "promoted" if better else "the champion stays"
    )
    return RetrainResult(report, trained, before, after, better, verdict)


def _trained_on_all(uri: str, shards: str) -> bool:
    """Whether the last training (promoted or not) has seen exactly these shards.

    Not whether this run wrote any: a training that was cut off, or shards made by hand, would be forgotten.
    """
    return registry.remembered_shards(uri) == index_split(shards, "train").digest


def _intention(report: PreprocessReport, has_champion: bool, uri: str, shards: str) -> str:
    if has_champion and not report.todo and _trained_on_all(uri, shards):
        return "nothing to do: no new pairs, and the last training has seen all there are"
    action = "fine-tune the champion" if has_champion else "train a first model"
    return f"would preprocess {report.todo} pairs and {action}"


def fine_tuning(config: RunConfig) -> RunConfig:
    """The champion's config, shorter and gentler: shares of its first schedule, however often it was tuned since."""
    first = config.first_schedule or (config.train.epochs, config.train.learning_rate)
    epochs = max(1, round(first[0] * FINE_TUNE_EPOCHS))
    rate = max(first[1] * FINE_TUNE_RATE, config.train.learning_rate_floor)
    train_config = replace(config.train, epochs=epochs, restart_epochs=epochs, learning_rate=rate)
    return replace(config, train=train_config, first_schedule=first)
