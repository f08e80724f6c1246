"""Where a step's time goes: GPU kernels grouped by what they compute.

A kernel's kind follows from its name and from the PyTorch operators that were running when it was launched, because
many names say little: the same copy kernel changes a type or a layout, and cuDNN names some convolutions "gemm".
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

CONVOLUTION, CONVOLUTION_BACK = "convolution, forward", "convolution, backward"
ATTENTION, ATTENTION_BACK = "attention, forward", "attention, backward"
SAMPLING, PACKING, COPIES, CASTS = "sampling", "packing", "copies, layout", "casts"
PRODUCTS, SUMS, ELEMENTWISE, FILLS = "matrix products", "sums", "element-wise", "fills"
OPTIMIZER, OTHER = "optimizer, averages", "other"
KINDS = (
    CONVOLUTION,
    CONVOLUTION_BACK,
    ATTENTION,
    ATTENTION_BACK,
    SAMPLING,
    PACKING,
    COPIES,
    CASTS,
    PRODUCTS,
    SUMS,
    ELEMENTWISE,
    FILLS,
    OPTIMIZER,
    OTHER,
)

# Tried in this order on "kernel | operators, innermost first", in lower case.
_RULES: tuple[tuple[str, str], ...] = (
    (OPTIMIZER, r"adam|multi_tensor_apply|aten::_foreach|optimizer\.step"),
    (FILLS, r"^memset|fillfunctor|^aten::(fill_|zero_)"),
    (CASTS, r"(bfloat16|float16|half)_copy|loadwithcast|copy.*\| (aten::copy_, )?aten::_to_copy"),
    (PACKING, r"^(un)?pack_(gradient_)?kernel"),
    (COPIES, r"^memcpy|copy|nchwtonhwc|nhwctonchw|addpadding|catarray|flip|pixel_(un)?shuffle|^shuffle_"),
    (SAMPLING, r"warp_(forward|backward)|bilinear_warp|deformable|grid_sampler|upsample|embedding_bag"),
    (ATTENTION, r"flash|fmha|attention|softmax|cross_?packing"),
    (CONVOLUTION, r"fprop|dgrad|wgrad|convol|(?<!squareddeform)conv2d|cudnn"),
    (SAMPLING, r"squareddeformconv2d"),
    (PRODUCTS, r"gemm|cutlass|cublas|aten::(mm|bmm|addmm|matmul|linear)"),
    (SUMS, r"reduce|aten::(sum|mean|norm|linalg_vector_norm)"),
    (ELEMENTWISE, r"elementwise|aten::"),
)
_BACKWARD = re.compile(r"dgrad|wgrad|bwd|backward|autograd::engine")
_PHASES = {CONVOLUTION: CONVOLUTION_BACK, ATTENTION: ATTENTION_BACK}


@dataclass(frozen=True)
class Launch:
    """One kernel that ran on the device."""

    kernel: str
    operators: tuple[str, ...]
    """PyTorch's operators that were running, innermost first; empty inside a CUDA graph."""
    us: float
    """Time on the device, microseconds."""


def kind_of(launch: Launch) -> str:
    """One of KINDS."""
    text = f"{launch.kernel} | {', '.join(launch.operators)}".lower()
    for kind, pattern in _RULES:
        if re.search(pattern, text):
            # PyTorch calls the forward pass of a custom operator GeneratedBackwardFor_<its name>.
            backward = _BACKWARD.search(text.replace("generatedbackwardfor", ""))
            return _PHASES.get(kind, kind) if backward else kind
    return OTHER


def by_kind(launches: Iterable[Launch], steps: int) -> dict[str, tuple[float, float]]:
    """Kind -> (milliseconds, kernels) per step; kinds in the order of KINDS."""
    us: dict[str, float] = defaultdict(float)
    count: Counter[str] = Counter()
    for launch in launches:
        kind = kind_of(launch)
        us[kind] += launch.us
        count[kind] += 1
    return {kind: (us[kind] / 1e3 / steps, count[kind] / steps) for kind in KINDS}


def longest(launches: Iterable[Launch], steps: int, number: int) -> list[tuple[str, str, float, float]]:
    """(kernel, kind, milliseconds per step, launches per step) of the kernels with the longest total time."""
    us: dict[tuple[str, str], float] = defaultdict(float)
    count: Counter[tuple[str, str]] = Counter()
    for launch in launches:
        key = launch.kernel, kind_of(launch)
        us[key] += launch.us
        count[key] += 1
    order = sorted(us, key=lambda key: -us[key])[:number]
    return [(*key, us[key] / 1e3 / steps, count[key] / steps) for key in order]


def launches_of(step: Callable[[], object], steps: int, device: torch.device) -> list[Launch]:
    """Profile `steps` calls. On a CPU the operators themselves stand for kernels.

    Raises:
        RuntimeError: the profiler saw no kernel on the GPU.
    """
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiler:
        for _ in range(steps):
            step()
        if on_cuda:
            torch.cuda.synchronize()
    events = [event for event in profiler.events() or [] if event.device_type == DeviceType.CPU]
    if not on_cuda:
        return [Launch(event.name, _above(event.cpu_parent), event.self_cpu_time_total) for event in events]
    launches = [
        Launch(kernel.name, (event.name, *_above(event.cpu_parent)), kernel.duration)
        for event in events
        for kernel in event.kernels
    ]
    if not launches:
        raise RuntimeError("torch.profiler: expected kernels, got none; CUPTI is missing or not permitted here")
    return launches


def _above(event: FunctionEvent | None) -> tuple[str, ...]:
    """Names of an operator and of those around it, innermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return tuple(names)
