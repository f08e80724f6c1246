"""The operator on a GPU, beside a convolution and torchvision's operator; the alignment module; errors.

Times are milliseconds, "forward / forward+backward". "Eager" is a Python call, "graph" a replayed CUDA graph: the
kernels alone. "conv" is `conv2d` of the same shape, layout and type. torchvision's operator has no bf16 on CUDA either,
so that cell is its float32. Layouts are what `compute_plan` chooses: contiguous for float32 without TF32, else
channels-last. "TF32 on" is for convolutions and matrix products; training uses it for convolutions only. MB: peak
memory that a call of forward+backward allocates, output and gradients included.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from authors_operators import authors_way, repeated
from measure import Step
from on_gpu import arithmetic
from on_gpu.arithmetic import FP32, Arithmetic, pair_text, ratio_text, shape_text, table_head, table_row
from on_gpu.clock import Clock, clock_of, tf32
from on_gpu.runner import Session
from operator_steps import backward_of, forward_of, module_step, operator_case, plain_conv, relative_errors
from torch import Tensor

import sdan.network
from sdan.ops import packed_attention, squared_deform_conv2d
from sdan.ops.reference import explicit_attention

SHAPES = ((4, 64, 64, 64), (4, 64, 128, 128), (8, 64, 128, 128), (1, 64, 256, 256), (1, 64, 1024, 1024))
SMALL = ((1, 64, 32, 32), (4, 64, 64, 64))
"""Shapes whose kernels take less time than Python needs to launch them."""
MODULES = ((8, 64, 128, 128), (8, 64, 64, 64))
REHEARSAL_SHAPE, REHEARSAL_TOKENS = (1, 8, 8, 8), (1, 16, 8)
CONTIGUOUS = torch.contiguous_format

Operator = Callable[..., Tensor]


class Case(NamedTuple):
    """One row: a shape in one arithmetic."""

    shape: tuple[int, ...]
    way: Arithmetic

    @property
    def name(self) -> str:
        return shape_text(self.shape)


class Times(NamedTuple):
    """Times of a step and of the same step in a CUDA graph, each forward and forward+backward."""

    eager: tuple[float, float]
    graph: tuple[float | None, float | None]


def cases(session: Session, shapes: tuple[tuple[int, ...], ...], small: tuple[int, ...]) -> list[Case]:
    """Every shape in every arithmetic; in a rehearsal one small shape in float32."""
    if session.rehearsal:
        return [Case(small, FP32)]
    return [Case(shape, way) for shape in shapes for way in arithmetic.ALL]


def tensors_of(case: Case, device: torch.device, layout: torch.memory_format) -> tuple[list[Tensor], Tensor]:
    """(input, offset, weight, bias) and the upstream gradient."""
    num_images, channels, height, width = case.shape
    ours, _, upstream = operator_case((num_images, channels, height, width), case.way.dtype, layout, device)
    return ours, upstream


def without_offset(operator: Operator, tensors: list[Tensor]) -> tuple[Operator, list[Tensor]]:
    """The plain convolution takes no offset."""
    return (operator, [tensors[0], *tensors[2:]]) if operator is plain_conv else (operator, tensors)


def steps_of(operator: Operator, tensors: list[Tensor], upstream: Tensor) -> tuple[Step, Step]:
    """Calls that run the operator forward, and forward and backward."""
    operator, tensors = without_offset(operator, tensors)
    return forward_of(operator, tensors), backward_of(operator, tensors, upstream)


def times_of(clock: Clock, steps: tuple[Step, Step]) -> Times:
    forward, both = steps
    eager = clock.median_ms(forward), clock.median_ms(both)
    return Times(eager, (clock.graph_ms(forward), clock.graph_ms(both)))


def operator_rows(session: Session) -> Iterator[str]:
    """The squared deformable convolution."""
    yield table_head(
        "shape | type | conv, eager | ours, eager | torchvision, eager | conv, graph | ours, graph"
        " | torchvision, graph | torchvision / ours, eager | ours / conv, graph"
        " | MB conv / ours / torchvision"
    )
    clock = clock_of(session, 40.0)
    found = cases(session, SHAPES, REHEARSAL_SHAPE)
    yield from session.rows(found, lambda case: case.name, partial(operator_row, clock))
    yield from clock.notes(session)


def operator_row(clock: Clock, case: Case) -> str:
    clock.tidy()
    with tf32(case.way.tf32):
        tensors, upstream = tensors_of(case, clock.device, case.way.layout(clock.device))
        plain, plain_upstream = tensors_of(case, clock.device, CONTIGUOUS)  # torchvision's only layout
        steps = {
            "conv": steps_of(plain_conv, tensors, upstream),
            "ours": steps_of(squared_deform_conv2d, tensors, upstream),
            "torchvision": steps_of(repeated, plain, plain_upstream),
        }
        times = {name: times_of(clock, step) for name, step in steps.items()}
        peaks = [clock.peak_mb(both) for _, both in steps.values()]
    conv, ours, theirs = times["conv"], times["ours"], times["torchvision"]
    slower = [ratio_text(a, b, 1) for a, b in zip(theirs.eager, ours.eager, strict=True)]
    beyond = [ratio_text(a, b) for a, b in zip(ours.graph, conv.graph, strict=True)]
    return table_row(
        (
            case.name,
            case.way.name,
            *(pair_text(one.eager) for one in (conv, ours, theirs)),
            *(pair_text(one.graph) for one in (conv, ours, theirs)),
            f"**{' / '.join(slower)}**",
            f"**{' / '.join(beyond)}**",
            " / ".join(f"{peak:.0f}" for peak in peaks),
        )
    )


def overhead_rows(session: Session) -> Iterator[str]:
    """What an eager call costs beyond its kernels: many calls in a row, against replays of its graph in a row."""
    yield table_head("shape | type | operator | eager, f / f+b | graph, f / f+b | beyond the kernels, f / f+b")
    clock = clock_of(session, 30.0)
    named: dict[str, Operator] = {"conv": plain_conv, "ours": squared_deform_conv2d, "torchvision": repeated}
    shapes = (REHEARSAL_SHAPE,) if session.rehearsal else SMALL
    ways = (FP32,) if session.rehearsal else (FP32, arithmetic.BF16)
    found = [(Case(shape, way), name) for shape in shapes for way in ways for name in named]
    yield from session.rows(
        found, lambda one: one[0].name, lambda one: overhead_row(clock, one[0], one[1], named[one[1]])
    )
    yield from clock.notes(session)


def overhead_row(clock: Clock, case: Case, name: str, operator: Operator) -> str:
    clock.tidy()
    with tf32(case.way.tf32):
        layout = CONTIGUOUS if operator is repeated else case.way.layout(clock.device)
        steps = steps_of(operator, *tensors_of(case, clock.device, layout))
        eager = [clock.back_to_back_ms(step) for step in steps]
        replays = [clock.graph(step) for step in steps]
        graph = [None if replay is None else clock.back_to_back_ms(replay) for replay in replays]
    beyond = [None if kernels is None else call - kernels for call, kernels in zip(eager, graph, strict=True)]
    return table_row((case.name, case.way.name, name, pair_text(eager), pair_text(graph), f"**{pair_text(beyond)}**"))


def tokens_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens, upstream gradient), as in the CPU's table."""
    random = torch.Generator(device).manual_seed(0)
    x = 0.3 * torch.randn(case.shape, generator=random, device=device)
    upstream = torch.randn(case.shape, generator=random, device=device)
    return x.to(case.way.dtype).requires_grad_(), upstream.to(case.way.dtype)


