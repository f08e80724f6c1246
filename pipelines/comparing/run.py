"""Trains the rows of a comparison with `pipelines.train.train`, and continues what an earlier command left.

A row's run has a fixed name. So a row that was trained is never trained again, and one that was interrupted resumes
from its last checkpoint as `sdan train --resume` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from pipelines import cluster
from pipelines.comparing.rows import CompareError, Row, row_config
from pipelines.comparing.score import Trained
from pipelines.comparing.state import Comparison
from pipelines.comparing.tracking import CompareRuns
from pipelines.config import ConfigError
from pipelines.loader import ShardsError
from pipelines.sweeping.resources import plan_trials
from pipelines.train import TrainError, train
from pipelines.training import run_folder
from pipelines.training.run_folder import RunShards
from sdan import checkpoint
from sdan.perceptual.weights import PerceptualError
from tuning.plan import MOST_AT_ONCE

ROW_ERRORS = (TrainError, ConfigError, ShardsError, PerceptualError)
"""What sets one row aside, while the others go on."""


@dataclass(frozen=True)
class RowTrainer:
    """Trains single rows."""

    comparison: Comparison
    pairs: RunShards
    data: Path
    runs: CompareRuns
    vgg_weights: Path | None
    plan: cluster.WorkerPlan
    progress: bool
    """Whether a training draws its live line."""

    def __call__(self, row: Row) -> Trained:
        """The row's network: trained now, continued, or trained by an earlier command.

        Raises:
            one of ROW_ERRORS: this row cannot be trained.
        """
        name = self.comparison.run_name(row.name)
        folder = run_folder.run_folder(self.data, name)
        if not run_folder.is_finished(folder):
            train(
                self.comparison.shards,
                row_config(row, self.comparison.changes, self.comparison.steps),
                data=self.data,
                name=name,
                resume=run_folder.is_run(folder),
                vgg_weights=self.vgg_weights,
                run_id=self.runs.child(row),
                register=None,
                progress=self.progress,
                plan=self.plan,
                pairs=self.pairs,
                keep="last",
            )
        return load_row(self.comparison, self.data, row)


def load_row(comparison: Comparison, data: Path, row: Row) -> Trained:
    """A row's trained network.

    Raises:
        CheckpointError, RunFolderError: there is none, or it is damaged.
    """
    name = comparison.run_name(row.name)
    folder = run_folder.run_folder(data, name)
    stored = checkpoint.load(folder / run_folder.MODEL)
    config = row_config(row, comparison.changes, comparison.steps)
    return Trained(stored.model, config, name, run_folder.read_run(folder).features)


def is_trained(comparison: Comparison, data: Path, row: Row) -> bool:
    """Whether an earlier command finished the row's training."""
    return run_folder.is_finished(run_folder.run_folder(data, comparison.run_name(row.name)))


def plan_rows(rows: int, workers: int | None, concurrent: int | None) -> tuple[cluster.WorkerPlan, int]:
    """(the workers of each row, how many rows are trained at once); Ray must run.

    Args:
        rows: how many are left to train.
        workers: of each row; None: one, so that every row has the same batches however many GPUs there are.
        concurrent: None: as many as there are GPUs for, or one without GPUs.

    Raises:
        CompareError, ClusterError, SweepError: there is no room for that.
    """
    if concurrent is not None and not 1 <= concurrent <= MOST_AT_ONCE:
        raise CompareError(f"--concurrent: expected 1 to {MOST_AT_ONCE}, got {concurrent}")
    alone = cluster.plan_workers(workers or 1)
    if concurrent == 1 or rows <= 1:
        return alone, 1
    plan, _, at_once = plan_trials(
        cluster.node_resources(),
        workers=workers or 1,
        gpus_per_trial=None,
        concurrent=concurrent and min(concurrent, rows),
        num_trials=rows,
    )
    return (plan, at_once) if at_once > 1 else (alone, 1)


def train_rows(
    trainer: RowTrainer, rows: Sequence[Row], at_once: int, say: Callable[[str], None]
) -> Iterator[tuple[Row, Trained | str]]:
    """Train rows, some side by side; yields each with its network, or with the reason why it has none.

    Rows come in the order in which they end.
    """

    def outcome(row: Row) -> Trained | str:
        say(f"compare: {row.label} ({row.input}): training")
        try:
            return trainer(row)
        except ROW_ERRORS as error:
            return " ".join(str(error).split())

    if at_once == 1:
        # In this thread, where Ctrl-C arrives.
        yield from ((row, outcome(row)) for row in rows)
        return
    with ThreadPoolExecutor(at_once) as pool:
        started = {pool.submit(outcome, row): row for row in rows}
        for ended in as_completed(started):
            yield started[ended], ended.result()
