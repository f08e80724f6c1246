"""`sdan retrain`: preprocess new RAW, fine-tune the champion, and promote the result if it is better.

Champion and fine-tuned model are scored on the same held-out tiles; the new one is promoted if its mean gain reaches
the margin and the confidence interval of the gain is above zero (retraining/compare.py). Without a champion, a first
model is trained; it becomes the champion if it beats bicubic (training/verdict.py), and is only registered if it does
not. The verb can run on a schedule: the registry records which shards the last training saw, and if none are new the
run ends at once. One retraining at a time works on a data folder and on SHARDS (retraining/lock.py), and a run that was
killed is continued by the next one (retraining/phases.py).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pipelines import cluster, registry
from pipelines import config as configs
from pipelines.config import ExperimentConfig
from pipelines.evaluate import Evaluation
from pipelines.loader import index_split
from pipelines.monitoring.published import pair_finished
from pipelines.retraining import phases, state
from pipelines.retraining import report as reports
from pipelines.retraining.compare import MARGIN_DB, Comparison, table
from pipelines.retraining.lock import Held, RetrainRunning, hold
from pipelines.retraining.phases import Settings, finish
from pipelines.retraining.state import IDLE, Pending
from pipelines.train import TrainResult
from pipelines.training import run_folder
from preprocessing.report.job_summary import job_summary
from preprocessing.shards import PreprocessOptions, PreprocessReport, preprocess
from preprocessing.storage import one_line, require_no_password
from sdan.perceptual.features import load_features

__all__ = ["RetrainError", "RetrainResult", "RetrainRunning", "fine_tuning", "retrain", "summary"]

FINE_TUNE_EPOCHS = 0.2
"""Share of the first training's epochs that a fine-tuning takes."""
FINE_TUNE_RATE = 0.3
"""Share of the first training's learning rate that a fine-tuning starts from."""


class RetrainError(ValueError):
    """A wrong option; one line."""


@dataclass(frozen=True)
class RetrainResult:
    """What a retraining did."""

    preprocessed: PreprocessReport
    trained: TrainResult | None
    """None: nothing was new, or an earlier run trained and registered the model."""
    champion: Evaluation | None
    """Scores of the champion before the retraining; None: there was no champion, or an earlier run compared."""
    challenger: Evaluation | None
    """Scores of the new model; None: nothing was trained, or an earlier run compared."""
    promoted: bool
    reason: str
    """One line: what was done and why."""
    comparisons: list[Comparison] = field(default_factory=list)
    """Champion and challenger, tile by tile; the first decides."""
    report: Path | None = None
    """The report, which MLflow's run of the retraining has, too."""


