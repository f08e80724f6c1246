"""Packed attention and cross packing attention on a GPU, beside the authors' explicit form.

The explicit form stores the attention matrix. The columns are those of operator_tables.py.
"""

from collections.abc import Iterator
from functools import partial

import torch
from authors_operators import authors_cpa
from measure import Step
from on_gpu import arithmetic
from on_gpu.arithmetic import FP32, Arithmetic, pair_text, ratio_text, table_head, table_row
from on_gpu.clock import Clock, clock_of, tf32
from on_gpu.operator_tables import (
    CONTIGUOUS,
    REHEARSAL_TOKENS,
    Case,
    Operator,
    cases,
    steps_of,
    tensors_of,
    times_of,
    tokens_of,
)
from on_gpu.runner import Session

from sdan.attention import CrossPackingAttention
from sdan.ops import packed_attention
from sdan.ops.reference import explicit_attention

TOKENS = ((8, 4096, 256), (4, 4096, 64), (8, 768, 64), (4, 1024, 1024))
"""[N, L, C] of paper_4x (batch 8), the same at 64x64, starter (batch 8), and K=4 at 128x128: wide tokens."""
FEATURES = (((8, 64, 128, 128), 8), ((8, 48, 32, 32), 4), ((4, 64, 128, 128), 4))
"""(Features, K) of paper_4x, starter, and wide tokens."""
COMPARED = (
    "type | ours, eager | explicit, eager | ours, graph | explicit, graph | ours / explicit, graph | MB ours / explicit"
)


def attention_rows(session: Session) -> Iterator[str]:
    """Packed attention."""
    yield table_head(f"tokens (N x L x C) | {COMPARED}")
    clock = clock_of(session, 60.0)
    found = cases(session, TOKENS, REHEARSAL_TOKENS)
    yield from session.rows(found, lambda case: case.name, partial(attention_row, clock))
    yield from clock.notes(session)


def attention_row(clock: Clock, case: Case) -> str:
    clock.tidy()
    x, upstream = tokens_of(case, clock.device)
    steps = [steps_of(operator, [x], upstream) for operator in (packed_attention, explicit_attention)]
    return compared_row(clock, case.name, case.way, *steps)


def cpa_rows(session: Session) -> Iterator[str]:
    """Cross packing attention: packing, attention, unpacking, the sum and its ReLU."""
    yield table_head(f"features, K | {COMPARED}")
    clock = clock_of(session, 40.0)
    ways = (FP32,) if session.rehearsal else arithmetic.ALL
    shapes = (((1, 8, 8, 8), 2),) if session.rehearsal else FEATURES
    found = [(Case(shape, way), kernel) for shape, kernel in shapes for way in ways]
    yield from session.rows(found, lambda one: f"{one[0].name}, {one[1]}", lambda one: cpa_row(clock, *one))
    yield from clock.notes(session)


def cpa_row(clock: Clock, case: Case, kernel: int) -> str:
    """Ours in the layout of a training step, the authors' contiguous."""
    clock.tidy()
    attention = CrossPackingAttention(kernel).to(clock.device)
    torch.nn.init.constant_(attention.gamma, 0.5)

    def steps(operator: Operator, layout: torch.memory_format) -> tuple[Step, Step]:
        (x, *_), upstream = tensors_of(case, clock.device, layout)
        return steps_of(lambda x, _: operator(attention, x, relu=True), [x, attention.gamma], upstream)

    ours = steps(CrossPackingAttention.forward, case.way.layout(clock.device))
    return compared_row(clock, f"{case.name}, {kernel}", case.way, ours, steps(authors_cpa, CONTIGUOUS))


def compared_row(
    clock: Clock, name: str, way: Arithmetic, our_steps: tuple[Step, Step], explicit_steps: tuple[Step, Step]
) -> str:
    """The row of two forms of attention."""
    with tf32(way.tf32):
        ours, explicit = times_of(clock, our_steps), times_of(clock, explicit_steps)
        peaks = [clock.peak_mb(both) for _, both in (our_steps, explicit_steps)]
    share = [ratio_text(a, b) for a, b in zip(ours.graph, explicit.graph, strict=True)]
    return table_row(
        (
            name,
            way.name,
            *(pair_text(one.eager) for one in (ours, explicit)),
            *(pair_text(one.graph) for one in (ours, explicit)),
            f"**{' / '.join(share)}**",
            " / ".join(f"{peak:.0f}" for peak in peaks),
        )
    )
