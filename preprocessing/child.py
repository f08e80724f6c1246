"""A child process that answers requests, one line each, so that code that crashes or hangs costs only one request.

Decoders are C++ and read untrusted files. The child runs a module of ours: `ChildProcess` starts it, `answer_requests`
is its loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO

CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP})
"""Signals that the process's own code causes; SIGKILL comes from outside, mostly for memory."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""The environment of a child that runs beside others like it."""
_PR_SET_PDEATHSIG = 1


class ChildProcess:
    """`python -P -m MODULE PARENT ARGUMENTS`. It starts at the first request, and again after it has died.

    -P: Ray's workers run in a home folder, whose checkout `sdan` would otherwise be taken for the package `sdan`.
    """

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """
        Args:
            environment: variables to set or replace.
        """
        self._module, self._arguments, self._environment = module, arguments, environment
        self._child: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id; None if it is not running."""
        return self._child.pid if self._child else None

    def start(self) -> None:
        """Raises OSError if no process can be started."""
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module, str(os.getpid()), *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **self._environment},
            )

    def ask(self, request: str) -> tuple[str, int]:
        """Send one line, and read one: (answer, 0), or ("", exit code) if the child died."""
        self.start()
        assert self._child and self._child.stdin
        with contextlib.suppress(BrokenPipeError):  # the child may have been killed while idle
            print(request, file=self._child.stdin, flush=True)
        return self.read()

    def read(self) -> tuple[str, int]:
        """Read one more line of the answer to the last request; the result is that of `ask`."""
        child = self._child
        assert child and child.stdin and child.stdout
        answer = child.stdout.readline()
        if answer.endswith("\n"):
            return answer, 0
        self._child = None
        child.kill()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        child.stdout.close()
        return "", child.wait()

    def close(self) -> None:
        """Kill the child."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def streams_of(parent: int) -> tuple[IO[str], IO[str]]:
    """In the child: (requests, replies). From then on it ends with its parent, or at once if that has already ended."""
    with contextlib.suppress(AttributeError):  # only Linux has it; elsewhere the requests' end is the child's
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # decoders print to stdout; keep that out of the replies
    return sys.stdin, replies


def answer_requests(answer: Callable[[str], str], arguments: Sequence[str]) -> None:
    """The loop of a child that gives one line for each request.

    Args:
        arguments: the child's sys.argv: its module, the parent's process id, and the most seconds a request may take,
            after which the child ends.
    """
    limit_s = float(arguments[2])
    requests, replies = streams_of(int(arguments[1]))
    for request in requests:
        # This timer's thread needs no GIL, so it ends the process even if a hanging decoder holds the GIL.
        faulthandler.dump_traceback_later(limit_s, exit=True)
        line = answer(request)
        faulthandler.cancel_dump_traceback_later()
        print(line, file=replies, flush=True)
