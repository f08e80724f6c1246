"""Sends thousands of damaged RAW and JPG files through the plan and the decoders: `make fuzz SEED=1 COUNT=2000`.

Each file replaces its good original in a pair. As in a real run, its tags are read for the plan, then the pair is
processed in a child (preprocessing.isolation). A file counts as a failure if the reason for rejecting it is not one of
our one-line messages, if it takes too long or too much memory, or if the plan raises. Such files are kept. A crash of
the child is counted, but is not a failure.
"""

import argparse
import contextlib
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue

from known_scene import write_sequence
from mutants import mutants

from preprocessing.isolation import IsolatedProcess
from preprocessing.pairs import PairResult
from preprocessing.plan import PairJob, PreprocessOptions, make_plan
from preprocessing.storage import open_folder

LIMIT_S = 20.0
LIMIT_MIB = 600
"""Limit of the child's resident memory; Python and the libraries need about 130."""
BENCHES = (("dng", "RGGB", "scale"), ("dng", "GBRG", "ecc"), ("arw", "RGGB", "scale"))
"""(RAW format, Bayer phase, `align` option)."""


@dataclass(frozen=True)
class Outcome:
    what: str
    """rows, refused, no pair or crashed; if failed: unclear reason, too long, too much memory, or driver."""
    failed: bool = False
    detail: str = ""


class Bench:
    """One pair of good files, and a child that processes it with one file replaced."""

    def __init__(self, folder: Path, raw_format: str, cfa: str, align: str) -> None:
        self._options = PreprocessOptions(tile_px=12, stride_px=12, align=align)
        self._sequence = write_sequence(
            folder / "raw" / "00001", seed=7, size=(128, 192), focals_mm=(200, 50), raw_format=raw_format, cfa=cfa
        )
        self._source, self._target = open_folder(str(folder / "raw")), open_folder(str(folder / "shards"))
        self._worker = IsolatedProcess(LIMIT_S)
        names = {"raw": next(path.name for path in self._sequence.glob("00002.*") if path.suffix != ".JPG")}
        self._names = {**names, "jpg": "00002.JPG"}
        self.good = {kind: (self._sequence / name).read_bytes() for kind, name in self._names.items()}

    def try_out(self, kind: str, data: bytes) -> Outcome:
        path = self._sequence / self._names[kind]
        path.write_bytes(data)
        began = time.monotonic()
        try:
            jobs = make_plan(self._source, self._options, {}).jobs
            if time.monotonic() - began > LIMIT_S:
                return Outcome("too long", True, "reading the tags")
            if not jobs:
                return Outcome("no pair")
            return self._work(jobs[0])
        except Exception as error:
            return Outcome("driver", True, repr(error))
        finally:
            path.write_bytes(self.good[kind])

    def close(self) -> None:
        self._worker.close()

    def _work(self, job: PairJob) -> Outcome:
        if self._worker.pid:
            Path(f"/proc/{self._worker.pid}/clear_refs").write_text("5")  # reset the peak
        result = self._worker.run(job, self._source, self._target, self._options)
        return judge(result, _peak_mib(self._worker.pid))


def judge(result: PairResult, peak_mib: int) -> Outcome:
    """Classify a result, given the child's peak memory in MiB."""
    if "took longer" in result.reason:
        return Outcome("too long", True, result.reason)
    if "crashed" in result.reason:
        return Outcome("crashed", detail=result.reason)
    if peak_mib > LIMIT_MIB:
        return Outcome("too much memory", True, f"{peak_mib} MiB: {result.reason}")
    if result.status == "written":
        return Outcome("rows")
    unexpected = re.match(r"\S+: \w*(Error|Exception|Warning|Iteration): ", result.reason)
    if result.status != "quarantined" or unexpected or "\n" in result.reason or len(result.reason) > 400:
        return Outcome("unclear reason", True, result.reason)
    return Outcome("refused", detail=result.reason)


def _peak_mib(pid: int | None) -> int:
    if pid is None:  # it died; the result says why
        return 0
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def run(seed: int, count: int, keep: Path) -> Counter[str]:
    """Count outcomes by kind. Failures are printed, and their files kept in `keep`."""
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        free: SimpleQueue[Bench] = SimpleQueue()
        made = [Bench(Path(scratch, str(number)), *BENCHES[number]) for number in range(len(BENCHES))]
        for bench in made:
            free.put(bench)

        def one(mutant: tuple[int, tuple[str, str, bytes]]) -> Outcome:
            number, (name, kind, data) = mutant
            bench = free.get()
            try:
                outcome = bench.try_out(kind, data)
            finally:
                free.put(bench)
            if outcome.failed:
                keep.mkdir(parents=True, exist_ok=True)
                path = keep / f"seed{seed}-{number}.{kind}"
                path.write_bytes(data)
                print(f"FAILED {path} ({name}): {outcome.what}: {outcome.detail}")
            elif outcome.what == "crashed":
                print(f"crashed: number {number} ({name}): {outcome.detail}")
            return outcome

        files = mutants([bench.good["raw"] for bench in made], [made[0].good["jpg"]], seed)
        with ThreadPoolExecutor(2) as pool:
            for outcome in pool.map(one, enumerate(islice(files, count))):
                outcomes["failed: " * outcome.failed + outcome.what] += 1
        for bench in made:
            bench.close()
    return outcomes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard what LibRaw and Pillow print, here and in the children."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for files that failed")
    arguments = parser.parse_args()
    began = time.monotonic()
    outcomes = run(arguments.seed, arguments.count, arguments.keep)
    print(f"seed {arguments.seed}, {sum(outcomes.values())} files in {time.monotonic() - began:.0f} s:")
    for what, number in outcomes.most_common():
        print(f"  {number:5} {what}")
    return int(any(what.startswith("failed") for what in outcomes))


if __name__ == "__main__":
    sys.exit(main())
