"""The arithmetic that a processor computes natively: bf16, fp16 or float32.

A CPU without bf16 instructions emulates bf16 about ten times slower than it computes float32, so `auto` never picks it
there. Training, validation, evaluation and zooming all choose through `resolve`.
"""

from __future__ import annotations

import platform
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast, get_args

import torch

Precision = Literal["fp32", "bf16", "fp16"]

_BF16_CAPABILITY = (8, 0)
"""The first CUDA compute capability with bf16 tensor cores."""


def native_precision(device: torch.device) -> Precision:
    """The fastest precision that `device` supports in hardware.

    Returns:
        CUDA: bf16 from sm_80 on, else fp16. CPU: bf16 with AVX512_BF16 or AMX, else fp32. Other devices: fp32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= _BF16_CAPABILITY else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 instructions: AVX512_BF16 or AMX on x86, the bf16 extension on ARM."""
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        # oneDNN also accepts bf16 on other AVX-512 CPUs, and emulates it there.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return onednn_accepts_bf16()


def onednn_accepts_bf16() -> bool:
    """Whether oneDNN computes bf16 on this CPU at all, with instructions or emulated."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def common_precision(chosen: Collection[Precision]) -> Precision:
    """The precision for DDP ranks whose processors would choose differently: gradients must have the same scale."""
    if len(set(chosen)) == 1:
        return next(iter(chosen))
    return "fp32" if "fp32" in chosen else "fp16"


def resolve(precision: str, device: torch.device) -> Precision:
    """The precision to compute in on `device`.

    Args:
        precision: auto, fp32, bf16 or fp16; auto becomes `native_precision`, and fp16 becomes fp32 on a CPU, where
            fp16 has no advantage.

    Raises:
        ValueError: any other name.
    """
    if precision == "auto":
        return native_precision(device)
    if precision == "fp16" and device.type == "cpu":
        return "fp32"
    if precision in get_args(Precision):
        return cast(Precision, precision)
    raise ValueError(f"precision: expected auto, fp32, bf16 or fp16, got {precision!r}")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """torch.autocast for `resolve(precision, device)`; a context that does nothing for fp32."""
    chosen = resolve(precision, device)
    if chosen == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if chosen == "bf16" else torch.float16)


def emulation_warning(precision: str, device: torch.device) -> str | None:
    """One line for an explicit bf16 that this CPU would emulate; None if no warning is needed."""
    if precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        return (
            "train.precision: expected auto or fp32, got bf16, which this CPU emulates about 10 times slower than fp32"
        )
    return None
