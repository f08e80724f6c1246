"""An actor on each node: runs the node's checks, and connects to the other nodes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

from pipelines.checks.collective import TIMEOUT_S
from pipelines.checks.node import NodeRequest

CHECKS_S = 240.0
"""How long a node may take for its checks; importing torch on a busy machine takes most of it."""
CONNECT_S = 5.0


class Peer:
    """Runs on one node; Ray pins it there."""

    def __init__(self) -> None:
        self._server: socket.socket | None = None

    def now(self) -> float:
        """This node's clock, in seconds since 1970."""
        return time.time()

    def check(self, request: dict[str, Any]) -> dict[str, Any]:
        """The report of `checks.node`, from a process of its own.

        Raises:
            RuntimeError: that process failed; its last line.
        """
        done = _python("pipelines.checks.node", asdict(NodeRequest(**request)), CHECKS_S)
        answer: dict[str, Any] = json.loads(done.splitlines()[-1])
        return answer

    def listen(self) -> int:
        """Accept connections on a free port of every interface; returns the port."""
        self._server = socket.create_server(("", 0))
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()
        return int(self._server.getsockname()[1])

    def reach(self, host: str, port: int) -> str:
        """Connect to another node's port; returns "" or the error."""
        try:
            socket.create_connection((host, port), timeout=CONNECT_S).close()
        except OSError as error:
            return str(error.strerror or error)
        return ""

    def free_port(self) -> int:
        """A port that is free at this moment."""
        with socket.create_server(("", 0)) as server:
            return int(server.getsockname()[1])

    def all_reduce(self, rank: int, world: int, address: str, backend: str) -> str:
        """Take part in one all-reduce; returns "" or the error."""
        asked = {"rank": rank, "world": world, "address": address, "backend": backend}
        try:
            _python("pipelines.checks.collective", asked, 2 * TIMEOUT_S + 60)
        except RuntimeError as error:
            return str(error)
        return ""

    @staticmethod
    def _accept(server: socket.socket) -> None:
        while True:
            try:
                server.accept()[0].close()
            except OSError:
                return  # closed


def _python(module: str, request: dict[str, Any], timeout_s: float) -> str:
    """Run one of our modules with a JSON request in a new Python that sees all GPUs; returns its output.

    Raises:
        RuntimeError: it failed or took too long; one line.
    """
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-P", "-m", module, json.dumps(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"expected an answer within {timeout_s:g} s, got none") from error
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
        raise RuntimeError(last.strip()[:300])
    return done.stdout
