"""Which pairs a model has been trained on: new ones get more of a fine-tuning's crops, and `sdan status` counts them.

A registered model's run has the list as an artifact, because the folder of the run may be on another machine.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa

from pipelines import registry
from pipelines.loader import ShardIndex, pair_names
from pipelines.training import run_folder
from pipelines.training.run_folder import RunFolderError, RunShards
from preprocessing import schema
from preprocessing.storage import one_line

PAIRS = "pairs.txt"
"""The artifact of a run: the file names of its training pairs, one per line."""


def log_pairs(tracking_uri: str, run_id: str, index: ShardIndex) -> None:
    """Store the names of a run's training pairs with the run."""
    registry.connect(tracking_uri, write=True).log_text(run_id, "\n".join(pair_names(index)), PAIRS)


def seen_by(tracking_uri: str, run_id: str, data: Path) -> list[str] | None:
    """The names of the pairs that a run trained on; None if neither MLflow nor the data folder has them."""
    from mlflow.exceptions import MlflowException

    client = registry.connect(tracking_uri)
    try:
        if any(found.path == PAIRS for found in client.list_artifacts(run_id)):
            with tempfile.TemporaryDirectory() as folder:
                return Path(client.download_artifacts(run_id, PAIRS, folder)).read_text().splitlines()
    except (MlflowException, OSError):
        pass  # an artifact store that does not answer; the folder may have them
    for folder_of_run in run_folder.all_runs(data):
        try:
            if run_folder.read_run(folder_of_run).run_id == run_id:
                shards = RunShards.read(folder_of_run)
                return pair_names(shards.train) if shards is not None else None
        except (RunFolderError, OSError):
            continue
    return None


def describe_new(tracking_uri: str, data: Path, shards: str | None) -> str:
    """One line for `sdan status`: how many pairs of SHARDS the champion has not been trained on."""
    if shards is None:
        return "unknown before a first retraining"
    try:
        names = [path.rsplit("/", 1)[-1] for path in schema.list_shards(shards, "train")]
    except (ValueError, OSError, pa.ArrowException) as error:
        return f"unknown: {shards}: {one_line(error)[:200]}"
    champion = registry.get_champion(tracking_uri)
    seen = seen_by(tracking_uri, str(champion.run_id), data) if champion is not None else []
    if seen is None:
        return f"unknown: the pairs of version {champion.version if champion else ''} are not stored here"
    new = len(set(names) - set(seen))
    return (
        f"{new} of {len(names)} training pairs in {shards} are new to the champion; RAW: `sdan retrain ... --dry-run`"
    )
