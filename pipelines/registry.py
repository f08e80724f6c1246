"""MLflow's database, experiments and runs, and the model registry with one champion.

Every function takes the tracking URI; nothing is set globally. A registered version is an MLflow model that holds a
checkpoint folder (registered/logged.py); versions before 0.3 are the folder as plain artifacts. Using one never
unpickles anything. MLflow is imported only when it is needed: the base installation resolves checkpoint folders and the
starter model without it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    from alembic.script import ScriptDirectory
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

from pipelines.registered import logged
from pipelines.registered.description import described
from preprocessing.storage import require_no_password
from sdan import STARTER, STARTERS, starter_folder
from sdan.checkpoint import DESCRIPTION, WEIGHTS

T = TypeVar("T")

MODEL = "sdan"
CHAMPION = "champion"
CHALLENGER = "challenger"
"""Alias of the version that a sweep registered last; `sdan promote` makes it champion."""
CHAMPION_URI = f"models:/{MODEL}@{CHAMPION}"
PREVIOUS_TAG = "sdan.previous_champion"
"""Tag of a champion's version: the version that was champion before it."""
ROLLED_BACK_TAG = "sdan.rolled_back"
"""Tag of a version: when `sdan rollback` last took the alias from it (UTC)."""
CHECKPOINT_TAG = "sdan.checkpoint"
"""Tag of a run: the MLflow model of its newest registered checkpoint, models:/m-...; before 0.3 an artifact folder."""
DIGEST_TAG = "sdan.checkpoint_digest"
"""Tag of a version: which checkpoint it holds, so that the same one is registered once."""

SHARDS_TAG = "sdan.trained_on"
"""Tag of the registered model: the shards of its newest version, so that a retraining knows what is new."""


EXPERIMENT = "sdan"
"""MLflow's experiment of the trainings."""
VIEW = "sdan"
VIEW_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    f"mlflow.sharedViewState.{VIEW}": json.dumps(
        {
            "orderByKey": "metrics.`main/best_psnr`",
            "orderByAsc": False,
            "selectedColumns": [
                *(
                    "attributes.`Duration`",
                    "metrics.`main/val_psnr`",
                    "metrics.`main/best_psnr`",
                    "metrics.`main/gain_over_bicubic_db`",
                ),
                *("params.`name`", "params.`train.epochs`", "params.`train.crops_per_epoch`"),
                "params.`shards`",
            ],
        }
    ),
}
"""Tags of an experiment. MLflow's page then shows charts of models, not of conversations; the second is a shared view,
which an address selects with viewStateShareKey: the columns of the table of runs, best score first."""
NOTE = "mlflow.note.content"
"""Tag of a run that MLflow's pages show as its description."""
LOCK_WAIT_S = 60.0
"""How long to wait for an sqlite database that another program has locked."""
PROBES, PROBE_TIMEOUT_S, PROBE_PAUSE_S = 3, 4.0, 1.0
"""Requests that an MLflow server may leave unanswered before it counts as dead: 14 s at most. MLflow itself retries for
minutes without a message."""


class RegistryError(ValueError):
    """A model, run or database that cannot be used; the message says what to do."""


