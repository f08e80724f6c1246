"""The operators beside torchvision's and the authors' way: `python benchmarks/operators.py` (CPU, minutes on 2 cores).

Every ratio compares best times from one run in which the contestants take turns, so that a busy machine hits all of
them. The tables replace their section of benchmarks/RESULTS.md; notes outside the section's markers stay.

Shapes are N x C x H x W, K = 3. "conv" is `conv2d` of the same shape, layout and type: the floor. "repeated" is
torchvision's `deform_conv2d` with the offset repeated K*K times, in float32 also where the row says bf16 (the CPU
operator has no bf16).
"""

import argparse
import ctypes
import datetime
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

import sdan.attention
import sdan.network
from sdan.ops import packed_attention, squared_deform_conv2d
from sdan.ops.reference import explicit_attention, squared_deform_repeated

RESULTS = Path(__file__).parent / "RESULTS.md"
SHAPES = ((1, 64, 64, 64), (4, 64, 64, 64), (4, 64, 128, 128), (1, 64, 256, 256))
TOKENS = ((4, 4096, 64), (1, 4096, 256), (1, 1024, 1024))
MODULES = ((4, 64, 64, 64), (1, 64, 128, 128))
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
Step = Callable[[], object]


def best_ms(steps: dict[str, Step], seconds: float, least: int = 2) -> dict[str, float]:
    """Best time of each, in turns, for about `seconds`; a quick one runs several times a turn."""
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


M_MMAP_THRESHOLD, LARGE_BYTES = -3, 2**16  # of mallopt(3)


def peak_extra_mb(step: Step) -> float:
    """Memory that the step adds at its highest, in MB: resident pages, so that every library's scratch counts.

    Large blocks get pages of their own, which go back when they are freed. In glibc's heap, where they otherwise end up
    after a while, holes between them count or not as it happens: the same step showed 24 to 34 MB.
    """
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
    step()  # compiled kernels and caches are not the step's
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_kb("VmRSS")
    step()
    return (_status_kb("VmHWM") - before) / 1024


def _status_kb(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1))


