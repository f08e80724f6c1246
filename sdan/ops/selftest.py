"""Checks the operators on this machine, in seconds; `sdan doctor` prints the result."""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sdan.ops import reference
from sdan.ops.attention import packed_attention
from sdan.ops.backend import why_not_triton
from sdan.ops.squared_deform import offset_mask, squared_deform_conv2d


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Literal["ok", "skipped", "failed"]
    detail: str
    """What was measured, why the check was skipped, or what went wrong."""


def selftest() -> list[Check]:
    """Run every check that this machine can run; never raises.

    Returns:
        Checks in a fixed order: CPU identities, Triton, then for each GPU the kernels against the CPU, the
        deterministic form, and the speed against torchvision's operator.
    """
    checks = [
        _run("squared deformable convolution, CPU", _squared_deform_identity),
        _run("packed attention, CPU", _attention_identity),
        _triton_check(),
    ]
    if not torch.cuda.is_available():
        return [*checks, Check("GPU kernels", "skipped", "PyTorch sees no CUDA GPU; the CPU code is used")]
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        name = f"cuda:{index} {torch.cuda.get_device_name(index)}"
        checks.append(_run(f"{name}: operators against the CPU", partial(_gpu_identity, device)))
        checks.append(_run(f"{name}: deterministic form", partial(_gpu_deterministic, device)))
        checks.append(_run(f"{name}: speed", partial(_gpu_speed, device)))
    return checks


def _run(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", check())
    except Exception as error:  # a self-test reports every failure
        return Check(name, "failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _triton_check() -> Check:
    if importlib.util.find_spec("triton") is None:
        return Check("Triton", "skipped", "not installed; GPUs use plain PyTorch")
    import triton

    if not torch.cuda.is_available():
        return Check("Triton", "ok", f"{triton.__version__} (no GPU to use it on)")
    reason = why_not_triton(torch.cuda.current_device())
    return Check("Triton", "ok" if reason is None else "skipped", triton.__version__ if reason is None else reason)


def _case(dtype: torch.dtype, channels: int = 5, height: int = 9, width: int = 13) -> tuple[Tensor, ...]:
    """Seeded (input, offset, weight, bias), with some offsets that leave the image."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, channels, height, width), (2, 2, height, width), (channels, channels, 3, 3), (channels,))
    input, offset, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(tensor.to(dtype) for tensor in (input, 3 * offset, weight / 3 / channels**0.5, bias))


def _gradients(operator: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """[value, gradient of each tensor] for a fixed upstream gradient."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = operator(*leaves)
    upstream = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def _largest_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest error over all tensors, relative to the largest value of each."""
    pairs = zip(got, expected, strict=True)
    return max(float((a.cpu().double() - b.cpu().double()).abs().max() / b.abs().max()) for a, b in pairs)


def _require(error: float, limit: float, what: str) -> str:
    if not error <= limit:
        raise RuntimeError(f"{what}: expected a relative error of at most {limit:.0e}, got {error:.1e}")
    return f"{what}: relative error {error:.1e}"


def _squared_deform_identity() -> str:
    case = _case(torch.float64)
    loops = reference.squared_deform_loops(*case)
    against_loops = _require(
        _largest_error([squared_deform_conv2d(*case)], [loops]), 1e-12, "values against nested loops"
    )
    if importlib.util.find_spec("torchvision") is None:
        return f"{against_loops} (gradients: torchvision is not installed)"
    error = _largest_error(_gradients(squared_deform_conv2d, case), _gradients(reference.squared_deform_repeated, case))
    return _require(error, 1e-12, "values and gradients against torchvision, float64")


def _attention_identity() -> str:
    case = (torch.randn(2, 70, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64),)
    error = _largest_error(_gradients(packed_attention, case), _gradients(reference.explicit_attention, case))
    return _require(error, 1e-12, "values and gradients against the explicit form, float64")


def _gpu_identity(device: torch.device) -> str:
    lines = []
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            continue
        case = _case(dtype, channels=64)
        expected = _gradients(squared_deform_conv2d, tuple(tensor.double() for tensor in case))
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            got = _gradients(squared_deform_conv2d, tuple(tensor.to(device) for tensor in case))
        name = str(dtype).removeprefix("torch.")
        lines.append(_require(_largest_error(got, expected), limit, name))
        if not torch.equal(offset_mask(case[1].to(device)).cpu(), offset_mask(case[1])):
            raise RuntimeError(f"{name}: expected the CPU's offset mask, got a different one")
    return "; ".join(lines)


def _gpu_deterministic(device: torch.device) -> str:
    case = tuple(tensor.to(device) for tensor in _case(torch.float32, channels=64, height=40, width=40))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
            first, second = (_gradients(squared_deform_conv2d, case) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        raise RuntimeError("torch.use_deterministic_algorithms(True): expected two equal runs, got a difference")
    return "two runs are equal bit for bit"


def _gpu_speed(device: torch.device) -> str:
    generator = torch.Generator().manual_seed(3)
    shapes = ((4, 64, 128, 128), (4, 2, 128, 128), (64, 64, 3, 3), (64,))
    case = tuple(torch.randn(shape, generator=generator).to(device) for shape in shapes)
    ours = _gpu_time_ms(partial(_gradients, squared_deform_conv2d, case), device)
    line = f"forward+backward of 4x64x128x128 float32: {ours:.2f} ms"
    if importlib.util.find_spec("torchvision") is None:
        return line
    theirs = _gpu_time_ms(partial(_gradients, reference.squared_deform_repeated, case), device)
    return f"{line}, torchvision {theirs:.2f} ms ({theirs / ours:.1f}x)"


def _gpu_time_ms(step: Callable[[], object], device: torch.device) -> float:
    for _ in range(3):
        step()
    times = []
    for _ in range(10):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)
