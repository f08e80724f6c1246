"""`sdan compare`: trains and scores the rows of a table, and writes the table, its CSV and a grid of crops."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipelines import cluster, registry
from pipelines import config as configs
from pipelines.comparing import state
from pipelines.comparing.grid import ROWS as GRID_ROWS
from pipelines.comparing.grid import write_grid
from pipelines.comparing.page import write_page
from pipelines.comparing.rows import TABLES, CompareError, Row, chosen_rows, row_config
from pipelines.comparing.run import RowTrainer, is_trained, load_row, plan_rows, train_rows
from pipelines.comparing.score import Scorer
from pipelines.comparing.state import Comparison, RowScores
from pipelines.comparing.table import as_csv, markdown
from pipelines.comparing.tracking import CompareRuns
from pipelines.evaluate import check_request
from pipelines.loader import ShardsError
from pipelines.sweeping.trainer import cost
from preprocessing.storage import held, write_atomically


@dataclass(frozen=True)
class Options:
    """The options of `sdan compare`; the values are checked by `compare`."""

    table: int
    rows: tuple[str, ...] = ()
    """Names of rows; empty: all of the table."""
    steps: int | None = None
    """Optimizer steps a row; None: the epochs of each row's config, 300 in the paper's."""
    assignments: tuple[str, ...] = ()
    """--set, for every row."""
    split: str = "val"
    crops: int = 64
    workers: int | None = None
    concurrent: int | None = None


@dataclass(frozen=True)
class Result:
    """What a comparison came to."""

    out: Path
    table: str
    """Markdown."""
    finished: int
    set_aside: dict[str, str]
    """Row -> why it has no scores."""


def compare(
    shards: str,
    options: Options,
    *,
    data: Path,
    out: Path,
    vgg_weights: Path | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Train and score the rows that are not finished, and write the table.

    Args:
        shards: folder or URI.
        out: the output folder (state.py); a comparison that it holds is continued.
        vgg_weights: as for `train`.
        say: takes lines about the progress.

    Raises:
        CompareError, ConfigError, ShardsError: before anything is written.
        ClusterError, RegistryError: Ray or MLflow cannot be used.
    """
    rows = chosen_rows(options.table, options.rows)
    check_request(options.split, None, options.crops)
    changes = configs.parse_assignments(options.assignments)
    crop_px = _check_configs(options, changes)
    shards = shards if "://" in shards else str(Path(shards).resolve())
    pairs, scored = state.open_shards(out, shards, options.split)
    wanted = Comparison(
        options.table, shards, changes, options.steps, options.split, options.crops, scored.digest
    )  # fmt: skip
    comparison, goes_on = state.open_comparison(out, wanted)
    if goes_on:
        say(f"compare: goes on with {out}")
    scorer = Scorer(scored, crop_px, options.crops, out)
    _check_shards(rows, comparison, scorer)
    with held(out) as ours:
        if not ours:
            raise CompareError(
                f"{out}: expected a folder in which no other command works, got one in use; "
                "wait until that ends, or choose another -o"
            )
        pairs.write(out)
        runs = CompareRuns(registry.default_tracking_uri(data), comparison)
        comparison = runs.with_parent(out)
        scorer.save_targets()
        work = _Work(comparison, rows, out, data, scorer, runs, say)
        with runs.running():
            work.pictures()
            work.networks(options, pairs, vgg_weights and vgg_weights.resolve())
            work.costs()
            table = work.publish()
    finished = sum(isinstance(found, RowScores) for _, found in work.scored())
    return Result(out, table, finished, dict(work.reasons))


def summary(result: Result) -> str:
    """What `sdan compare` prints at the end."""
    files = f"written to {result.out}: report.html, the table as .md and .csv, {state.GRID}, rows/, crops/"
    lines = [result.table, f"{result.finished} rows finished, {len(result.set_aside)} set aside", files]
    return "\n".join(lines)


def _check_configs(options: Options, changes: dict[str, str]) -> int:
    """Check the config of every row of the table; returns train.crop_px, the same for all."""
    rows = [row for row in TABLES[options.table] if row.picture is None]
    sides = {row_config(row, changes, options.steps).train.crop_px for row in rows}
    assert len(sides) == 1, sides
    return sides.pop()


def _check_shards(rows: Sequence[Row], comparison: Comparison, scorer: Scorer) -> None:
    """Raise ShardsError if no network of `rows` fits the shards; single rows that do not are set aside later."""
    errors = []
    networks = [row for row in rows if row.picture is None]
    for row in networks:
        try:
            scorer.check(row_config(row, comparison.changes, comparison.steps))
        except ShardsError as error:
            errors.append(error)
    if networks and len(errors) == len(networks):
        raise errors[0]