def default_tracking_uri(data: Path) -> str:
    """MLFLOW_TRACKING_URI if set (a cluster's server), else the sqlite database DATA/mlflow.db, absolute."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _sqlite_uri(data.expanduser().resolve() / "mlflow.db")


def without_password(tracking_uri: str) -> str:
    """The URI for a message: user name and password are left out."""
    return re.sub(r"//[^/@]*@", "//", tracking_uri)


def prepare_database(tracking_uri: str) -> None:
    """Create the sqlite database, or migrate it to this MLflow's schema, before anything writes to it.

    Processes that start together wait for each other, because two concurrent migrations break the database. A server
    manages its own database; here it must only answer.

    Raises:
        RegistryError: the folder is not writable, the database is damaged, another program's or locked for longer than
            LOCK_WAIT_S, or the server does not answer.
    """
    database = _database(tracking_uri)
    if database is None:
        _check_server(tracking_uri)
        return
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with _locked(database.with_name(f"{database.name}.lock")):
            if database.exists() and _is_current(database, write=True):
                return
            _migrate(tracking_uri, database)
    except OSError as error:
        raise RegistryError(
            f"--data, {database}: expected a writable place, got {error.strerror}; choose another --data folder"
        ) from error


def create_run(tracking_uri: str, experiment: str, name: str, tags: Mapping[str, str] | None = None) -> str:
    """Create a run and return its id."""
    client = connect(tracking_uri, write=True)
    run = client.create_run(open_experiment(tracking_uri, experiment), tags=dict(tags or {}), run_name=name)
    return str(run.info.run_id)


def open_experiment(tracking_uri: str, name: str) -> str:
    """The id of the experiment, created if missing; a local database keeps its artifacts in `mlartifacts` beside it.

    Several processes may call this at once.
    """
    from mlflow.exceptions import MlflowException

    client = connect(tracking_uri, write=True)
    database = _database(tracking_uri)
    artifacts = (database.parent / "mlartifacts").as_uri() if database else None
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts, tags=VIEW_TAGS))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process created it meanwhile
            if found is None:
                raise
    for tag, value in VIEW_TAGS.items():
        if found.tags.get(tag) != value:
            client.set_experiment_tag(found.experiment_id, tag, value)
    return str(found.experiment_id)


def check_port(port: int, host: str = "127.0.0.1") -> None:
    """Check that `sdan ui` or `sdan serve` can listen on host:port.

    Args:
        host: an IP address or name of this machine.

    Raises:
        RegistryError: not a port, taken by another program (the message names a free one), or an address of another
            machine.
    """
    if not 1 <= port < 2**16:
        raise RegistryError(f"--port: expected 1 to 65535, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe, socket.socket() as other:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise RegistryError(
                    f"--host: expected an address of this machine, got {host}; use 127.0.0.1"
                ) from error
            raise RegistryError(
                f"--port {port}: expected a free port on {host}, got {(error.strerror or str(error)).lower()}; "
                f"use --port {other.getsockname()[1]}"
            ) from error


def ui_link(tracking_uri: str, server: str) -> str:
    """The address of the table of trainings on MLflow's page, with this project's columns.

    Args:
        server: where the page is served, e.g. http://127.0.0.1:5000.
    """
    experiment = open_experiment(tracking_uri, EXPERIMENT)
    query = f"workflowType=machine_learning&viewStateShareKey={VIEW}"
    return f"{server.rstrip('/')}/#/experiments/{experiment}/runs?{query}"


def log_config(tracking_uri: str, run_id: str, config: Mapping[str, Any]) -> None:
    """Log a flat config (dotted name -> value) as params.

    Params that the run already has are skipped: a sweep logs its overrides first, and a resumed run has all of them.
    """
    from mlflow.entities import Param

    client = connect(tracking_uri, write=True)
    known = _run(client, run_id, tracking_uri).data.params
    params = [Param(name, str(value)) for name, value in config.items() if name not in known]
    client.log_batch(run_id, params=params)


def register_model(tracking_uri: str, run_id: str, checkpoint: Path, name: str = MODEL) -> str:
    """Log a checkpoint folder to the run, register it as the model's next version, and return the version.

    Registering the same checkpoint again returns the same version. Another checkpoint of the same run does not touch
    the files of the older version.

    Raises:
        RegistryError: the folder is not a checkpoint, or the run is unknown.
    """
    from mlflow.exceptions import MlflowException

    _check_folder(checkpoint)
    client = connect(tracking_uri, write=True)
    run = _run(client, run_id, tracking_uri)
    digest = _digest(checkpoint)
    before_0_3 = f"{run.info.artifact_uri}/checkpoint-{digest}"
    for known in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if known.tags.get(DIGEST_TAG) == digest or known.source == before_0_3:
            return str(known.version)
    description, scores = described(checkpoint, run.data.params.get("shards"))
    model = logged.log_checkpoint(client, run, checkpoint, scores)
    client.set_tag(run_id, CHECKPOINT_TAG, logged.tag_of(model))
    client.set_tag(run_id, NOTE, description)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        DIGEST_TAG: digest,
        logged.MODEL_TAG: model.model_id,
        **{score: f"{value:.4f}" for score, value in scores.items()},
    }
    # As a source, models:/m-... would be looked up in MLflow's global database instead of the client's.
    version = client.create_model_version(
        name, model.artifact_location, run_id=run_id, description=description, tags=tags, model_id=model.model_id
    )
    return str(version.version)


def get_champion(tracking_uri: str, name: str = MODEL) -> ModelVersion | None:
    """The champion's version, or None if there is none."""
    absent = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
    return _looked_up(tracking_uri, lambda client: client.get_model_version_by_alias(name, CHAMPION), absent)


