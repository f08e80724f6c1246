"""The phases of a retraining after preprocessing: train, register, compare, promote, report.

Each phase ends by writing what it has done to Pending (state.py), and does nothing if that is there already. A run that
is killed in any of them leaves the champion in place; the next run goes on from the last finished phase:

train      an unfinished run is resumed from its last checkpoint; a finished one is not repeated
register   the same checkpoint gets the same version again
compare    champion and challenger are scored again; the report is written before the decision
promote    the alias moves in one step; if the champion has changed since the comparison, it is compared again
report     MLflow's run gets the report, and Pending is removed
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipelines import config as configs
from pipelines import registry
from pipelines.config import ConfigError, ExperimentConfig
from pipelines.evaluate import Evaluation, evaluate
from pipelines.loader import ShardsError, index_split, pair_names
from pipelines.retraining import report, state
from pipelines.retraining.compare import Comparison, Decision, compare, decide
from pipelines.retraining.lock import Held
from pipelines.retraining.state import MAX_ATTEMPTS, Pending
from pipelines.train import TrainError, TrainResult, train
from pipelines.training import run_folder
from pipelines.training.progress import SELECT_BY
from pipelines.training.run_folder import RunFolderError, RunShards
from pipelines.training.seen import log_pairs, seen_by
from pipelines.training.verdict import judge
from sdan import checkpoint

COMPARED_CROPS = 512
"""The largest number of held-out crops on which champion and challenger are compared."""
RETRAINING_TAG, TRAINED_ON_TAG, OUTCOME_TAG = "sdan.retraining", "sdan.trained_on", "sdan.outcome"
"""Tags of a version: the retraining that made it, the digest of its training pairs, and what was decided about it."""


@dataclass(frozen=True)
class Settings:
    """What a retraining is asked for."""

    data: Path
    tracking_uri: str
    first: ExperimentConfig
    """The config of a first model."""
    fine_tuning: Callable[[ExperimentConfig], ExperimentConfig]
    """The champion's config -> that of its fine-tuning."""
    workers: int | None
    vgg_weights: Path | None
    margin_db: float
    progress: bool


@dataclass
class Outcome:
    """What the phases of this run did; None: an earlier run did it."""

    trained: TrainResult | None = None
    champion: Evaluation | None = None
    challenger: Evaluation | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    decision: Decision = field(default_factory=lambda: Decision(False, ""))
    version: str | None = None
    """The challenger's."""


def start(data: Path, tracking_uri: str, raw: str, shards: str, name: str, set_aside: list[str], now: float) -> Pending:
    """A new retraining on the training pairs that SHARDS has now; it is stored before anything is done.

    A version that was registered but never compared, by a run whose data folder is lost, is taken up.
    """
    champion = registry.get_champion(tracking_uri)
    version = str(champion.version) if champion is not None else None
    index = index_split(shards, "train")
    seen = set(seen_by(tracking_uri, str(champion.run_id), data) or ()) if champion is not None else set()
    new = [pair for pair in pair_names(index) if pair not in seen]
    pending = Pending(name, now, raw, shards, version, new_pairs=new, old_pairs=len(index.paths) - len(new))
    pending = replace(pending, set_aside=set_aside, run_id=report.begin(tracking_uri, name))
    if version is not None and (left := _uncompared(tracking_uri, index.digest)):
        pending = replace(pending, version=left, digest=index.digest)
    pending.write(data)
    return pending


def _uncompared(tracking_uri: str, digest: str) -> str | None:
    """The newest version of a retraining on the pairs of this digest about which nothing was decided."""
    found = registry.connect(tracking_uri).search_model_versions(f"name = '{registry.MODEL}'")
    left = [
        int(version.version)
        for version in found
        if version.tags.get(TRAINED_ON_TAG) == digest and OUTCOME_TAG not in version.tags
    ]
    return str(max(left)) if left else None


def finish(pending: Pending, settings: Settings, held: Held) -> Outcome:
    """Do the phases that are left."""
    outcome = Outcome()
    if pending.version is None:
        outcome.trained = _trained(pending, settings)
        pending = _registered(pending, settings, outcome.trained)
    while (decided := _promoted(pending, settings, held)) is None:
        pending = _compared(pending, settings, outcome)
    outcome.decision, outcome.version = decided, pending.version
    _reported(pending, settings, decided)
    return outcome


def _trained(pending: Pending, settings: Settings) -> TrainResult:
    """Train, or resume; after MAX_ATTEMPTS failures the retraining is given up."""
    folder = run_folder.run_folder(settings.data, pending.name)
    try:
        if run_folder.is_finished(folder):
            return finished_run(folder)
        resume = run_folder.is_run(folder)
        seen: Collection[str] = ()
        init_from, config = None, settings.first
        if resume:
            config = configs.from_dict(run_folder.read_run(folder).config)
        elif pending.champion is not None:
            init_from = _model(pending.champion, settings)
            config = settings.fine_tuning(configs.from_dict(checkpoint.load(init_from).config))
            champion = registry.connect(settings.tracking_uri).get_model_version(registry.MODEL, pending.champion)
            seen = seen_by(settings.tracking_uri, str(champion.run_id), settings.data) or ()
        return train(
            pending.shards,
            config,
            data=settings.data,
            workers=settings.workers,
            name=pending.name,
            resume=resume,
            init_from=init_from,
            seen=seen,
            vgg_weights=settings.vgg_weights,
            register=None,
            progress=settings.progress,
        )
    except (TrainError, ShardsError, RunFolderError, ConfigError) as error:
        failed = replace(pending, attempts=pending.attempts + 1)
        failed.write(settings.data)
        if failed.attempts >= MAX_ATTEMPTS:
            failed.forget(settings.data)
            report.give_up(settings.tracking_uri, failed, f"given up after {MAX_ATTEMPTS} attempts: {error}")
        raise