class _Work:
    """The rows of one command: which are finished, and why the others are not."""

    def __init__(
        self,
        comparison: Comparison,
        rows: Sequence[Row],
        out: Path,
        data: Path,
        scorer: Scorer,
        runs: CompareRuns,
        say: Callable[[str], None],
    ) -> None:
        self.comparison, self.rows, self.out, self.data = comparison, rows, out, data
        self.scorer, self.runs, self.say = scorer, runs, say
        self.reasons: dict[str, str] = {}

    def pictures(self) -> None:
        """Score the bicubic rows."""
        for row in self._unfinished(networks=False):
            if row.picture == "rendering" and not self.scorer.has_rendering:
                self._set_aside(row, "these pairs have no RAW, so there is no rendering of it")
            else:
                self._finish(row, self.scorer.score_picture(row))

    def networks(self, options: Options, pairs: state.RunShards, vgg_weights: Path | None) -> None:
        """Train and score the other rows."""
        rows = []
        for row in self._unfinished(networks=True):
            try:
                self.scorer.check(row_config(row, self.comparison.changes, self.comparison.steps))
                rows.append(row)
            except ShardsError as error:
                self._set_aside(row, str(error))
        # Scored first: nothing has to be trained for these.
        for row in [row for row in rows if is_trained(self.comparison, self.data, row)]:
            self._finish(row, self.scorer.score_network(row, load_row(self.comparison, self.data, row)))
            rows.remove(row)
        if not rows:
            return
        cluster.start_ray()
        plan, at_once = plan_rows(len(rows), options.workers, options.concurrent)
        trainer = RowTrainer(self.comparison, pairs, self.data, self.runs, vgg_weights, plan, progress=at_once == 1)
        for row, trained in train_rows(trainer, rows, at_once, self.say):
            if isinstance(trained, str):
                self._set_aside(row, trained)
            else:
                self._finish(row, self.scorer.score_network(row, trained))

    def costs(self) -> None:
        """Measure the speed of each network that has none yet: one after the other, when no row is training."""
        for row, found in self.scored():
            if isinstance(found, RowScores) and row.picture is None and found.ms_per_megapixel is None:
                model = load_row(self.comparison, self.data, row).model.to(self.scorer.plan.device)
                timed = replace(found, ms_per_megapixel=cost(model, self.scorer.held), device=self._device())
                timed.write(self.out)
                self.runs.finished(row, timed)

    def scored(self) -> list[tuple[Row, RowScores | str]]:
        """Each row of the table that was asked for or is finished, with its scores or why it has none."""
        found: list[tuple[Row, RowScores | str]] = []
        for row in TABLES[self.comparison.table]:
            scores = state.read_scores(self.out, row.name)
            if scores is not None:
                found.append((row, scores))
            elif row in self.rows:
                found.append((row, self.reasons.get(row.name, "not trained yet; run the same command to go on")))
        return found

    def publish(self) -> str:
        """Write the table and the grid of what is finished, here and to MLflow; returns the Markdown."""
        rows = self.scored()
        text = markdown(self.comparison, rows)
        name = f"table{self.comparison.table}"
        write_atomically(self.out / f"{name}.md", text)
        write_atomically(self.out / f"{name}.csv", as_csv(rows))
        tiles = [self.scorer.tiles[number] for number in self.scorer.examples(GRID_ROWS)]
        simulated = " (simulated)" if self.scorer.simulated else ""
        title = f"Table {self.comparison.table}: {self.scorer.scale}x zoom of held-out crops{simulated}"
        done = [found for _, found in rows if isinstance(found, RowScores)]
        write_grid(self.out, tiles, done, title)
        page = write_page(self.out, self.comparison, done, text)
        files = [self.out / f"{name}.md", self.out / f"{name}.csv", self.out / state.GRID, *([page] if page else [])]
        self.runs.artifacts(files)
        return text

    def _unfinished(self, *, networks: bool) -> Iterator[Row]:
        for row in self.rows:
            if (row.picture is None) == networks and state.read_scores(self.out, row.name) is None:
                yield row

    def _finish(self, row: Row, scores: RowScores) -> None:
        self.runs.finished(row, scores)
        self.say(f"compare: {row.label} ({row.input}): scored")
        self.publish()

    def _set_aside(self, row: Row, reason: str) -> None:
        self.reasons[row.name] = reason
        self.runs.set_aside(row, reason)
        self.say(f"compare: {row.label} ({row.input}): n/a: {reason}")

    def _device(self) -> str:
        device = self.scorer.plan.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"


def default_out(data: Path, table: int) -> Path:
    """DATA/compare/tableN."""
    if table not in TABLES:
        raise CompareError(f"--table: expected {' or '.join(map(str, TABLES))}, got {table}")
    return data / "compare" / f"table{table}"
