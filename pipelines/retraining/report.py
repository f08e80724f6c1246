"""The report of a retraining, in Markdown and as an MLflow run: what was new, what was done, and why."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pipelines import registry
from pipelines.loader import replayed
from pipelines.retraining.compare import Comparison, table
from pipelines.retraining.lock import local_time
from pipelines.retraining.state import Pending
from pipelines.training.run_folder import RunShards
from pipelines.training.verdict import Verdict

EXPERIMENT = "sdan-retrain"
"""MLflow's experiment of the retrainings; the trainings themselves are in registry.EXPERIMENT."""
REPORT = "report.md"
_LISTED = 200


def utc_and_local(time_s: float) -> str:
    """Seconds since 1970 in UTC and in local time with its zone."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(time_s))} UTC ({local_time(time_s)})"


def training_lines(name: str, shards: RunShards | None, share: float, verdict: Verdict) -> list[str]:
    """What was trained, and how old pairs were replayed."""
    lines = [f"Run {name}. Best checkpoint: {verdict}."]
    if shards is not None and 0 < len(shards.train.new) < len(shards.train.paths):
        used = replayed(shards.train, share)
        lines.append(
            f"Replay: {100 * used:.1f} % of the crops are of pairs that the champion has been trained on "
            f"(train.replay_share {share:g})."
        )
    elif shards is not None:
        lines.append("Replay: none; every pair has the same share of crops.")
    return lines


def text(pending: Pending, comparisons: Sequence[Comparison], sentence: str, training: Sequence[str]) -> str:
    """The report as Markdown."""
    pairs = [f"{len(pending.new_pairs)} new, {pending.old_pairs} that the champion has been trained on."]
    parts = [
        f"# Retraining {pending.name}",
        f"{sentence}\n\nBegan {utc_and_local(pending.began)}, decided {utc_and_local(time.time())}.\n\n"
        f"RAW: {pending.raw}\n\nSHARDS: {pending.shards}",
        "## Training pairs\n\n" + "\n".join([*pairs, *_listed(pending.new_pairs)]),
        "## Set aside\n\n" + ("\n".join(_listed(pending.set_aside)).strip() or "Nothing."),
        "## Training\n\n" + ("\n\n".join(training) or "None."),
    ]
    if comparisons:
        parts.append(
            f"## Champion (version {pending.champion}) and challenger (version {pending.version})\n\n"
            "Both by the self protocol on the same held-out tiles (val). The first row decides. Difference: tile by "
            f"tile, mean; interval: bootstrap of whole sequences.\n\n{table(list(comparisons))}"
        )
    return "\n\n".join([*parts, f"## Decision\n\n{sentence}"]) + "\n"


def _listed(lines: Sequence[str]) -> list[str]:
    """The lines as a list, after an empty line; the first _LISTED of them."""
    if not lines:
        return []
    more = [f"- and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return ["", *(f"- {line}" for line in lines[:_LISTED]), *more]


def begin(tracking_uri: str, name: str) -> str:
    """Create MLflow's run of a retraining; returns its id."""
    run_id = registry.create_run(tracking_uri, EXPERIMENT, name)
    registry.connect(tracking_uri, write=True).update_run(run_id, status="RUNNING")
    return run_id


def log(tracking_uri: str, pending: Pending, report: str, sentence: str) -> None:
    """Write the report, its numbers and the decision to MLflow's run, and end it. May be repeated."""
    from mlflow.entities import Metric, Param, RunTag

    if pending.run_id is None:
        return
    decision = pending.decision
    now = int(time.time() * 1000)
    values: dict[str, float | None] = {"new_pairs": len(pending.new_pairs), "set_aside": len(pending.set_aside)}
    if decision is not None:
        values |= {"promoted": float(decision.promoted), "difference_db": decision.difference_db}
        values |= {"difference_low_db": decision.low_db, "difference_high_db": decision.high_db}
    params = {
        "raw": pending.raw,
        "shards": pending.shards,
        "champion": pending.champion or "none",
        "challenger": pending.version or "none",
        "margin_db": f"{decision.margin_db:g}" if decision and decision.margin_db is not None else "none",
    }
    client = registry.connect(tracking_uri, write=True)
    client.log_batch(
        pending.run_id,
        metrics=[Metric(name, float(value), now, 0) for name, value in values.items() if value is not None],
        params=[Param(name, value) for name, value in params.items()],
        tags=[RunTag(registry.NOTE, sentence)],
    )
    client.log_text(pending.run_id, report, REPORT)
    client.set_terminated(pending.run_id, "FINISHED")


def give_up(tracking_uri: str, pending: Pending, reason: str) -> None:
    """End MLflow's run of a retraining that is not continued."""
    if pending.run_id is not None:
        client = registry.connect(tracking_uri, write=True)
        client.set_tag(pending.run_id, registry.NOTE, reason)
        client.set_terminated(pending.run_id, "FAILED")
