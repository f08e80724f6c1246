"""Run `process` in a child process, so that a decoder that crashes or hangs costs only one pair.

LibRaw is C++ and reads untrusted files. The child's exit status decides what happens to the pair: after a crash signal
its files are quarantined; after a kill (out of memory, an operator) the next run tries the pair again.
"""

import json
import signal
import sys
import time
from dataclasses import asdict, replace

from preprocessing.child import CRASHES, ONE_THREAD, ChildProcess, answer_requests
from preprocessing.pairs import PairResult, process
from preprocessing.plan import PairJob, PreprocessOptions
from preprocessing.storage import Folder, open_folder

LIMIT_S = 900.0
"""Time limit per pair, seconds: several times longer than 150 megapixels and three slow downloads take."""
_ATTEMPTS = 3


class IsolatedProcess:
    """A child process that handles one pair at a time. Started at the first pair, and restarted after it dies."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._child = ChildProcess("preprocessing.isolation", [str(limit_s)], ONE_THREAD)

    @property
    def pid(self) -> int | None:
        """The child's process id; None if it is not running."""
        return self._child.pid

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
            answer, code = self._child.ask(request)
            if answer:
                return PairResult(**json.loads(answer))
            if time.monotonic() - began >= self._limit_s:
                reason = f"took longer than {self._limit_s:g} s; copy the files again or exclude them"
                return PairResult(job.key, "died", f"{job.input}: {reason}")
        if -code in CRASHES:
            reason = f"the decoder crashed on it or its JPGs ({signal.Signals(-code).name}); exclude the frame"
            return PairResult(job.key, "quarantined", f"{job.input}: {reason}")
        ended = f"killed, {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        reason = f"its process died in {_ATTEMPTS} attempts ({ended}): out of memory, or killed; run again"
        return PairResult(job.key, "died", f"{job.input}: {reason}")

    def close(self) -> None:
        """Kill the child."""
        self._child.close()


def _answer(request: str) -> str:
    """Process one pair: JSON request to JSON result."""
    fields = json.loads(request)
    job = PairJob.from_dict(fields["job"])
    source, target = open_folder(fields["source"]), open_folder(fields["target"])
    return json.dumps(asdict(process(job, source, target, PreprocessOptions(**fields["options"]))))


if __name__ == "__main__":
    answer_requests(_answer, sys.argv)
