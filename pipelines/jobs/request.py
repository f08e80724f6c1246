"""What `VERB --cluster ADDRESS` is asked to run: the command of the job, and the check of its paths.

A job runs on another machine, so a path of this one means nothing there. The rule: an `s3://` URI is fine, and so is an
absolute path below the absolute `--data DIR`, which every node mounts at the same place. With `--working-dir` the small
files that a verb reads (--exclude, --space, --vgg-weights) may also be relative paths in that folder.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

URI_SCHEMES = ("s3://", "models:/", "runs:/")
PLACES = frozenset(
    {"raw", "shards", "photos", "out", "csv", "exclude", "vgg_weights", "storage", "init", "model", "space", "s3"}
)
"""Parameters of verbs whose values are paths or URIs."""
NAMED = frozenset({"init", "model", "space"})
"""Those whose value may also be a name, such as starter or default."""
UPLOADED = frozenset({"exclude", "vgg_weights", "space"})
"""Files that are read from the working directory if it is uploaded."""
KEEPS_RUNS = frozenset({"train", "tune", "retrain", "compare"})
"""Verbs that leave runs in --data, which must then be a folder that outlives the job."""
PATH_OF_NODES = 'PATH="${HOME:-/}/venv/bin:$PATH"'
"""cluster.yaml installs sdan in ~/venv, which is not on the path of Ray's processes; images have it on their path."""
INSTALLED, UPLOADED_CODE = "sdan", "python -m pipelines.cli"
"""The command of the nodes' own sdan, and that of the code in the working directory."""


class ClusterRequestError(ValueError):
    """A job that cannot be submitted; the message says what to do."""


@dataclass(frozen=True)
class Given:
    """One parameter of a verb that was given on the command line or by an environment variable."""

    name: str
    """The Python name of the parameter."""
    option: str | None
    """As typed, e.g. --set; None: a positional argument."""
    values: tuple[Any, ...]
    """Several for options that can be repeated; (True,) for a flag."""
    flag: bool = False


def check_address(address: str) -> str:
    """The address of a job server without a slash at its end.

    Raises:
        ClusterRequestError: not http://HOST:PORT or https://HOST:PORT.
    """
    scheme, _, rest = address.rstrip("/").partition("://")
    host, _, port = rest.partition("/")[0].rpartition(":")
    if scheme not in ("http", "https") or not host or not port.isdigit():
        raise ClusterRequestError(
            f"--cluster {address}: expected the address of Ray's job server, http://HOST:8265, got another form; "
            "on the head and through `ray dashboard` it is http://127.0.0.1:8265"
        )
    if "@" in rest:
        raise ClusterRequestError(
            f"--cluster {scheme}://...@{rest.rpartition('@')[2]}: expected no password in the address, got one; "
            "use RAY_AUTH_MODE=token"
        )
    return f"{scheme}://{rest}"


def command(verb: str, given: Sequence[Given], *, data: str | None, working_dir: Path | None) -> str:
    """The shell command that the job runs.

    Args:
        data: the --data folder if it was given; None: the nodes' default.
        working_dir: the folder that is uploaded; None: the sdan that is installed on the nodes runs.

    Raises:
        ClusterRequestError: a path that the cluster cannot see.
    """
    _check_data(verb, data)
    for one in given:
        if one.name in PLACES:
            for value in one.values:
                _check_place(one, str(value), data, working_dir)
    words = [] if data is None else ["--data", data]
    words.append(verb)
    for one in given:
        if one.option is not None:
            words += [one.option] if one.flag else [word for value in one.values for word in (one.option, str(value))]
    positional = [str(value) for one in given if one.option is None for value in one.values]
    if any(word.startswith("-") for word in positional):
        words.append("--")
    start = UPLOADED_CODE if working_dir else INSTALLED
    return f"{PATH_OF_NODES} {start} {shlex.join([*words, *positional])}"


def _check_data(verb: str, data: str | None) -> None:
    if data is None and verb in KEEPS_RUNS:
        raise ClusterRequestError(
            f"--data: expected with --cluster a folder that all nodes share, for the runs of {verb}, got none; "
            f"use sdan --data /SHARED/FOLDER {verb} ..."
        )
    if data is not None and not PurePosixPath(data).is_absolute():
        raise ClusterRequestError(
            f"--data {data}: expected with --cluster an absolute path, the same on every node, got a relative one; "
            "name the shared folder, e.g. --data /shared/data"
        )


def _check_place(one: Given, value: str, data: str | None, working_dir: Path | None) -> None:
    """Raises ClusterRequestError: not visible from the cluster."""
    if value.startswith(URI_SCHEMES):
        return
    if one.name in NAMED and "/" not in value and "." not in value and not Path(value).exists():
        return
    if data is not None and _is_below(value, data):
        return
    if working_dir is not None and one.name in UPLOADED and not Path(value).is_absolute():
        if (working_dir / value).is_file():
            return
        raise ClusterRequestError(f"{_label(one)} {value}: expected a file in --working-dir {working_dir}, got none")
    shared = f" or a path below --data {data}" if data else ""
    raise ClusterRequestError(
        f"{_label(one)} {value}: expected with --cluster an s3:// URI{shared}, because the job runs elsewhere, "
        "got a local path; copy it to S3, or into a folder that all nodes mount and name that with --data"
    )


def _is_below(value: str, folder: str) -> bool:
    path = PurePosixPath(os.path.normpath(value))
    return path.is_absolute() and path.is_relative_to(os.path.normpath(folder))


def _label(one: Given) -> str:
    return one.option or one.name.upper()


def environment(variables: dict[str, str]) -> dict[str, str]:
    """Variables of this shell that the job gets, too: MLFLOW_TRACKING_URI, if it is a server's.

    Raises:
        ClusterRequestError: it holds a password; Ray shows the environment of jobs to everybody who may see them.
    """
    uri = variables.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith(("http://", "https://")):
        return {}
    if "@" in uri.partition("://")[2].partition("/")[0]:
        raise ClusterRequestError(
            "MLFLOW_TRACKING_URI: expected no password in it, because Ray shows the environment of jobs, got one; "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the nodes"
        )
    return {"MLFLOW_TRACKING_URI": uri}
