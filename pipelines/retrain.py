"""`sdan retrain`: new RAW in, a better model out - or the old one kept.

Only new sequences are preprocessed. The champion is fine-tuned on everything, both are scored on the same held-out
tiles, and the new one is promoted in the registry if it is better. With no champion yet, the first model becomes it.
Written to be run by a schedule: with nothing new it ends at once, and what it did last stands in the registry's tags.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pipelines import cluster, registry
from pipelines import config as configs
from pipelines.config import RunConfig
from pipelines.evaluate import Evaluation, evaluate
from pipelines.train import TrainResult, train
from preprocessing.shards import PreprocessOptions, PreprocessReport, preprocess
from sdan import checkpoint

FINE_TUNE_EPOCHS = 0.2
"""Share of the config's epochs that a fine-tuning takes."""
FINE_TUNE_RATE = 0.3
"""Share of the config's learning rate that it starts from."""


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
    dry_run: bool = False,
    progress: bool = True,
) -> RetrainResult:
    """Preprocess what is new, fine-tune, compare, promote.

    Args:
        config: for the first model; later ones take the champion's own.
        dry_run: say what would be preprocessed and trained; change nothing.
    """
    uri = registry.default_tracking_uri(data)
    cluster.start_ray()
    report = preprocess(raw, shards, options, dry_run=dry_run, progress=progress)
    registry.prepare_database(uri)
    champion = registry.get_champion(uri)
    if dry_run:
        action = "fine-tune the champion" if champion else "train a first model"
        new = len(report.new_sequences)
        return RetrainResult(report, None, None, None, False, f"would preprocess {new} new sequences and {action}")
    if champion is None:
        trained = train(shards, config or configs.srraw_4x(), data=data, workers=workers, progress=progress)
        registry.set_champion(uri, str(trained.version))
        score = evaluate(shards, trained.model)
        return RetrainResult(report, trained, None, score, True, "the first model is the champion")
    if not report.written:
        return RetrainResult(report, None, None, None, False, "no new pairs; the champion stays")
    folder = registry.resolve_model(uri, f"models:/{registry.MODEL}@{registry.CHAMPION}")
    tuned = fine_tuning(configs.from_dict(checkpoint.load(folder).config))
    trained = train(shards, tuned, data=data, workers=workers, init_from=folder, progress=progress)
    before, after = evaluate(shards, folder), evaluate(shards, trained.model)
    gain = after.rows["SDAN (self)"]["aligned_psnr"] - before.rows["SDAN (self)"]["aligned_psnr"]
    better = gain > 0
    if better:
        registry.set_champion(uri, str(trained.version))
    verdict = f"{gain:+.3f} dB (self, aligned, val, {after.crops} crops): " + (
        "promoted" if better else "the champion stays"
    )
    return RetrainResult(report, trained, before, after, better, verdict)


def fine_tuning(config: RunConfig) -> RunConfig:
    """The champion's config, shorter and gentler."""
    epochs = max(1, round(config.train.epochs * FINE_TUNE_EPOCHS))
    rate = max(config.train.learning_rate * FINE_TUNE_RATE, config.train.learning_rate_floor)
    train_config = replace(config.train, epochs=epochs, restart_epochs=epochs, learning_rate=rate)
    return replace(config, train=train_config)
