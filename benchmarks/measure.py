"""Times and peak memory of the steps that a benchmark compares."""

import ctypes
import re
import time
from collections.abc import Callable
from pathlib import Path

Step = Callable[[], object]

M_MMAP_THRESHOLD, LARGE_BYTES = -3, 2**16  # of mallopt(3)


def best_ms(steps: dict[str, Step], seconds: float, least: int = 2) -> dict[str, float]:
    """Best time of each step in milliseconds. Steps take turns for about `seconds`; short ones run up to 8 times each.

    least   turns that each step takes even if they last longer than `seconds`
    """
    for step in steps.values():
        step()
    best = dict.fromkeys(steps, float("inf"))
    turns, end = 0, time.perf_counter() + seconds
    while turns < least or time.perf_counter() < end:
        for name, step in steps.items():
            spent = 0.0
            for _ in range(8):
                start = time.perf_counter()
                step()
                took = time.perf_counter() - start
                best[name] = min(best[name], took)
                spent += took
                if spent > 0.15:
                    break
        turns += 1
    return {name: 1e3 * value for name, value in best.items()}


def peak_extra_mb(step: Step) -> float:
    """Peak memory that the step adds, in MB: resident pages, so that scratch memory of every library counts.

    Large blocks get separate pages from mmap, which return to the kernel when they are freed. glibc would move
    them to its heap after a while, where fragmentation makes the result random: the same step showed 24 to 34 MB.
    """
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
    step()  # leave out one-time costs: compiled kernels and caches
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_kb("VmRSS")
    step()
    return (_status_kb("VmHWM") - before) / 1024


def peak_mb() -> float:
    """Peak resident memory of this process, in MB."""
    return _status_kb("VmHWM") / 1024


def _status_kb(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1))