def module_rows(session: Session) -> Iterator[str]:
    """The whole alignment module, forward+backward, as in a training step."""
    yield table_head(
        "features | type | ours, eager | ours, graph | the authors' way, eager | authors' / ours | MB ours / authors'"
    )
    clock = clock_of(session, 150.0)
    found = cases(session, MODULES, (1, 8, 16, 16))
    yield from session.rows(found, lambda case: case.name, partial(module_row, clock))
    yield from clock.notes(session)


def module_row(clock: Clock, case: Case) -> str:
    """The authors' way runs in float32 and contiguous, with TF32 as the row says."""
    clock.tidy()
    num_images, channels, height, width = case.shape
    random = torch.Generator(clock.device).manual_seed(0)

    def step(dtype: torch.dtype, layout: torch.memory_format) -> Step:
        torch.manual_seed(0)
        module = sdan.network.AlignmentModule(sdan.network.SDANConfig(features=channels))
        module.to(clock.device).to(memory_format=layout)
        features = torch.randn(case.shape, generator=random, device=clock.device).contiguous(memory_format=layout)
        reference = torch.rand(num_images, 3, height, width, generator=random, device=clock.device)
        return module_step(module, features.requires_grad_(), reference, dtype)

    plain = step(torch.float32, CONTIGUOUS)

    def theirs() -> None:
        with authors_way():
            plain()

    ours = step(case.way.dtype, case.way.layout(clock.device))
    with tf32(case.way.tf32):
        ours_ms, theirs_ms = clock.median_ms(ours), clock.median_ms(theirs)
        graph_ms = clock.graph_ms(ours)
        peaks = [clock.peak_mb(one) for one in (ours, theirs)]
    return table_row(
        (
            case.name,
            case.way.name,
            arithmetic.ms_text(ours_ms),
            arithmetic.ms_text(graph_ms),
            arithmetic.ms_text(theirs_ms),
            f"**{ratio_text(theirs_ms, ours_ms, 1)}x**",
            " / ".join(f"{peak:.0f}" for peak in peaks),
        )
    )


def error_rows(session: Session) -> Iterator[str]:
    """Largest difference to torchvision's operator, relative to the largest value, and of attention to float64."""
    yield table_head(
        "type | value | grad input | grad offset | grad weight | grad bias | attention, value"
        " | its gradient | its logits, absolute"
    )
    clock = clock_of(session, 1.0)
    ways = (FP32,) if session.rehearsal else arithmetic.ALL
    yield from session.rows(ways, lambda way: way.name, partial(error_row, clock, session.rehearsal))


def error_row(clock: Clock, rehearsal: bool, way: Arithmetic) -> str:
    """Errors against the same operation in float64 on the same (rounded) inputs."""
    case = Case(REHEARSAL_SHAPE if rehearsal else (1, 64, 64, 64), way)
    tokens = Case(REHEARSAL_TOKENS if rehearsal else (1, 4096, 256), way)
    with tf32(way.tf32):
        tensors, upstream = tensors_of(case, clock.device, way.layout(clock.device))
        operator = relative_errors(squared_deform_conv2d, repeated, tensors, upstream, torch.float64)
        x, x_upstream = tokens_of(tokens, clock.device)
        attention = relative_errors(packed_attention, explicit_attention, [x], x_upstream, torch.float64)
        logits = torch.bmm(x, x.transpose(1, 2)).double().detach()
    exact = torch.bmm(x.detach().double(), x.detach().double().transpose(1, 2))
    errors = [f"{error:.0e}" for error in (*operator, *attention)]
    # Half types compute their logits in float32, which bmm cannot return.
    errors.append(f"{float((logits - exact).abs().max()):.0e}" if way.dtype == torch.float32 else "-")
    return table_row((way.name, *errors))
