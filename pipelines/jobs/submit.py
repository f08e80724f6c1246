"""Submits a command as a job of a Ray cluster, follows its log, and returns its exit code."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.job_submission import JobStatus, JobSubmissionClient

from pipelines.jobs.request import ClusterRequestError

PROBE_S = 10.0
"""How long the job server may take to accept a connection."""
LOOK_S = 2.0
"""How often the state of a job is asked for when its log has ended."""
LOST_S = 300.0
"""How long the job server may be unreachable while a job is followed."""
AGENT_S = 60.0
"""How long a cluster may take until one of its nodes accepts jobs; one that has just started or is busy needs it."""
STOPPED = 143
"""Exit code for a job that somebody stopped, as of a process that got SIGTERM."""
EXCLUDED = (
    *(".git", ".venv", "data", "**/__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"),
    *("*.egg-info", "dist", "build"),
)
"""What is not uploaded of a working directory, in the syntax of .gitignore."""


_NO_AGENT = "No available agent"
"""Ray's answer while no node's agent has registered with its job server: the cluster starts, or a port is taken."""


class JobError(ValueError):
    """The job server cannot be used, or was lost; one line that says what to do."""


class Job:
    """A job of a cluster, submitted by this process."""

    def __init__(self, client: Any, address: str, identifier: str) -> None:
        self.client, self.address, self.identifier = client, address, identifier

    def how_to_go_on(self) -> str:
        """What a user who detaches wants to know."""
        where = f"--address {self.address}"
        return (
            f"job {self.identifier} goes on; follow it with `ray job logs {where} -f {self.identifier}`, "
            f"stop it with `ray job stop {where} {self.identifier}`"
        )

    def follow(self, write: Callable[[str], None]) -> int:
        """Write the job's log while it grows, until the job has ended; returns the exit code of its command.

        A connection that breaks is made again, and the log goes on where it stopped.

        Raises:
            JobError: the job server was unreachable for LOST_S, or the job never started; the job may go on.
        """
        written, reached = 0, time.monotonic()
        while True:
            try:
                for_now = _Resumed(write, written)
                try:
                    self._tail(for_now)
                finally:
                    written = max(written, for_now.seen)
                details = self.client.get_job_info(self.identifier)
                reached = time.monotonic()
                if details.status.is_terminal():
                    return self._exit_code(details)
            except (OSError, RuntimeError) as error:  # requests, aiohttp and Ray's own
                if time.monotonic() - reached > LOST_S:
                    raise JobError(
                        f"--cluster {self.address}: expected the job server to answer, got {_one_line(error)}; "
                        f"{self.how_to_go_on()}"
                    ) from error
            time.sleep(LOOK_S)

    def _tail(self, write: Callable[[str], None]) -> None:
        """Write the log until the server ends it, and raise what breaks it.

        The connection has a thread of its own: an interrupt would leave pieces of it, which complain.
        """
        parts: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

        async def receive() -> None:
            async for lines in self.client.tail_job_logs(self.identifier):
                parts.put(lines)

        def run() -> None:
            try:
                asyncio.run(receive())
                parts.put(None)
            except BaseException as error:
                parts.put(error)

        threading.Thread(target=run, name="job log", daemon=True).start()
        while (part := parts.get()) is not None:
            if isinstance(part, BaseException):
                raise part
            write(part)

    def _exit_code(self, details: Any) -> int:
        if details.status == JobStatus.SUCCEEDED:
            return 0
        if details.status == JobStatus.STOPPED:
            return STOPPED
        if details.driver_exit_code:
            return int(details.driver_exit_code)
        raise JobError(
            f"job {self.identifier}: expected it to run, got {_one_line(details.message or details.status)}; "
            f"see `ray job logs --address {self.address} {self.identifier}`"
        )


class _Resumed:
    """Passes on a log that is sent from its beginning, without what was passed on before."""

    def __init__(self, write: Callable[[str], None], known: int) -> None:
        """
        Args:
            known: characters of the log that `write` already has.
        """
        self.write, self.known, self.seen = write, known, 0

    def __call__(self, text: str) -> None:
        new = text[max(0, self.known - self.seen) :]
        self.seen += len(text)
        if new:
            self.write(new)


def submit(
    address: str, command: str, *, working_dir: Path | None, env_vars: dict[str, str], make: Any = JobSubmissionClient
) -> Job:
    """Submit a command to the job server at `address` (http://HOST:8265).

    Token authentication needs RAY_AUTH_MODE=token and the cluster's ~/.ray/auth_token in this shell.

    Args:
        working_dir: a folder to upload; the command runs in it. None: nothing is uploaded.
        env_vars: environment of the job, visible to all users of the cluster.
        make: makes the client of an address.

    Raises:
        JobError: nothing answers there, the token is missing or wrong, or the job is refused or not taken in AGENT_S.
        ClusterRequestError: no such working directory.
    """
    if working_dir is not None and not working_dir.is_dir():
        raise ClusterRequestError(f"--working-dir {working_dir}: expected a folder to upload, got none; check the path")
    _probe(address)
    runtime_env: dict[str, Any] = {"env_vars": env_vars}
    if working_dir is not None:
        runtime_env |= {"working_dir": str(working_dir.resolve()), "excludes": list(EXCLUDED)}
    began = time.monotonic()
    while True:
        try:
            client = make(address)
            return Job(client, address, client.submit_job(entrypoint=command, runtime_env=runtime_env))
        except Exception as error:  # requests', Ray's AuthenticationError, RuntimeError, ConnectionError and ValueError
            if _NO_AGENT not in str(error) or time.monotonic() - began > AGENT_S:
                raise _refused(address, error) from error
        time.sleep(LOOK_S)


def _probe(address: str) -> None:
    """Raises JobError: nothing listens at the address. The client itself would wait for minutes."""
    parts = urlsplit(address)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), timeout=PROBE_S).close()
    except OSError as error:
        raise JobError(
            f"--cluster {address}: expected Ray's job server, got {error.strerror or error}; start the cluster, or "
            "open the tunnel with `ray dashboard cluster.yaml`"
        ) from error


def _refused(address: str, error: Exception) -> JobError:
    if type(error).__name__ == "AuthenticationError" or "401" in str(error):
        return JobError(
            f"--cluster {address}: expected a valid token, got none or another; export RAY_AUTH_MODE=token and put the "
            "cluster's token in ~/.ray/auth_token (`ray get-auth-token` shows it on the head)"
        )
    remedy = "check the address and that the cluster runs the same version of Ray"
    if _NO_AGENT in str(error):
        remedy = (
            "see dashboard_agent.log on the head; if another Ray there has its port, start one of them with "
            "--dashboard-agent-listen-port"
        )
    return JobError(f"--cluster {address}: expected Ray's job server to take the job, got {_one_line(error)}; {remedy}")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
