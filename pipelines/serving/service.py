"""Runs the service in Ray Serve: an HTTP proxy, and one replica with the models per GPU, or one on the CPU."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from pipelines import registry
from pipelines.cluster import start_ray
from pipelines.serving.app import create_app
from pipelines.serving.limits import Limits, ServeError
from pipelines.serving.models import Models
from pipelines.zooming.models import choose_models

_NAME = "sdan"
_LOOK_S, _LOOK_TIMEOUT_S = 2.0, 30.0
"""How often `run` asks the service for its model, and how long it waits for the answer."""
_MARGIN = 64
"""Requests that reach the replica beyond those that it lets in: it refuses them itself, and answers health checks."""


@serve.ingress()  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
class Replica:
    """What one replica runs. Ray Serve calls the second method once and sends every request to its result."""

    def __init__(self, data: str, model: str | None, limits: Limits, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)  # Ray allows an actor as many as its CPUs
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._made = create_app(Models(Path(data), model), limits, Path(folder))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._made


def run(
    data: Path,
    model: str | None,
    *,
    host: str,
    port: int,
    limits: Limits,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Serve until interrupted; the photographs in work are then given up.

    Args:
        model: as `choose_models` takes it.
        say: takes lines about the service's start, and each change of its model.
        warn: takes a line if other machines can reach it.

    Raises:
        RegistryError: no such model, or the port is taken.
        CheckpointError: a model that cannot be loaded.
        ServeError: a cluster's address in RAY_ADDRESS, a host that is no address, or a service that does not start.
        ClusterError: Ray does not start.
    """
    if cluster := os.environ.get("RAY_ADDRESS"):
        raise ServeError(
            f"RAY_ADDRESS: expected none, because the service starts a Ray of its own, got {cluster}; unset it"
        )
    loopback = _is_loopback(host)
    registry.check_port(port, host)
    choose_models(data, model)
    if not loopback:
        warn(f"--host {host}: other machines can use this service; it has no passwords and no encryption")
    start_ray()
    with tempfile.TemporaryDirectory(prefix="sdan-serve-", ignore_cleanup_errors=True) as folder:
        try:
            _start(data, model, host, port, limits, folder)
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            say(f"zoom service: {address}   (Ctrl-C ends it)")
            _follow(address, say)
        finally:
            ray.shutdown()  # ends the replica at once; serve.shutdown would wait for its requests


def _start(data: Path, model: str | None, host: str, port: int, limits: Limits, folder: str) -> None:
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=quiet)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    deployment = serve.deployment(
        name=_NAME,
        num_replicas=max(1, gpus),
        max_ongoing_requests=limits.places + _MARGIN,
        max_queued_requests=_MARGIN,
        ray_actor_options={"num_cpus": 0, "num_gpus": 1 if gpus else 0},
        graceful_shutdown_timeout_s=1,
        logging_config=quiet,
    )(Replica)
    uri = str(Path(model).resolve()) if model and Path(model).is_dir() else model
    bound = deployment.bind(str(data.resolve()), uri, limits, folder, torch.get_num_threads())
    try:
        serve.run(bound, name=_NAME, route_prefix="/", logging_config=quiet)
    except (RuntimeError, TimeoutError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ServeError(f"Ray Serve: expected to start, got {reason}; see `sdan doctor`") from error


def _follow(address: str, say: Callable[[str], None]) -> None:
    """Say which model the service uses, now and whenever that changes, and whether it answers. Never returns."""
    last = ""
    while True:
        now = _state(address)
        if now != last:
            say(now)
        last = now
        time.sleep(_LOOK_S)


def _state(address: str) -> str:
    try:
        with urllib.request.urlopen(f"{address}/healthz", timeout=_LOOK_TIMEOUT_S) as answer:
            found: dict[str, Any] = json.load(answer)
    except (urllib.error.URLError, OSError, ValueError) as error:
        return f"health check: expected an answer, got {getattr(error, 'reason', None) or error}"
    return f"model: {found['model']}"


def _is_loopback(host: str) -> bool:
    """Raises ServeError: neither an IP address nor localhost."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ServeError(f"--host: expected an IP address of this machine or localhost, got {host[:80]}") from None
