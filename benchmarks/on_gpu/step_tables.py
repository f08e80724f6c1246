"""A whole training step on a GPU, as this repository and as SDAN's authors compute it, and where its time goes.

The step is `pipelines.training.step.train_step`: forward, loss, backward, Adam, averaged weights. "The authors' way" is
the same network with torchvision's operator on the repeated offset and explicit attention, in float32, contiguous.
"TF32 on" is for convolutions only, as in training and by PyTorch's default. Times are medians. MB: peak memory that
PyTorch allocates for model, optimizer and step. "Idle": the time of a step in which the GPU runs no kernel.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from measure import Step
from on_gpu.arithmetic import ms_text, ratio_text, table_head, table_row
from on_gpu.clock import Clock, clock_of
from on_gpu.kernel_kinds import KINDS, by_kind, launches_of, longest
from on_gpu.runner import Session
from training_steps import authors_step, our_step

from pipelines import config as configs
from pipelines.config import ExperimentConfig

SIZES = (("paper_4x", 8), ("paper_4x", 32), ("starter", 8), ("starter", 32), ("srraw_4x", 8))
COMPILED_SIZES = (("starter", 8), ("paper_4x", 8), ("srraw_4x", 8))
HEAD = "config, batch | way | ms | crops/s | MB | times the authors' rate, TF32 off / on"
REPEAT_MS, PROFILED_STEPS, LONGEST_KERNELS, KERNEL_CHARACTERS = 800.0, 5, 12, 90


@dataclass(frozen=True)
class Way:
    """How a step is computed."""

    name: str
    settings: dict[str, object]
    """Values by dotted name, as for `sdan train --set`."""
    authors_tf32: bool | None = None
    """For the authors' way: whether TF32 is on. None: ours."""


AUTHORS_OFF = Way("authors' way, fp32, TF32 off", {"train.tf32": False}, authors_tf32=False)
AUTHORS_ON = Way("authors' way, fp32, TF32 on", {"train.tf32": True}, authors_tf32=True)
FP32 = Way("ours, fp32, TF32 off", {"train.precision": "fp32", "train.tf32": False})
TF32 = Way("ours, fp32, TF32 on", {"train.precision": "fp32", "train.tf32": True})
BF16 = Way("ours, bf16", {"train.precision": "bf16"})
FP16 = Way("ours, fp16", {"train.precision": "fp16"})
GRAPH = Way("ours, bf16, CUDA graph", {"train.precision": "bf16", "train.cuda_graph": True})
COMPILED = Way("ours, bf16, compiled", {"train.precision": "bf16", "train.compile": True})
BOTH = Way("ours, bf16, compiled, CUDA graph", COMPILED.settings | GRAPH.settings)
EAGER_WAYS = (AUTHORS_OFF, AUTHORS_ON, FP32, TF32, BF16, FP16, GRAPH)
COMPILED_WAYS = (AUTHORS_OFF, BF16, COMPILED, BOTH)


class Case(NamedTuple):
    """One row: a config with its batch, computed in one way."""

    config: str
    batch: int
    way: Way

    @property
    def name(self) -> str:
        return f"{self.config}, {self.batch}"

    @property
    def experiment(self) -> ExperimentConfig:
        return configs.override(configs.named(self.config), self.way.settings)


PROFILED = (Case("paper_4x", 8, BF16), Case("paper_4x", 8, TF32), Case("starter", 8, BF16), Case("srraw_4x", 8, BF16))


@dataclass
class StepTable:
    """Measures the rows of one table; it remembers the authors' times, which later rows are compared with."""

    clock: Clock
    authors_ms: dict[tuple[str, int, bool], float] = field(default_factory=dict)

    def row(self, case: Case) -> str:
        self.clock.tidy()
        before = self.clock.allocated_mb()
        step = build(case, self.clock.device)
        for _ in range(3):
            step()
        peak = self.clock.peak_since_mb(before)
        ms = self.clock.median_ms(step)
        if case.way.authors_tf32 is not None:
            self.authors_ms[case.config, case.batch, case.way.authors_tf32] = ms
        authors = [self.authors_ms.get((case.config, case.batch, on)) for on in (False, True)]
        ratios = " / ".join(ratio_text(theirs, ms, 1) for theirs in authors)
        rate, memory = f"{1e3 * case.batch / ms:.0f}", "-" if peak is None else f"{peak:.0f}"
        return table_row((case.name, case.way.name, ms_text(ms), rate, memory, f"**{ratios}**"))


def build(case: Case, device: torch.device) -> Step:
    """The step of a row."""
    make = our_step if case.way.authors_tf32 is None else authors_step
    return make(case.experiment, case.batch, device)


def step_rows(session: Session) -> Iterator[str]:
    """Every config and batch in every way but compiled."""
    yield table_head(HEAD)
    found = [Case(name, batch, way) for name, batch in SIZES for way in EAGER_WAYS]
    if session.rehearsal:
        found = [Case("smoke", 2, way) for way in (AUTHORS_OFF, FP32)]
    yield from session.rows(found, lambda case: case.name, StepTable(clock_of(session, REPEAT_MS)).row)


def compiled_rows(session: Session) -> Iterator[str]:
    """Compiled steps, which take up to minutes to compile."""
    yield table_head(HEAD)
    found = [Case(name, batch, way) for name, batch in COMPILED_SIZES for way in COMPILED_WAYS]
    if session.rehearsal:
        found = [Case("smoke", 2, FP32)]
    yield from session.rows(found, lambda case: case.name, StepTable(clock_of(session, REPEAT_MS)).row)


def kind_rows(session: Session) -> Iterator[str]:
    """Where the time of a step goes: the GPU's time by kind of kernel."""
    yield table_head(" | ".join(("config, batch", "way", "step", "idle", *KINDS, "kernels a step")))
    found = (Case("smoke", 2, FP32),) if session.rehearsal else PROFILED
    row = partial(kind_row, clock_of(session, REPEAT_MS), 1 if session.rehearsal else PROFILED_STEPS)
    yield from session.rows(found, lambda case: case.name, row)


def kind_row(clock: Clock, steps: int, case: Case) -> str:
    """Milliseconds of each kind with its share of the step."""
    clock.tidy()
    step = build(case, clock.device)
    step_ms = clock.median_ms(step)
    kinds = by_kind(launches_of(step, steps, clock.device), steps)
    idle_ms = max(0.0, step_ms - sum(ms for ms, _ in kinds.values()))
    parts = [f"{ms_text(ms)} ({100 * ms / step_ms:.0f} %)" for ms in (idle_ms, *(ms for ms, _ in kinds.values()))]
    kernels = sum(count for _, count in kinds.values())
    return table_row((case.name, case.way.name, ms_text(step_ms), *parts, f"{kernels:.0f}"))


def kernel_rows(session: Session) -> Iterator[str]:
    """The kernels that take longest in a step of paper_4x, batch 8, bf16."""
    yield table_head("kernel | kind | ms a step | launches a step")
    clock = clock_of(session, REPEAT_MS)
    step = build(Case("smoke", 2, FP32) if session.rehearsal else PROFILED[0], clock.device)
    step()
    steps = 1 if session.rehearsal else PROFILED_STEPS
    for name, kind, ms, count in longest(launches_of(step, steps, clock.device), steps, LONGEST_KERNELS):
        short = " ".join(name.split())[:KERNEL_CHARACTERS].replace("|", "/")
        yield table_row((f"`{short}`", kind, ms_text(ms), f"{count:.1f}"))