def _looked_up(tracking_uri: str, look: Callable[[MlflowClient], T], absent: tuple[str, ...]) -> T | None:
    """What `look` returns; None if there is no database yet, or MLflow's error is one of `absent`."""
    database = _database(tracking_uri)
    if database is not None and not database.is_file():
        return None  # MLflow would create the database
    from mlflow.exceptions import MlflowException

    try:
        return look(connect(tracking_uri))
    except MlflowException as error:
        if error.error_code in absent:
            return None
        raise


def set_champion(tracking_uri: str, version: str, name: str = MODEL) -> None:
    """Promote a version; its tag records the version that it replaces, for `rollback`."""
    from mlflow.exceptions import MlflowException

    client = connect(tracking_uri, write=True)
    try:
        client.get_model_version(name, version)
    except MlflowException as error:
        known = sorted(int(found.version) for found in client.search_model_versions(f"name = '{name}'"))
        expected = f"one of the versions {', '.join(map(str, known))}" if known else "a registered version"
        raise RegistryError(
            f"models:/{name}/{version}: expected {expected}, got {version if known else 'none; train a model first'}"
        ) from error
    before = get_champion(tracking_uri, name)
    if before is not None and str(before.version) == str(version):
        return
    if before is not None:
        client.set_model_version_tag(name, version, PREVIOUS_TAG, str(before.version))
    client.set_registered_model_alias(name, CHAMPION, version)


def tag_version(tracking_uri: str, version: str, tags: Mapping[str, str], name: str = MODEL) -> None:
    """Set tags of a version."""
    client = connect(tracking_uri, write=True)
    for tag, value in tags.items():
        client.set_model_version_tag(name, version, tag, value)


def remember_shards(tracking_uri: str, digest: str, name: str = MODEL) -> None:
    """Record which shards the newest version was trained on (ShardIndex.digest), promoted or not."""
    connect(tracking_uri, write=True).set_registered_model_tag(name, SHARDS_TAG, digest)


def remembered_shards(tracking_uri: str, name: str = MODEL) -> str | None:
    """The digest that `remember_shards` recorded last; None before the first."""
    absent = ("RESOURCE_DOES_NOT_EXIST",)
    model = _looked_up(tracking_uri, lambda client: client.get_registered_model(name), absent)
    return str(model.tags[SHARDS_TAG]) if model is not None and SHARDS_TAG in model.tags else None


def rollback(tracking_uri: str, name: str = MODEL) -> tuple[str, str]:
    """Restore the previous champion; returns (current version, restored version).

    Raises:
        RegistryError: there is no champion, or none before it.
    """
    champion = get_champion(tracking_uri, name)
    if champion is None:
        raise RegistryError(
            f"models:/{name}@{CHAMPION}: expected a champion to roll back, got none; train a model first"
        )
    previous = champion.tags.get(PREVIOUS_TAG)
    if previous is None:
        raise RegistryError(
            f"models:/{name}@{CHAMPION}: expected an earlier champion, got none; version {champion.version} is the "
            "first"
        )
    connect(tracking_uri, write=True).set_registered_model_alias(name, CHAMPION, previous)
    rolled_back = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    tag_version(tracking_uri, str(champion.version), {ROLLED_BACK_TAG: rolled_back}, name)
    return str(champion.version), previous