def retrain(
    raw: str,
    shards: str,
    *,
    data: Path,
    options: PreprocessOptions,
    config: ExperimentConfig | None = None,
    workers: int | None = None,
    vgg_weights: Path | None = None,
    margin_db: float = MARGIN_DB,
    replay_share: float | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> RetrainResult:
    """Preprocess what is new, fine-tune, compare, promote; `sdan status` shows the outcome.

    Args:
        config: for the first model; later ones take the champion's config, and a note says so.
        workers, vgg_weights: as for `train`.
        margin_db: least mean gain over the champion, in dB, for a promotion; 0 or more.
        replay_share: train.replay_share of a fine-tuning; None: the champion's own.
        dry_run: say what would be preprocessed and trained; change nothing.

    Raises:
        RetrainRunning: another retraining works on this data folder or these SHARDS; the message says which.
        RetrainError, ClusterError, PerceptualError: before anything is done.
        LockError, PreprocessError, TrainError, ShardsError, RegistryError: one line that says what to do.
    """
    cluster.check_workers(workers)
    _check(raw, shards, margin_db, replay_share)
    if vgg_weights is not None or (config is not None and config.loss.needs_vgg):
        load_features(vgg_weights)  # fail here rather than after preprocessing
    uri = registry.default_tracking_uri(data)
    if "://" not in shards:
        shards = str(Path(shards).resolve())
    if dry_run:
        report = preprocess(raw, shards, options, dry_run=True, progress=progress, start_ray=cluster.start_ray)
        return RetrainResult(report, None, None, None, False, _intention(report, data, uri, shards))
    tuned = partial(fine_tuning, replay_share=replay_share)
    first = config or configs.named(configs.DEFAULT)
    settings = Settings(data, uri, first, tuned, workers, vgg_weights, margin_db, progress)
    with hold(data, shards) as held:
        try:
            report = preprocess(
                raw, shards, options, progress=progress, start_ray=cluster.start_ray, on_pair=pair_finished
            )
            report.notes += held.notes
            return _after_preprocessing(report, raw, shards, settings, held, has_config=config is not None)
        except ValueError as error:
            state.note(data, f"failed: {one_line(error)}", raw, shards)
            raise


def _check(raw: str, shards: str, margin_db: float, replay_share: float | None) -> None:
    for uri in (raw, shards):
        require_no_password(uri)
    if not 0 <= margin_db < math.inf:
        raise RetrainError(f"--margin: expected 0 dB or more, got {margin_db:g}")
    if replay_share is not None and not 0 <= replay_share < 1:
        raise RetrainError(f"--replay: expected a value from 0 to below 1, got {replay_share:g}")


def _after_preprocessing(
    report: PreprocessReport, raw: str, shards: str, settings: Settings, held: Held, *, has_config: bool
) -> RetrainResult:
    """Finish what an earlier run left, or train on what is new."""
    data, uri = settings.data, settings.tracking_uri
    registry.prepare_database(uri)
    champion = registry.get_champion(uri)
    if champion is not None and has_config:
        report.notes.append("--config and --set are for a first model; the champion is fine-tuned with its own")
    pending = state.pending(data, shards, report.notes)
    now = time.time()
    name = f"retrain-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}Z"
    name = run_folder.new_name(name, data / run_folder.RUNS, data / state.FOLDER)
    set_aside = [f"{entry.sequence} {entry.pair}: {entry.reason}" for entry in report.quarantined]
    if pending is not None:
        report.notes.append(f"an unfinished retraining is continued: {pending.name}")
    elif _trained_on_all(uri, shards):
        stays = "the champion stays" if champion else "there is no champion; try other settings with `sdan train`"
        reason = f"{IDLE}; {stays}"
        state.note(data, reason, raw, shards)
        if report.todo:  # pairs that cannot be used, or held-out ones: worth a report
            _report_idle(Pending(name, now, raw, shards, None, set_aside=set_aside), settings, reason)
        return RetrainResult(report, None, None, None, False, reason)
    else:
        pending = phases.start(data, uri, raw, shards, name, set_aside, now)
    done = finish(pending, settings, held)
    return RetrainResult(
        report,
        done.trained and replace(done.trained, version=done.version, champion=done.decision.promoted),
        done.champion,
        done.challenger,
        done.decision.promoted,
        done.decision.sentence,
        done.comparisons,
        state.report_path(data, pending.name),
    )


def _report_idle(pending: Pending, settings: Settings, reason: str) -> None:
    """Write and log the report of a run that had new RAW but nothing new to train on."""
    text = reports.text(pending, [], reason, [])
    state.write_report(settings.data, pending.name, text)
    run_id = reports.begin(settings.tracking_uri, pending.name)
    reports.log(settings.tracking_uri, replace(pending, run_id=run_id), text, reason)


def summary(result: RetrainResult, shards: str, *, dry_run: bool) -> str:
    """What `sdan retrain` prints at the end."""
    blocks = [job_summary(result.preprocessed, shards, dry_run=dry_run)]
    for label, evaluation in (("champion", result.champion), ("new model", result.challenger)):
        if evaluation:
            blocks.append(f"{label}:\n{evaluation.table(['self'])}")
    if result.comparisons:
        blocks.append(f"new model - champion, tile by tile:\n{table(result.comparisons)}")
    if result.report:
        blocks.append(f"report: {result.report} (also in MLflow, experiment {reports.EXPERIMENT})")
    return "\n\n".join([*blocks, result.reason])


def _trained_on_all(uri: str, shards: str) -> bool:
    """Whether the last training, promoted or not, saw exactly these shards.

    Digests are compared, because the number of pairs written by this run misses shards of an earlier, interrupted
    run and shards that were copied in.
    """
    remembered = registry.remembered_shards(uri)
    return remembered is not None and remembered == index_split(shards, "train").digest


def _intention(report: PreprocessReport, data: Path, uri: str, shards: str) -> str:
    """What a run without --dry-run would do."""
    unfinished = next((left.name for left in state.all_pending(data) if left.shards == shards), None)
    if unfinished is not None:
        return f"would preprocess {report.todo} pairs and continue the unfinished retraining {unfinished}"
    if not report.todo and _trained_on_all(uri, shards):
        return "nothing to do: no new pairs, and the last training saw all existing ones"
    action = "fine-tune the champion" if registry.get_champion(uri) is not None else "train a first model"
    return f"would preprocess {report.todo} pairs and {action}"


def fine_tuning(config: ExperimentConfig, *, replay_share: float | None = None) -> ExperimentConfig:
    """The champion's config for a fine-tuning: fixed shares of its first training's epochs and learning rate.

    The shares refer to the first training, so repeated fine-tunings do not shrink.

    Args:
        replay_share: train.replay_share; None: the champion's.
    """
    first = config.first_schedule or (config.train.epochs, config.train.learning_rate)
    epochs = max(1, round(first[0] * FINE_TUNE_EPOCHS))
    rate = max(first[1] * FINE_TUNE_RATE, config.train.learning_rate_floor)
    train_config = replace(config.train, epochs=epochs, restart_epochs=epochs, learning_rate=rate)
    if replay_share is not None:
        train_config = replace(train_config, replay_share=replay_share)
    return replace(config, train=train_config, first_schedule=first)
