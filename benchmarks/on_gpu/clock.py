"""Times, CUDA graphs and peak memory of a step on a GPU; on a CPU the same calls serve rehearsals.

Times are medians. On CUDA, `median_ms` is `triton.testing.do_bench`: CUDA events around each call, and the L2 cache is
overwritten between calls. Overwriting takes the GPU some 60 us, in which the CPU may already issue the step. Where the
CPU's own time matters, use `back_to_back_ms`.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from measure import Step, peak_extra_mb
from on_gpu.runner import Session, reason


@dataclass
class Clock:
    """Measures steps on one device."""

    device: torch.device
    repeat_ms: float
    """Time of the repeats of one measurement."""
    least: int = 5
    """Repeats of a step that takes longer than that."""
    no_graph: set[str] = field(default_factory=set)
    """Reasons why a step could not be captured."""

    def median_ms(self, step: Step) -> float:
        """Median time of a call in milliseconds."""
        if self.device.type != "cuda":
            step()
            return statistics.median(self._once_ms(step) for _ in range(self.least))
        from triton import testing  # only a GPU needs it

        step()
        self.wait()
        repeat_ms = max(self.repeat_ms, (self.least + 0.5) * self._once_ms(step))
        return float(testing.do_bench(step, warmup=self.repeat_ms / 4, rep=repeat_ms, return_mode="median"))

    def back_to_back_ms(self, step: Step) -> float:
        """Time per call of many calls in a row: the CPU's time for issuing a call, or the GPU's if that is longer."""
        step()
        self.wait()
        calls = min(1000, max(self.least, int(self.repeat_ms / max(self._once_ms(step), 1e-3))))
        turns = []
        for _ in range(self.least):
            start = time.perf_counter()
            for _ in range(calls):
                step()
            self.wait()
            turns.append(1e3 * (time.perf_counter() - start) / calls)
        return statistics.median(turns)

    def graph(self, step: Step) -> Step | None:
        """The step captured in a CUDA graph, as a call that replays it.

        Returns:
            None on a CPU, and if the capture fails; the reason is then in `no_graph`.
        """
        if self.device.type != "cuda":
            return None
        try:
            return capture(step)
        except RuntimeError as error:
            self.no_graph.add(reason(error))
            return None

    def graph_ms(self, step: Step) -> float | None:
        """Median time of the captured step; None without a graph."""
        replay = self.graph(step)
        return None if replay is None else self.median_ms(replay)

    def notes(self, session: Session) -> Iterator[str]:
        """Lines below a table: why cells of graphs are empty. They count as failures."""
        for text in sorted(self.no_graph):
            session.failed.append("a CUDA graph")
            yield f"\nNo CUDA graph: {text}"

    def peak_mb(self, step: Step) -> float:
        """Peak memory that one call adds, MB: allocated by PyTorch on CUDA, resident pages on a CPU."""
        if self.device.type != "cuda":
            return peak_extra_mb(step)
        step()
        self.tidy()
        before = self.allocated_mb()
        step()
        return self.peak_since_mb(before) or 0.0

    def allocated_mb(self) -> float:
        """Memory that PyTorch has allocated on the GPU, MB; starts a new peak for `peak_since_mb`."""
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20

    def peak_since_mb(self, before_mb: float) -> float | None:
        """Peak allocated memory since `allocated_mb` returned `before_mb`, beyond it; None on a CPU."""
        if self.device.type != "cuda":
            return None
        self.wait()
        return torch.cuda.max_memory_allocated() / 2**20 - before_mb

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def tidy(self) -> None:
        """Free what no variable holds any more on the GPU."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _once_ms(self, step: Step) -> float:
        start = time.perf_counter()
        step()
        self.wait()
        return 1e3 * (time.perf_counter() - start)


def capture(step: Step) -> Step:
    """Capture a step in a CUDA graph; the result replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # workspaces and compiled kernels must exist before the capture
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def clock_of(session: Session, repeat_ms: float) -> Clock:
    """The session's clock; in a rehearsal every step runs once."""
    if session.rehearsal:
        return Clock(torch.device(session.device), repeat_ms=0.0, least=1)
    return Clock(torch.device(session.device), repeat_ms)


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """TF32 for float32 convolutions and matrix products, on or off. PyTorch's defaults are on and off."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
