"""Whether MLflow answers."""

from __future__ import annotations

from pathlib import Path

from pipelines.checks.finding import Finding


def mlflow(data: Path) -> Finding:
    """Ask the tracking server, or the database in `data`, for its experiments."""
    from pipelines import registry

    uri = registry.default_tracking_uri(data)
    registry.prepare_database(uri)
    runs = len(registry.connect(uri).search_experiments())
    return Finding("MLflow", "ok", f"{registry.without_password(uri)}, {runs} experiments")
