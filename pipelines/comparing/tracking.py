"""What a comparison writes to MLflow: a parent run with the tables and the grid, and a child run per row.

Nothing of it is registered: rows are trained to be compared, not to be used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from pipelines import registry
from pipelines.comparing.rows import Row
from pipelines.comparing.state import Comparison, RowScores
from pipelines.registry import RegistryError
from tuning.tracking import PARENT_TAG, REASON_TAG

EXPERIMENT = "sdan-compare"
ROW_TAG = "sdan.compare_row"


class CompareRuns:
    """The runs of one comparison.

    Args:
        tracking_uri: of MLflow; its database is prepared here.
    """

    def __init__(self, tracking_uri: str, comparison: Comparison) -> None:
        registry.prepare_database(tracking_uri)
        self.uri, self.comparison = tracking_uri, comparison

    def with_parent(self, out: Path) -> Comparison:
        """The comparison with its parent run, which is created and written to compare.json if there is none."""
        if not self.comparison.parent_run:
            name = f"table {self.comparison.table}, {out.name}"
            parent = registry.create_run(self.uri, EXPERIMENT, name)
            options = {"table": self.comparison.table, "shards": self.comparison.shards, **self.comparison.changes}
            registry.log_config(self.uri, parent, options | {"steps": self.comparison.steps})
            self.comparison = replace(self.comparison, parent_run=parent)
            self.comparison.write(out)
        return self.comparison

    def child(self, row: Row) -> str:
        """The id of a row's run: the one that an earlier command started, else a new one."""
        client = registry.connect(self.uri, write=True)
        experiment = registry.open_experiment(self.uri, EXPERIMENT)
        query = f"tags.`{PARENT_TAG}` = '{self.comparison.parent_run}' and tags.`{ROW_TAG}` = '{row.name}'"
        found = client.search_runs([experiment], filter_string=query, max_results=1)
        if found:
            return str(found[0].info.run_id)
        tags = {PARENT_TAG: self.comparison.parent_run, ROW_TAG: row.name}
        return registry.create_run(self.uri, EXPERIMENT, f"{row.label} ({row.input})", tags)

    def finished(self, row: Row, scores: RowScores) -> None:
        """Log a row's scores to its run and end it."""
        run, client = self.child(row), registry.connect(self.uri, write=True)
        values = {
            f"{protocol}/{name}": value for protocol, found in scores.scores.items() for name, value in found.items()
        }
        values |= {"parameters": scores.parameters, "ms_per_megapixel": scores.ms_per_megapixel}
        now = int(time.time() * 1000)
        known = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        client.log_batch(run, metrics=[Metric(name, value, now, 0) for name, value in known.items()])
        if scores.features:
            registry.log_config(self.uri, run, {"feature_network": scores.features})
        client.set_tag(run, REASON_TAG, "")
        client.set_terminated(run, "FINISHED")

    def set_aside(self, row: Row, reason: str) -> None:
        """End the run of a row that could not be trained or scored."""
        run, client = self.child(row), registry.connect(self.uri, write=True)
        client.set_tag(run, REASON_TAG, reason[:500])
        client.set_terminated(run, "FAILED")

    def artifacts(self, paths: list[Path]) -> None:
        """Log files of the output to the parent run; a newer one replaces an older one."""
        client = registry.connect(self.uri, write=True)
        for path in paths:
            if path.is_file():
                client.log_artifact(self.comparison.parent_run, str(path))

    @contextmanager
    def running(self) -> Iterator[None]:
        """The parent run is RUNNING inside; then FINISHED, or KILLED after an error or Ctrl-C."""
        client = registry.connect(self.uri, write=True)
        client.update_run(self.comparison.parent_run, status="RUNNING")
        status = "KILLED"
        try:
            yield
            status = "FINISHED"
        finally:
            # If MLflow is dead, the error that ended the comparison says more than MLflow's own.
            with suppress(*(() if status == "FINISHED" else (RegistryError, MlflowException))):
                registry.connect(self.uri, write=True).set_terminated(self.comparison.parent_run, status)
