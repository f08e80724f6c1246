"""Run `process` in a child process, so that a decoder that crashes or hangs costs only one pair.

LibRaw is C++ and reads untrusted files. The child's exit status decides what happens to the pair: after a crash signal
its files are quarantined; after a kill (out of memory, an operator) the next run tries the pair again.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from typing import IO

from preprocessing.pairs import PairResult, process
from preprocessing.plan import PairJob, PreprocessOptions
from preprocessing.storage import Folder, open_folder

LIMIT_S = 900.0
"""Time limit per pair, seconds: several times longer than 150 megapixels and three slow downloads take."""
_ATTEMPTS = 3
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP})
_PR_SET_PDEATHSIG = 1


class IsolatedProcess:
    """A child process that handles one pair at a time. Started at the first pair, and restarted after it dies."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._child: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id; None if it is not running."""
        return self._child.pid if self._child else None

    def run(self, job: PairJob, source: Folder, target: Folder, options: PreprocessOptions) -> PairResult:
        """Run `process` in the child. Returns its result, or one that says how the child died.

        Raises OSError if no child can be started.
        """
        request = json.dumps(
            {
                "job": asdict(job),
                "source": source.uri,
                "target": target.uri,
                "options": asdict(replace(options, exclude=(), val=())),  # may be long, and only the plan needs them
            }
        )
        for _ in range(_ATTEMPTS):
            began = time.monotonic()
            answer, code = self._ask(request)
            if answer:
                return PairResult(**json.loads(answer))
            if time.monotonic() - began >= self._limit_s:
                reason = f"took longer than {self._limit_s:g} s; copy the files again or exclude them"
                return PairResult(job.key, "died", f"{job.input}: {reason}")
        if -code in _CRASHES:
            reason = f"the decoder crashed on it or its JPGs ({signal.Signals(-code).name}); exclude the frame"
            return PairResult(job.key, "quarantined", f"{job.input}: {reason}")
        ended = f"killed, {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        reason = f"its process died in {_ATTEMPTS} attempts ({ended}): out of memory, or killed; run again"
        return PairResult(job.key, "died", f"{job.input}: {reason}")

    def close(self) -> None:
        """Kill the child."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _ask(self, request: str) -> tuple[str, int]:
        """Send a request: (answer, 0), or ("", exit code) if the child died."""
        child = self._child = self._child or self._start()
        assert child.stdin and child.stdout
        answer = ""
        with contextlib.suppress(BrokenPipeError):  # the child may have been killed while idle
            print(request, file=child.stdin, flush=True)
            answer = child.stdout.readline()
        if answer.endswith("\n"):
            return answer, 0
        self._child = None
        child.kill()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        child.stdout.close()
        return "", child.wait()

    def _start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "preprocessing.isolation", str(os.getpid()), str(self._limit_s)]
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | one_thread
        )


def _serve(requests: IO[str], replies: IO[str], limit_s: float) -> None:
    """The child's loop: one JSON request per line, one JSON result per line."""
    for line in requests:
        # This timer's thread needs no GIL, so it ends the process even if a hanging decoder holds the GIL.
        faulthandler.dump_traceback_later(limit_s, exit=True)
        request = json.loads(line)
        job = PairJob.from_dict(request["job"])
        source, target = open_folder(request["source"]), open_folder(request["target"])
        result = process(job, source, target, PreprocessOptions(**request["options"]))
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(asdict(result)), file=replies, flush=True)


def _main(parent: int, limit_s: float) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # die with the parent
    if os.getppid() == parent:
        replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # decoders print to stdout; keep that out of the replies
        _serve(sys.stdin, replies, limit_s)


if __name__ == "__main__":
    _main(int(sys.argv[1]), float(sys.argv[2]))