def repeated(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torchvision's operator; half types through float32."""
    wide = (tensor.float() for tensor in (input, offset, weight, bias))
    with torch.autocast(input.device.type, enabled=False):
        return squared_deform_repeated(*wide).to(input.dtype)


def backward_of(operator: Callable[..., Tensor], tensors: list[Tensor], upstream: Tensor) -> Step:
    return lambda: torch.autograd.grad(operator(*tensors), tensors, upstream)


def forward_of(operator: Callable[..., Tensor], tensors: list[Tensor]) -> Step:
    def step() -> Tensor:
        with torch.no_grad():
            return operator(*tensors)

    return step


def operator_case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: torch.memory_format
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(ours: input, offset, weight, bias), (conv: input, weight, bias), upstream gradient."""
    random = torch.Generator().manual_seed(0)
    num_images, channels, height, width = shape
    input = torch.randn(shape, generator=random).to(dtype).contiguous(memory_format=layout)
    offset = 3 * torch.randn(num_images, 2, height, width, generator=random)
    weight = (torch.randn(channels, channels, 3, 3, generator=random) / 24).to(dtype)
    bias = torch.randn(channels, generator=random).to(dtype)
    upstream = torch.randn(shape, generator=random).to(dtype).contiguous(memory_format=layout)
    ours = [tensor.requires_grad_() for tensor in (input, offset, weight, bias)]
    return ours, [ours[0], *ours[2:]], upstream


def plain_conv(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.conv2d(input, weight, bias, padding=1)


def operator_rows(seconds: float) -> Iterator[str]:
    yield (
        "| shape | type | threads | conv ms, f / f+b | ours ms, f / f+b | repeated ms, f / f+b "
        "| repeated / ours, f / f+b | ours / conv, f / f+b | ours / conv channels-last, f / f+b |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for dtype in NAMES:
            for shape in SHAPES:
                yield operator_row(shape, dtype, threads, seconds)


def operator_row(shape: tuple[int, int, int, int], dtype: torch.dtype, threads: int, seconds: float) -> str:
    ours, conv, upstream = operator_case(shape, dtype, torch.contiguous_format)
    ours_cl, conv_cl, upstream_cl = operator_case(shape, dtype, torch.channels_last)
    f = best_ms(
        {
            "conv": forward_of(plain_conv, conv),
            "ours": forward_of(squared_deform_conv2d, ours),
            "conv_cl": forward_of(plain_conv, conv_cl),
            "ours_cl": forward_of(squared_deform_conv2d, ours_cl),
            "repeated": forward_of(repeated, ours),
        },
        seconds,
    )
    fb = best_ms(
        {
            "conv": backward_of(plain_conv, conv, upstream),
            "ours": backward_of(squared_deform_conv2d, ours, upstream),
            "conv_cl": backward_of(plain_conv, conv_cl, upstream_cl),
            "ours_cl": backward_of(squared_deform_conv2d, ours_cl, upstream_cl),
            "repeated": backward_of(repeated, ours, upstream),
        },
        seconds,
    )
    name = "x".join(map(str, shape))
    return (
        f"| {name} | {NAMES[dtype]} | {threads} | {f['conv']:.1f} / {fb['conv']:.1f} "
        f"| {f['ours']:.1f} / {fb['ours']:.1f} "
        f"| {f['repeated']:.0f} / {fb['repeated']:.0f} "
        f"| **{f['repeated'] / f['ours']:.0f}x / {fb['repeated'] / fb['ours']:.0f}x** "
        f"| {f['ours'] / f['conv']:.2f} / **{fb['ours'] / fb['conv']:.2f}** "
        f"| {f['ours_cl'] / f['conv_cl']:.2f} / **{fb['ours_cl'] / fb['conv_cl']:.2f}** |"
    )


def memory_rows() -> Iterator[str]:
    """Peaks hold the output and the gradients, as the convolution's does; what an operator adds to that is its own."""
    yield (
        "| shape | type | conv MB | ours MB | ours channels-last MB | repeated MB "
        "| beyond conv: ours / repeated | channels-last / repeated |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    torch.set_num_threads(2)
    for dtype in NAMES:
        for shape in SHAPES[1:]:
            ours, conv, upstream = operator_case(shape, dtype, torch.contiguous_format)
            peaks = [
                peak_extra_mb(backward_of(plain_conv, conv, upstream)),
                peak_extra_mb(backward_of(squared_deform_conv2d, ours, upstream)),
            ]
            ours_cl, _, upstream_cl = operator_case(shape, dtype, torch.channels_last)
            peaks.append(peak_extra_mb(backward_of(squared_deform_conv2d, ours_cl, upstream_cl)))
            peaks.append(peak_extra_mb(backward_of(repeated, ours, upstream)))
            share = [(peak - peaks[0]) / (peaks[-1] - peaks[0]) for peak in peaks[1:3]]
            name = "x".join(map(str, shape))
            cells = " | ".join([f"{peak:.0f}" for peak in peaks] + [f"**{part:.2f}**" for part in share])
            yield f"| {name} | {NAMES[dtype]} | {cells} |"


def attention_rows(seconds: float) -> Iterator[str]:
    yield (
        "| tokens (N x L x C) | type | threads | ours ms, f / f+b | explicit ms, f / f+b | explicit / ours, f / f+b "
        "| peak MB ours / explicit |"
    )
    yield "|---|---|---|---|---|---|---|"
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for dtype in NAMES:
            for shape in TOKENS:
                random = torch.Generator().manual_seed(0)
                x = (0.3 * torch.randn(shape, generator=random)).to(dtype).requires_grad_()
                upstream = torch.randn(shape, generator=random).to(dtype)
                ways = {"ours": packed_attention, "explicit": explicit_attention}
                f = best_ms({name: forward_of(way, [x]) for name, way in ways.items()}, seconds)
                both = {name: backward_of(way, [x], upstream) for name, way in ways.items()}
                fb, peak = best_ms(both, seconds), {name: peak_extra_mb(step) for name, step in both.items()}
                yield (
                    f"| {'x'.join(map(str, shape))} | {NAMES[dtype]} | {threads} | {f['ours']:.0f} / {fb['ours']:.0f} "
                    f"| {f['explicit']:.0f} / {fb['explicit']:.0f} "
                    f"| **{f['explicit'] / f['ours']:.1f}x / {fb['explicit'] / fb['ours']:.1f}x** "
                    f"| {peak['ours']:.0f} / {peak['explicit']:.0f} |"
                )


@contextmanager
def authors_way() -> Iterator[None]:
    """The same module with the authors' two operators in place of ours."""
    with (
        mock.patch.object(sdan.network, "squared_deform_conv2d", repeated),
        mock.patch.object(sdan.attention, "packed_attention", explicit_attention),
    ):
        yield


def module_rows(seconds: float) -> Iterator[str]:
    yield "| features | type | threads | ours ms, f+b | authors' way ms, f+b | authors' / ours |"
    yield "|---|---|---|---|---|---|"
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for dtype in NAMES:
            for shape in MODULES:
                torch.manual_seed(0)
                module = sdan.network.AlignmentModule(sdan.network.SDANConfig(features=shape[1]))
                features = torch.randn(shape, requires_grad=True)
                reference = torch.rand(shape[0], 3, *shape[2:])
                ours = module_step(module, features, reference, dtype)

                def theirs(step: Step = ours) -> None:
                    with authors_way():
                        step()

                fb = best_ms({"ours": ours, "authors": theirs}, seconds)
                yield (
                    f"| {'x'.join(map(str, shape))} | {NAMES[dtype]} | {threads} "
                    f"| {fb['ours']:.0f} | {fb['authors']:.0f} "
                    f"| **{fb['authors'] / fb['ours']:.1f}x** |"
                )


def module_step(module: torch.nn.Module, features: Tensor, reference: Tensor, dtype: torch.dtype) -> Step:
    """Forward and backward as a training step runs them: bf16 by autocast."""

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            aligned_features, aligned, _, _ = module(features, reference)
        (aligned_features.float().square().mean() + aligned.float().square().mean()).backward()

    return step


def error_rows() -> Iterator[str]:
    yield "| type | value | grad input | grad offset | grad weight | grad bias |"
    yield "|---|---|---|---|---|---|"
    torch.set_num_threads(2)
    for dtype in (torch.float64, torch.float32):
        ours, _, upstream = operator_case((1, 64, 64, 64), torch.float32, torch.contiguous_format)
        tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in ours]
        results = []
        for operator in (squared_deform_conv2d, squared_deform_repeated):
            output = operator(*tensors)
            results.append([output, *torch.autograd.grad(output, tensors, upstream.to(dtype))])
        errors = [float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in zip(*results, strict=True)]
        yield f"| {str(dtype).removeprefix('torch.')} | {' | '.join(f'{error:.0e}' for error in errors)} |"


def provenance(command: str, folders: tuple[str, ...] = ("../sdan",)) -> str:
    """Where the numbers come from, on one line; `folders` hold the code that was measured, beside this one."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", *folders, "."], capture_output=True, text=True, check=False
    ).stdout
    changed = "\n".join(line for line in changed.splitlines() if not line.endswith("RESULTS.md"))
    processor = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"`{command}`; commit {commit.strip() or 'unknown'}{' with changes' if changed else ''}; "
        f"{processor.group(1) if processor else platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores, {memory_gb:.0f} GB, {torch.backends.cpu.get_cpu_capability()}; "
        f"torch {torch.__version__}, Python {platform.python_version()}; "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC; load before {os.getloadavg()[0]:.1f}"
    )


def update_section(name: str, text: str, results: Path = RESULTS) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`, or append it."""
    before = results.read_text() if results.exists() else "# Results\n"
    section = f"<!-- {name} -->\n{text.strip()}\n<!-- /{name} -->"
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    after = pattern.sub(lambda _: section, before) if pattern.search(before) else f"{before.rstrip()}\n\n{section}\n"
    results.write_text(after)


Tables = dict[str, tuple[str, Callable[[], Iterator[str]]]]
"""Name -> title, and what makes the rows."""


def publish(section: str, origin: str, tables: Tables, only: str | None) -> None:
    """Print the tables row by row, as they are measured; all of them together become their section of RESULTS.md."""
    text = [origin]
    print(origin, flush=True)
    for name, (title, rows) in tables.items():
        if only in (None, name):
            text.append(f"\n### {title}\n")
            print(text[-1], flush=True)
            for row in rows():
                text.append(row)
                print(row, flush=True)
    if only is None:
        update_section(section, "\n".join(text))


def main() -> None:
    """Measure, print as it goes, and update RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per cell beyond the two turns that each takes")
    parser.add_argument(
        "--only", choices=["operator", "memory", "attention", "module", "errors"], help="one table, printed"
    )
    chosen = parser.parse_args()
    origin = provenance("python " + " ".join(["benchmarks/operators.py", *sys.argv[1:]]))
    tables: Tables = {
        "operator": (
            "Squared deformable convolution (f = forward, b = backward)",
            lambda: operator_rows(chosen.seconds),
        ),
        "memory": ("Its peak memory, forward+backward", memory_rows),
        "attention": ("Packed attention", lambda: attention_rows(chosen.seconds)),
        "module": ("The whole alignment module", lambda: module_rows(chosen.seconds)),
        "errors": ("Largest relative difference to torchvision, 1x64x64x64", error_rows),
    }
    publish("operators", origin, tables, chosen.only)


if __name__ == "__main__":
    main()
