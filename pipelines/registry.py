"""Thin helpers over MLflow: its database, runs, and the model registry with one champion.

Every call names its tracking URI; nothing is set globally. A registered model is a checkpoint folder logged as plain
artifacts (model.safetensors, config.json), so that using one never unpickles anything.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mlflow import MlflowClient
from mlflow.entities import Param
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

MODEL = "sdan"
CHAMPION = "champion"
PREVIOUS_TAG = "sdan.previous_champion"
"""On a champion's version: the version that was champion before it."""
CHECKPOINT_TAG = "sdan.checkpoint"
"""On a run: the folder of its artifacts that holds the checkpoint registered last."""
_CHECKPOINT_FILES = ("model.safetensors", "config.json")
STARTER = "starter"
"""The URI of the model that comes with the package."""
STARTER_FOLDER = Path(__file__).parent / "models" / STARTER

SHARDS_TAG = "sdan.trained_on"
"""On the registered model: what its newest version was trained on, so that a retraining knows what is new."""


class RegistryError(ValueError):
    """A model, run or database that cannot be used; the message is one line that says what to do."""


def default_tracking_uri(data: Path) -> str:
    """MLFLOW_TRACKING_URI when set (a cluster's server), else the sqlite database DATA/mlflow.db, absolute."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{data.expanduser().resolve() / 'mlflow.db'}"


def prepare_database(tracking_uri: str) -> None:
    """Creates the sqlite database, or brings it up to this MLflow's schema, once and before anyone writes.

    Processes that start together wait for each other: two that migrate at once leave a broken database. A server's
    database is the server's matter; nothing happens for an http(s) URI.
    """
    database = _database(tracking_uri)
    if database is None:
        return
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with _locked(database.with_name(f"{database.name}.lock")):
            if database.is_file() and _is_current(tracking_uri, database):
                return
            _migrate(tracking_uri, database)
    except OSError as error:
        raise RegistryError(
            f"{database}: cannot write there ({error.strerror}); choose another --data folder"
        ) from error


def create_run(tracking_uri: str, experiment: str, name: str, tags: Mapping[str, str] | None = None) -> str:
    """A new run's id. A new experiment in a local database keeps its artifacts in `mlartifacts` beside it."""
    client = MlflowClient(tracking_uri=tracking_uri)
    run = client.create_run(open_experiment(tracking_uri, experiment), tags=dict(tags or {}), run_name=name)
    return str(run.info.run_id)


def open_experiment(tracking_uri: str, name: str) -> str:
    """The id of the experiment, which is made where it does not exist."""
    client = MlflowClient(tracking_uri=tracking_uri)
    database = _database(tracking_uri)
    artifacts = (database.parent / "mlartifacts").as_uri() if database else None
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process made it meanwhile
            if found is None:
                raise
    return str(found.experiment_id)


def log_config(tracking_uri: str, run_id: str, config: Mapping[str, Any]) -> None:
    """Logs a config as params with dotted names; nested mappings are flattened.

    What the run already has is left: a sweep logs its overrides first, and a resumed run all of them.
    """
    client = MlflowClient(tracking_uri=tracking_uri)
    known = _run(client, run_id, tracking_uri).data.params
    params = [Param(name, str(value)) for name, value in _flatten(config).items() if name not in known]
    client.log_batch(run_id, params=params)


def register_model(tracking_uri: str, run_id: str, checkpoint: Path, name: str = MODEL) -> str:
    """Logs the checkpoint folder to the run and makes it the next version of the model; returns the version.

    The same checkpoint again gives the same version; another of the same run leaves the older version's files alone.

    Raises RegistryError when the folder is no checkpoint or the run is unknown.
    """
    _check_folder(checkpoint)
    client = MlflowClient(tracking_uri=tracking_uri)
    run = _run(client, run_id, tracking_uri)
    path = f"checkpoint-{_digest(checkpoint)}"
    source = f"{run.info.artifact_uri}/{path}"
    for known in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if known.source == source:
            return str(known.version)
    for file in sorted(checkpoint.iterdir()):
        if file.is_file() and file.name != "trainer.pt":  # the optimizer's state is for resuming, not for using
            client.log_artifact(run_id, str(file), path)
    client.set_tag(run_id, CHECKPOINT_TAG, path)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return str(client.create_model_version(name, source, run_id=run_id).version)


def get_champion(tracking_uri: str, name: str = MODEL) -> ModelVersion | None:
    """The champion's version, or None while there is none."""
    database = _database(tracking_uri)
    if database is not None and not database.is_file():
        return None  # asking must not make a database
    try:
        return MlflowClient(tracking_uri=tracking_uri).get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def set_champion(tracking_uri: str, version: str, name: str = MODEL) -> None:
    """Promotes a version; it remembers whom it replaced, for rollback()."""
    client = MlflowClient(tracking_uri=tracking_uri)
    try:
        client.get_model_version(name, version)
    except MlflowException as error:
        raise RegistryError(f"models:/{name}/{version}: no such version; register a model first") from error
    before = get_champion(tracking_uri, name)
    if before is not None and str(before.version) == str(version):
        return
    if before is not None:
        client.set_model_version_tag(name, version, PREVIOUS_TAG, str(before.version))
    client.set_registered_model_alias(name, CHAMPION, version)


def remember_shards(tracking_uri: str, digest: str, name: str = MODEL) -> None:
    """Note what the newest version was trained on (ShardIndex.digest), promoted or not."""
    MlflowClient(tracking_uri=tracking_uri).set_registered_model_tag(name, SHARDS_TAG, digest)


def remembered_shards(tracking_uri: str, name: str = MODEL) -> str | None:
    """What `remember_shards` noted last."""
    tags = MlflowClient(tracking_uri=tracking_uri).get_registered_model(name).tags
    return str(tags[SHARDS_TAG]) if SHARDS_TAG in tags else None


