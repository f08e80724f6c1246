"""Run `process` in a child process: a decoder that crashes or never ends costs one pair, and leaves evidence.

RAW and JPG files come from anywhere, and LibRaw is C++. The child's exit says whose fault it was: a crash signal is the
files' (quarantined), a kill is somebody else's (too little memory, an operator) and the pair is worth another run.
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
"""No pair takes so long: 150 megapixels and three slow downloads fit several times."""
_TRIES = 3
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP})
_PR_SET_PDEATHSIG = 1


class Worker:
    """A child that works through pairs one by one; started when needed, and again after it died."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._child: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id while there is one."""
        return self._child.pid if self._child else None

    def run(self, job: PairJob, source: Folder, target: Folder, options: PreprocessOptions) -> PairResult:
        """What `process` says of the pair, or what became of the child. Raises OSError when none can be started."""
        request = json.dumps(
            {
                "job": asdict(job),
                "source": source.uri,
                "target": target.uri,
                "options": asdict(replace(options, exclude=(), val=())),  # of the plan, and long
            }
        )
        for _ in range(_TRIES):
            began = time.monotonic()
            answer, code = self._ask(request)
            if answer:
                return PairResult(**json.loads(answer))
            if time.monotonic() - began >= self._limit_s:
                reason = f"took longer than {self._limit_s:g} s; copy the files again or exclude them"
                return PairResult(job.key, "died", f"{job.lr_raw}: {reason}")
        if -code in _CRASHES:
            reason = f"the decoder crashed on it or on its JPGs ({signal.Signals(-code).name}); exclude it"
            return PairResult(job.key, "quarantined", f"{job.lr_raw}: {reason}")
        ended = f"killed, {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        reason = f"its process died each time ({ended}): too little memory, or ended from outside; run again"
        return PairResult(job.key, "died", f"{job.lr_raw}: {reason}")

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _ask(self, request: str) -> tuple[str, int]:
        """(answer, 0), or ("", the child's exit code) when it died over the request."""
        child = self._child = self._child or self._start()
        assert child.stdin and child.stdout
        answer = ""
        with contextlib.suppress(BrokenPipeError):  # it may have been killed while it waited
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
    for line in requests:
        # A thread without Python's lock ends the process even where a decoder holds that lock for ever.
        faulthandler.dump_traceback_later(limit_s, exit=True)
        request = json.loads(line)
        job = PairJob.from_dict(request["job"])
        source, target = open_folder(request["source"]), open_folder(request["target"])
        result = process(job, source, target, PreprocessOptions(**request["options"]))
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(asdict(result)), file=replies, flush=True)


def _main(parent: int, limit_s: float) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed parent leaves no child behind
    if os.getppid() == parent:
        replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a decoder prints is no answer
        _serve(sys.stdin, replies, limit_s)


if __name__ == "__main__":
    _main(int(sys.argv[1]), float(sys.argv[2]))
