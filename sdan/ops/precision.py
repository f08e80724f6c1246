"""How a network computes on a device: precision, TF32 and memory layout, chosen in one place.

`compute_plan` chooses for training, validation, evaluation and zooming. A CPU without bf16 instructions emulates bf16
about ten times slower than it computes float32, so `auto` never picks bf16 there. cuDNN's float32 convolutions are
about ten times slower in channels-last than in contiguous layout unless they use TF32, so `auto` picks the layout after
the precision.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch

Precision = Literal["fp32", "bf16", "fp16"]
Layout = Literal["channels_last", "contiguous"]

AMPERE = (8, 0)
"""The first CUDA compute capability with bf16 and TF32 tensor cores."""


@dataclass(frozen=True)
class ComputePlan:
    """How a network computes on one device; `compute_plan` makes it."""

    device: torch.device
    precision: Precision
    layout: Layout
    """Memory layout of weights and feature maps."""
    tf32: bool
    """Whether float32 convolutions and the attention's sums on CUDA round inputs to TF32 (10 bits of mantissa)."""

    def __str__(self) -> str:
        """E.g. "bf16, channels_last", on CUDA followed by "TF32 on" or "TF32 off"."""
        parts: list[str] = [self.precision, self.layout]
        if self.device.type == "cuda":
            parts.append(f"TF32 {'on' if self.tf32 else 'off'}")
        return ", ".join(parts)

    @property
    def memory_format(self) -> torch.memory_format:
        """`layout` as an argument of `Module.to`."""
        return torch.channels_last if self.layout == "channels_last" else torch.contiguous_format

    def autocast(self) -> AbstractContextManager[Any]:
        """torch.autocast for `precision`; a context that does nothing for fp32."""
        return autocast(self.precision, self.device)

    @contextmanager
    def tf32_flags(self) -> Iterator[None]:
        """Inside, PyTorch's TF32 switches follow `tf32`; afterwards they are what they were. Does nothing on a CPU.

        Convolutions follow it, and packed attention except its logits (`attention_tf32`). All other matrix products
        stay float32. A backward pass must run inside, too.
        """
        if self.device.type != "cuda":
            yield
            return
        restore, before = _remember_tf32(), _switches.attention_tf32
        _switches.attention_tf32 = self.tf32
        # Inductor of torch 2.11 reads these switches, and fails once the newer ones (fp32_precision) were set.
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, self.tf32
        try:
            yield
        finally:
            _switches.attention_tf32 = before
            restore()

    @contextmanager
    def inference(self) -> Iterator[None]:
        """torch.inference_mode, autocast and the TF32 switches together."""
        with torch.inference_mode(), self.tf32_flags(), self.autocast():
            yield


@dataclass
class _Switches:
    """State of the process like PyTorch's own switches: the thread of a backward pass reads it, too."""

    attention_tf32: bool = False


_switches = _Switches()


def attention_tf32() -> bool:
    """Whether packed attention in float32 on CUDA may round to TF32: inside `tf32_flags` of a plan that uses TF32, or
    where PyTorch's own switch allows it for all matrix products.
    """
    return _switches.attention_tf32 or _products_switch() == "tf32"


def _products_switch() -> str:
    switch: str = torch.backends.cuda.matmul.fp32_precision
    return switch


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Inside, float32 matrix products on CUDA use TF32, if `allowed`."""
    if not allowed or _products_switch() == "tf32":
        yield
        return
    restore = _remember_tf32()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        restore()


def compute_plan(
    device: torch.device, precision: str = "auto", layout: str = "auto", *, tf32: bool = False
) -> ComputePlan:
    """How to compute on `device`.

    Args:
        precision: auto, fp32, bf16 or fp16 (`resolve`).
        layout: channels_last, contiguous, or auto: channels_last, except for float32 on CUDA without TF32.
        tf32: allow TF32, on GPUs that have it (Ampere and later). False for everything whose numbers are reported.

    Raises:
        ValueError: another precision or layout.
    """
    if layout not in ("auto", *get_args(Layout)):
        raise ValueError(f"layout: expected auto, channels_last or contiguous, got {layout!r}")
    chosen = resolve(precision, device)
    tf32 = tf32 and device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE
    if layout == "auto":
        layout = "contiguous" if _slow_in_channels_last(device, chosen, tf32) else "channels_last"
    return ComputePlan(device, chosen, cast(Layout, layout), tf32)


def common_plan(plans: Collection[ComputePlan], own: ComputePlan) -> ComputePlan:
    """`own` with the choices that all DDP ranks can follow: gradients must have one scale and one layout.

    Args:
        plans: those of all ranks.
    """
    contiguous = any(plan.layout == "contiguous" for plan in plans)
    return replace(
        own,
        precision=common_precision([plan.precision for plan in plans]),
        layout="contiguous" if contiguous else "channels_last",
        tf32=all(plan.tf32 for plan in plans),
    )


def cuda_layout(dtype: torch.dtype, *, tf32: bool) -> Layout:
    """The memory layout in which cuDNN convolves this type faster.

    Channels-last where tensor cores compute: half types, and float32 as TF32. Elsewhere cuDNN takes over ten times as
    long in channels-last as in contiguous layout (H200, torch 2.11).
    """
    tensor_cores = dtype in (torch.bfloat16, torch.float16) or (dtype == torch.float32 and tf32)
    return "channels_last" if tensor_cores else "contiguous"


def _slow_in_channels_last(device: torch.device, precision: Precision, tf32: bool) -> bool:
    return device.type == "cuda" and precision == "fp32" and cuda_layout(torch.float32, tf32=tf32) == "contiguous"


def native_precision(device: torch.device) -> Precision:
    """The fastest precision that `device` supports in hardware.

    Returns:
        CUDA: bf16 from sm_80 on, else fp16. CPU: bf16 with AVX512_BF16 or AMX, else fp32. Other devices: fp32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= AMPERE else "fp16"
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


def slow_choice(device: torch.device, precision: str, layout: str, *, tf32: bool) -> str | None:
    """One line for a precision or layout that was set and is about ten times slower here than auto's; else None.

    Args:
        device: of CUDA only the type matters, so a driver without a GPU can ask.
        precision, layout, tf32: as given to `compute_plan`.
    """
    if precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        return (
            "train.precision: expected auto or fp32, got bf16, which this CPU emulates about 10 times slower than fp32"
        )
    if precision == "fp32" and layout == "channels_last" and _slow_in_channels_last(device, "fp32", tf32):
        return (
            "train.layout: expected auto or contiguous for fp32 without TF32, got channels_last, in which cuDNN's "
            "convolutions are about 10 times slower"
        )
    return None


def _remember_tf32() -> Callable[[], None]:
    """A function that sets PyTorch's TF32 switches to what they are now."""
    backends: Any = torch.backends
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    switches: list[tuple[Any, str, Any]]
    try:
        switches = [(matmul, "allow_tf32", matmul.allow_tf32), (cudnn, "allow_tf32", cudnn.allow_tf32)]
    except RuntimeError:  # the caller set the newer switches, after which PyTorch refuses to read the older ones
        switches = [(part, "fp32_precision", part.fp32_precision) for part in (matmul, cudnn.conv, cudnn.rnn)]

    def restore() -> None:
        for part, name, value in switches:
            setattr(part, name, value)

    return restore