def rollback(tracking_uri: str, name: str = MODEL) -> tuple[str, str]:
    """Puts back the champion before the present one; returns (version given up, version put back).

    Raises RegistryError when there is no champion, or none before it.
    """
    champion = get_champion(tracking_uri, name)
    if champion is None:
        raise RegistryError(f"no champion of {name!r} yet, so nothing to roll back; train a model first")
    previous = champion.tags.get(PREVIOUS_TAG)
    if previous is None:
        raise RegistryError(f"version {champion.version} is the first champion of {name!r}; nothing to roll back to")
    MlflowClient(tracking_uri=tracking_uri).set_registered_model_alias(name, CHAMPION, previous)
    return str(champion.version), previous


def resolve_model(tracking_uri: str, model: str | Path, cache: Path | None = None) -> Path:
    """The local checkpoint folder of a model URI: a folder, runs:/RUN_ID[/PATH], models:/sdan@champion, or "starter".

    Artifacts that are not on this machine are downloaded, into `cache` where given, else a temporary folder.

    Raises RegistryError: no such folder, run, version or alias, or it holds no checkpoint.
    """
    text = str(model)
    if text.startswith("runs:/"):
        run_id, _, path = text.removeprefix("runs:/").partition("/")
        client = MlflowClient(tracking_uri=_existing(tracking_uri, text))
        run = _run(client, run_id, tracking_uri)
        path = path or run.data.tags.get(CHECKPOINT_TAG, "")
        if not path:
            raise RegistryError(f"{text}: this run has no registered checkpoint; did its training end?")
        source = f"{run.info.artifact_uri}/{path}"
    elif text.startswith("models:/"):
        source = _source(tracking_uri, text)
    elif text == STARTER:
        source = str(STARTER_FOLDER)
    else:
        source = text
    folder = _local(source, text, tracking_uri, cache)
    _check_folder(folder, text)
    return folder


def _source(tracking_uri: str, uri: str) -> str:
    client = MlflowClient(tracking_uri=_existing(tracking_uri, uri))
    name, at, alias = uri.removeprefix("models:/").partition("@")
    try:
        if at:
            return str(client.get_model_version_by_alias(name, alias).source)
        name, slash, version = name.partition("/")
        if slash:
            return str(client.get_model_version(name, version).source)
    except MlflowException as error:
        if (name, alias) == (MODEL, CHAMPION):
            raise RegistryError(
                f"{uri}: no champion yet; run `sdan train` or `sdan retrain` first, or give --model {STARTER}"
            ) from error
        raise RegistryError(f"{uri}: the registry has no such model; see the Models page of the MLflow UI") from error
    raise RegistryError(f"{uri}: expected models:/NAME@ALIAS or models:/NAME/VERSION")


def _local(source: str, asked: str, tracking_uri: str, cache: Path | None) -> Path:
    if "://" not in source:
        return Path(source).expanduser()
    if source.startswith("file://"):
        return Path(unquote(source.removeprefix("file://")))
    from mlflow.artifacts import download_artifacts

    target = cache or Path(tempfile.mkdtemp(prefix="sdan-model-"))
    target.mkdir(parents=True, exist_ok=True)
    try:
        return Path(download_artifacts(artifact_uri=source, dst_path=str(target), tracking_uri=tracking_uri))
    except Exception as error:  # every artifact store has errors of its own
        if cache is None:
            shutil.rmtree(target, ignore_errors=True)
        raise RegistryError(f"{asked}: cannot fetch {source} ({type(error).__name__}: {_first_line(error)})") from error


def _check_folder(folder: Path, asked: str | None = None) -> None:
    label = asked or str(folder)
    if not folder.is_dir():
        raise RegistryError(
            f"{label}: no such checkpoint folder; give a folder, runs:/RUN_ID or models:/{MODEL}@{CHAMPION}"
        )
    missing = [name for name in _CHECKPOINT_FILES if not (folder / name).is_file()]
    if missing:
        raise RegistryError(f"{label}: not a checkpoint, it lacks {' and '.join(missing)}")


def _digest(folder: Path) -> str:
    """Eight hexadecimal digits of what stands in the checkpoint's files."""
    digest = hashlib.sha256()
    for name in _CHECKPOINT_FILES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:8]


def _run(client: MlflowClient, run_id: str, tracking_uri: str) -> Any:
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        raise RegistryError(f"runs:/{run_id}: no such run in {tracking_uri}") from error


def _existing(tracking_uri: str, asked: str) -> str:
    database = _database(tracking_uri)
    if database is not None and not database.is_file():
        raise RegistryError(
            f"{asked}: no MLflow database at {database} yet; "
            f"train a model first, check --data, or give --model {STARTER}"
        )
    return tracking_uri


def _database(tracking_uri: str) -> Path | None:
    return Path(tracking_uri.removeprefix("sqlite:///")) if tracking_uri.startswith("sqlite:///") else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases it, a kill too


def _is_current(tracking_uri: str, database: Path) -> bool:
    import sqlalchemy
    from mlflow.store.db import utils

    engine = sqlalchemy.create_engine(tracking_uri)
    try:
        return bool(utils._get_schema_version(engine) == utils._get_latest_schema_revision())
    except sqlalchemy.exc.DatabaseError as error:
        raise RegistryError(f"{database}: not a database that MLflow can read; move it away and start again") from error
    finally:
        engine.dispose()


def _migrate(tracking_uri: str, database: Path) -> None:
    """In a process of its own, so that alembic's logging set-up does not become ours."""
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", tracking_uri]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RegistryError(f"{database}: cannot prepare MLflow's database: {lines[-1]}")


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
