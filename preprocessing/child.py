"""A child process that answers requests, for code that may crash or hang: decoders are C++ and read untrusted files.

Requests and answers are lines of text. The child runs a module of ours: `Child` starts it, `answer_requests` is its
loop.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import Callable

CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP})
"""Signals that end a process because of its own code."""
_PR_SET_PDEATHSIG = 1


class Child:
    """A child process that answers one request at a time. Started at the first, and restarted after it dies.

    It ends with the thread that started it.
    """

    def __init__(self, module: str, limit_s: float) -> None:
        """
        Args:
            module: run as `python -m MODULE`; it calls `answer_requests`.
            limit_s: time per request; then the child ends.
        """
        self._module, self._limit_s = module, limit_s
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id; None if it is not running."""
        return self._process.pid if self._process else None

    def ask(self, request: str) -> tuple[str, int]:
        """Send a request, one line: (answer, 0), or ("", exit code) if the child died.

        Raises OSError if no child can be started.
        """
        process = self._process = self._process or self._start()
        assert process.stdin and process.stdout
        answer = ""
        with contextlib.suppress(BrokenPipeError):  # the child may have been killed while idle
            print(request, file=process.stdin, flush=True)
            answer = process.stdout.readline()
        if answer.endswith("\n"):
            return answer, 0
        self._process = None
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        return "", process.wait()

    def close(self) -> None:
        """Kill the child."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", self._module, str(os.getpid()), str(self._limit_s)]
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | one_thread
        )


def answer_requests(answer: Callable[[str], str], arguments: list[str]) -> None:
    """The child's loop: one answer per request, each a line.

    Args:
        arguments: the child's sys.argv.
    """
    parent, limit_s = int(arguments[1]), float(arguments[2])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # die with the parent
    if os.getppid() != parent:
        return
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # decoders print to stdout; keep that out of the replies
    for request in sys.stdin:
        # This timer's thread needs no GIL, so it ends the process even if a hanging decoder holds the GIL.
        faulthandler.dump_traceback_later(limit_s, exit=True)
        line = answer(request)
        faulthandler.cancel_dump_traceback_later()
        print(line, file=replies, flush=True)
