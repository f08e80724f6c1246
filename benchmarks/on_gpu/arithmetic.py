"""The kinds of arithmetic that the GPU tables compare, and how their cells are written."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from sdan.ops.precision import compute_plan


@dataclass(frozen=True)
class Arithmetic:
    """A type, with TF32 on or off for float32."""

    name: str
    dtype: torch.dtype
    tf32: bool
    precision: str
    """train.precision's name of the type."""

    def layout(self, device: torch.device) -> torch.memory_format:
        """The layout that training chooses for it."""
        return compute_plan(device, self.precision, tf32=self.tf32).memory_format


FP32 = Arithmetic("fp32, TF32 off", torch.float32, False, "fp32")
TF32 = Arithmetic("fp32, TF32 on", torch.float32, True, "fp32")
BF16 = Arithmetic("bf16", torch.bfloat16, False, "bf16")
FP16 = Arithmetic("fp16", torch.float16, False, "fp16")
ALL = (FP32, TF32, BF16, FP16)


def shape_text(shape: Sequence[int]) -> str:
    """4x64x128x128."""
    return "x".join(map(str, shape))


def ms_text(ms: float | None) -> str:
    """Milliseconds with three digits that count; - for a time that this device has not."""
    if ms is None:
        return "-"
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def ratio_text(over: float | None, under: float | None, digits: int = 2) -> str:
    """over / under, or - if one of them is missing."""
    return "-" if over is None or not under else f"{over / under:.{digits}f}"


def pair_text(values: Iterable[float | None]) -> str:
    """Times of forward and forward+backward in one cell."""
    return " / ".join(ms_text(value) for value in values)


def table_row(cells: Iterable[object]) -> str:
    """One Markdown row."""
    return f"| {' | '.join(map(str, cells))} |"


def table_head(names: str) -> str:
    """The two heading lines of a Markdown table; names are separated by bars."""
    columns = names.split(" | ")
    return f"{table_row(columns)}\n{'|---' * len(columns)}|"