def finished_run(folder: Path) -> TrainResult:
    """The result of a training that has finished, from its folder."""
    best = max(run_folder.reports(folder), key=lambda line: line.get(SELECT_BY, -math.inf))
    scores = {name: float(value) for name, value in best.items() if name.startswith("val_")}
    run_id = run_folder.read_run(folder).run_id
    model = folder / run_folder.MODEL
    return TrainResult(folder.name, folder, model, run_id, scores, None, False, judge(folder, best))


def _registered(pending: Pending, settings: Settings, trained: TrainResult) -> Pending:
    """Register the model, whatever its verdict; the champion is decided later."""
    uri = settings.tracking_uri
    version = registry.register_model(uri, trained.run_id, trained.model)
    shards = RunShards.read(trained.folder)
    index = shards.train if shards is not None else index_split(pending.shards, "train")
    log_pairs(uri, trained.run_id, index)
    registry.tag_version(uri, version, {RETRAINING_TAG: pending.name, TRAINED_ON_TAG: index.digest})
    pending = replace(pending, version=version, digest=index.digest)
    pending.write(settings.data)
    return pending


def _compared(pending: Pending, settings: Settings, outcome: Outcome) -> Pending:
    """Score both models on the same tiles, write the report, and store the decision."""
    champion = registry.get_champion(settings.tracking_uri)
    before = str(champion.version) if champion is not None else None
    pending = replace(pending, champion=before if before != pending.version else pending.champion)
    held_out = index_split(pending.shards, "val")
    challenger = _model(str(pending.version), settings)
    outcome.challenger = evaluate(held_out, challenger, limit=COMPARED_CROPS, perceptual=False)
    outcome.champion, outcome.comparisons = None, []
    if pending.champion is None:
        decision = _first_decision(pending, settings, outcome.challenger)
    else:
        folder = _model(pending.champion, settings)
        outcome.champion = evaluate(held_out, folder, limit=COMPARED_CROPS, perceptual=False)
        outcome.comparisons = compare(outcome.champion, outcome.challenger)
        decision = decide(outcome.comparisons, settings.margin_db)
    lines = _training_lines(pending, settings)
    state.write_report(settings.data, pending.name, report.text(pending, outcome.comparisons, decision.sentence, lines))
    pending = replace(pending, decision=decision)
    pending.write(settings.data)
    return pending


def _first_decision(pending: Pending, settings: Settings, scores: Evaluation) -> Decision:
    """A first model becomes the champion if it beats its start and bicubic (training/verdict.py)."""
    folder = run_folder.run_folder(settings.data, pending.name)
    if run_folder.is_finished(folder):
        fault = finished_run(folder).verdict.fault
    else:  # its run is lost with the data folder
        target = scores.targets[-1]
        fault = None if scores.gain_db(target) > 0 else "it is not better than bicubic"
    if fault is None:
        return Decision(True, "the first model is the champion")
    return Decision(False, f"the first model is version {pending.version}, but not the champion: {fault}")


def _training_lines(pending: Pending, settings: Settings) -> list[str]:
    folder = run_folder.run_folder(settings.data, pending.name)
    if not run_folder.is_finished(folder):
        return ["The training was finished by an earlier run, whose folder is not here."]
    share = configs.from_dict(run_folder.read_run(folder).config).train.replay_share
    return report.training_lines(pending.name, RunShards.read(folder), share, finished_run(folder).verdict)


def _promoted(pending: Pending, settings: Settings, held: Held) -> Decision | None:
    """Move the alias if that was decided; None if there is no decision, or another champion than it was made for."""
    if pending.decision is None:
        return None
    held.require()
    uri, version = settings.tracking_uri, str(pending.version)
    champion = registry.get_champion(uri)
    now = str(champion.version) if champion is not None else None
    if now not in (pending.champion, version):
        return None
    if pending.decision.promoted:
        registry.set_champion(uri, version)
    registry.remember_shards(uri, str(pending.digest))
    registry.tag_version(uri, version, {OUTCOME_TAG: pending.decision.sentence})
    return pending.decision


def _reported(pending: Pending, settings: Settings, decision: Decision) -> None:
    text = state.report_path(settings.data, pending.name).read_text()
    report.log(settings.tracking_uri, pending, text, decision.sentence)
    state.note(settings.data, decision.sentence, pending.raw, pending.shards)
    pending.forget(settings.data)


def _model(version: str, settings: Settings) -> Path:
    """The checkpoint folder of a version. A temporary folder would not do: the workers of a cluster read it, too."""
    cache = settings.data / "models" / f"{registry.MODEL}-{version}"
    return registry.resolve_model(settings.tracking_uri, f"models:/{registry.MODEL}/{version}", cache)