def resolve_model(tracking_uri: str, model: str | Path, cache: Path | None = None) -> Path:
    """The local checkpoint folder of a model URI: a folder, runs:/RUN_ID[/PATH], models:/sdan@champion, or a name
    of STARTERS.

    Remote artifacts are downloaded into `cache`, or into a temporary folder if `cache` is None.

    Raises:
        RegistryError: no such folder, run, version or alias, or it holds no checkpoint.
    """
    text = str(model)
    if text.startswith("runs:/"):
        run_id, _, path = text.removeprefix("runs:/").partition("/")
        client = connect(_existing(tracking_uri, text))
        run = _run(client, run_id, tracking_uri)
        path = path or run.data.tags.get(CHECKPOINT_TAG, "")
        if not path:
            raise RegistryError(
                f"{text}: expected a run with a registered checkpoint, got none; did its training finish?"
            )
        source = logged.checkpoint_of_tag(client, path) or f"{run.info.artifact_uri}/{path}"
    elif text.startswith("models:/"):
        source = _source(tracking_uri, text)
    elif text in STARTERS:
        source = str(starter_folder(text))
    else:
        source = text
    folder = _local(source, text, tracking_uri, cache)
    _check_folder(folder, text)
    return folder


def _source(tracking_uri: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    client = connect(_existing(tracking_uri, uri))
    name, at, alias = uri.removeprefix("models:/").partition("@")
    try:
        if at:
            return logged.checkpoint_of_version(client.get_model_version_by_alias(name, alias))
        name, slash, version = name.partition("/")
        if slash:
            return logged.checkpoint_of_version(client.get_model_version(name, version))
    except MlflowException as error:
        if (name, alias) == (MODEL, CHAMPION):
            raise RegistryError(
                f"{uri}: expected a champion, got none yet; run `sdan train` first, or use --model {STARTER}"
            ) from error
        raise RegistryError(
            f"{uri}: expected a registered model, got none of that name; see the Models page of the MLflow UI"
        ) from error
    raise RegistryError(f"--model: expected models:/NAME@ALIAS or models:/NAME/VERSION, got {uri}")


def _local(source: str, asked: str, tracking_uri: str, cache: Path | None) -> Path:
    served = source.startswith("mlflow-artifacts:")  # mlflow-artifacts:/..., by the MLflow server itself
    if "://" not in source and not served:
        return Path(source).expanduser()
    if source.startswith("file://"):
        return Path(unquote(source.removeprefix("file://")))
    from mlflow.artifacts import download_artifacts

    require_no_password(source)
    target = cache or Path(tempfile.mkdtemp(prefix="sdan-model-"))
    target.mkdir(parents=True, exist_ok=True)
    try:
        return Path(download_artifacts(artifact_uri=source, dst_path=str(target), tracking_uri=tracking_uri))
    except Exception as error:  # every artifact store raises its own errors
        if cache is None:
            shutil.rmtree(target, ignore_errors=True)
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise RegistryError(f"{asked}: expected a checkpoint at {source}, got {reason}; check the address") from error


def _check_folder(folder: Path, asked: str | None = None) -> None:
    label = asked or str(folder)
    if not folder.is_dir():
        raise RegistryError(
            f"{label}: expected a checkpoint folder, got none; use runs:/RUN_ID, {CHAMPION_URI} or {STARTER}"
        )
    missing = [name for name in (WEIGHTS, DESCRIPTION) if not (folder / name).is_file()]
    if missing:
        raise RegistryError(
            f"{label}: expected a checkpoint folder, got one without {' and '.join(missing)}; check the path"
        )


def _digest(folder: Path) -> str:
    """Eight hexadecimal digits of a hash of the checkpoint's files."""
    digest = hashlib.sha256()
    for name in (WEIGHTS, DESCRIPTION):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:8]


def limit_requests() -> None:
    """Let MLflow's client give up after about a minute, where it would repeat a request for up to 15, and keep it from
    printing the server's address, which may hold a password, at the end of each run."""
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds


def connect(tracking_uri: str, *, write: bool = False) -> MlflowClient:
    """A client of MLflow, after a check that the database can be used or the server answers.

    Args:
        write: also wait until the sqlite database can be written.

    Raises:
        RegistryError: as `prepare_database`.
    """
    from mlflow import MlflowClient

    limit_requests()
    database = _database(tracking_uri)
    if database is None:
        _check_server(tracking_uri)
    elif database.exists() and not _is_current(database, write=write):
        raise RegistryError(
            f"{database}: expected the schema of this MLflow, got an older one; run `sdan doctor`, which migrates it"
        )
    return MlflowClient(tracking_uri=tracking_uri)


def _run(client: MlflowClient, run_id: str, tracking_uri: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        raise RegistryError(
            f"runs:/{run_id}: expected a run in {without_password(tracking_uri)}, got none; see the MLflow UI"
        ) from error


def _existing(tracking_uri: str, asked: str) -> str:
    database = _database(tracking_uri)
    if database is not None and not database.is_file():
        raise RegistryError(
            f"{asked}: expected an MLflow database at {database}, got none yet; "
            f"train a model first, check --data, or use --model {STARTER}"
        )
    return tracking_uri


def _sqlite_uri(database: Path) -> str:
    """The URI of an sqlite database. SQLAlchemy unquotes the path in it, and ends it at a "?".

    Where anything must be quoted, "/" is quoted, too: MLflow creates the parent folder of the path as it is written.
    """
    path = str(database)
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise RegistryError(
            f"--data, {path!r}: expected a name in UTF-8, which MLflow needs, got other bytes; choose another folder"
        ) from error
    return "sqlite:///" + (quote(path, safe="") if re.search("[%?#]", path) else path)


def _database(tracking_uri: str) -> Path | None:
    """The file of an sqlite URI; None for other URIs."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return Path(unquote(tracking_uri.removeprefix("sqlite:///").partition("?")[0]))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock, even after a kill


def _is_current(database: Path, *, write: bool) -> bool:
    """Whether the database has the schema of this MLflow; False if it is older, or has no tables yet.

    Raises:
        RegistryError: as `prepare_database`, or a newer MLflow wrote it.
    """
    from alembic.util import CommandError

    revision = _revision(database, write=write)
    scripts = _migrations()
    if revision is None or revision == scripts.get_current_head():
        return revision is not None
    try:
        scripts.get_revision(revision)
    except CommandError as error:
        raise RegistryError(
            f"{database}: expected a database of this MLflow or an older one, got revision {revision}; "
            "update MLflow, or choose another --data folder"
        ) from error
    return False


def _revision(database: Path, *, write: bool) -> str | None:
    """The revision of MLflow's schema in the database; None if it has no tables yet. Waits while it is locked.

    Args:
        write: also check that the database can be written, and that its pages are intact.
    """
    deadline, waiting = time.monotonic() + LOCK_WAIT_S, False
    while True:
        try:
            return _read_revision(database, write)
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise RegistryError(
                    f"{database}: expected MLflow's database, got {_first_line(error)}; "
                    "restore it from a backup, or choose another --data folder"
                ) from error
            if time.monotonic() > deadline:
                raise RegistryError(
                    f"{database}: expected access within {LOCK_WAIT_S:.0f} s, got a database that another program "
                    "keeps locked; wait for that program or end it, and try again"
                ) from error
        if not waiting:
            logging.getLogger(__name__).warning(
                "%s: another program has locked the database; waiting up to %.0f s", database, LOCK_WAIT_S
            )
            waiting = True
        time.sleep(0.2)


def _read_revision(database: Path, write: bool) -> str | None:
    if not database.is_file():
        raise sqlite3.DatabaseError("a folder")
    mode = "rw" if write else "ro"
    connection = sqlite3.connect(f"file:{quote(str(database))}?mode={mode}", uri=True, timeout=0, isolation_level=None)
    try:
        if write:
            connection.execute("BEGIN IMMEDIATE")
            damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if damage != "ok":
                raise sqlite3.DatabaseError(f"a damaged file ({' '.join(damage.split())})")
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        if tables and not {"alembic_version", "experiments"} & set(tables):
            raise sqlite3.DatabaseError(f"another program's (tables {', '.join(sorted(tables)[:3])})")
        known = "SELECT version_num FROM alembic_version"
        row = connection.execute(known).fetchone() if "alembic_version" in tables else None
        return str(row[0]) if row else None
    finally:
        connection.close()


@lru_cache(maxsize=1)
def _migrations() -> ScriptDirectory:
    """MLflow's migrations of its database."""
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    return ScriptDirectory.from_config(_get_alembic_config(""))


def _migrate(tracking_uri: str, database: Path) -> None:
    """Create the database, or bring it to this MLflow's schema. A new one is made aside, so that none is half made."""
    fresh = not database.exists() or not database.stat().st_size
    aside = database.with_name(f"{database.name}.new")
    try:
        if fresh:
            aside.unlink(missing_ok=True)
            _upgrade(_sqlite_uri(aside))
            aside.replace(database)
        else:
            _upgrade(tracking_uri)
    except OSError:
        raise
    except Exception as error:  # SQLAlchemy's, alembic's and MLflow's, each of many kinds
        reason = str(error).strip().splitlines() or ["no message"]
        raise RegistryError(
            f"{database}: expected a database that MLflow can upgrade, got {type(error).__name__}: {reason[0][:200]}; "
            "restore it from a backup, or choose another --data folder"
        ) from error


def _upgrade(uri: str) -> None:
    """What `mlflow db upgrade` does, in this process: its command would import MLflow again, for many seconds."""
    from mlflow.db import upgrade

    assert upgrade.callback is not None  # the function of the click command
    quiet = [logging.getLogger(name) for name in ("mlflow.store.db.utils", "alembic")]
    levels = [logger.level for logger in quiet]
    for logger in quiet:
        logger.setLevel(logging.WARNING)
    try:
        upgrade.callback(uri)
    finally:
        for logger, level in zip(quiet, levels, strict=True):
            logger.setLevel(level)


def _check_server(tracking_uri: str) -> None:
    """Check that the server of an http(s) URI, or a database server, answers."""
    if re.match(r"https?://", tracking_uri):
        reason = _unanswered(tracking_uri)
    elif re.match(r"(postgresql|mysql|mssql)\b", tracking_uri):
        reason = _unreachable(tracking_uri)
    else:
        return  # a folder, or a service with its own client
    if reason is not None:
        raise RegistryError(
            f"MLFLOW_TRACKING_URI={without_password(tracking_uri)}: expected an answer from MLflow, got {reason}; "
            "start the server, or unset MLFLOW_TRACKING_URI"
        )


def _unanswered(tracking_uri: str) -> str | None:
    """Why an MLflow server does not answer; None if it does. Any answer counts but a gateway's that finds no server."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    reason = "none"
    for attempt in range(PROBES):
        if attempt:
            time.sleep(PROBE_PAUSE_S)
        try:
            answer = http_request(
                get_default_host_creds(tracking_uri),
                *("/health", "GET"),
                **{"max_retries": 0, "timeout": PROBE_TIMEOUT_S, "raise_on_status": False},
            )
        except Exception as error:  # MLflow wraps the errors of requests and urllib3 in several ways
            reason = _root_cause(error)
            continue
        if answer.status_code not in (502, 503, 504):
            return None
        reason = f"HTTP status {answer.status_code}"
    return reason


def _unreachable(tracking_uri: str) -> str | None:
    """Why a database server does not answer; None if it does."""
    import sqlalchemy

    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")
    try:
        engine = sqlalchemy.create_engine(tracking_uri)
        try:
            engine.connect().close()
        finally:
            engine.dispose()
    except Exception as error:  # a missing driver, or any of the drivers' own errors
        return without_password(_first_line(error))
    return None


def _root_cause(error: BaseException) -> str:
    """The last words of the first error of a chain, e.g. "Connection refused"."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return str(getattr(error, "strerror", None) or _first_line(error) or type(error).__name__)[:200]


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
