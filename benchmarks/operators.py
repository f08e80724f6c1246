"""Our operators against torchvision's and the authors': `python benchmarks/operators.py` (minutes).

Where there is a GPU, or with `--device cuda`, it runs the operators' tables of benchmarks/gpu.py; their columns are
explained in benchmarks/on_gpu/operator_tables.py. This text explains the CPU's.

Each ratio compares best times from one run in which the implementations take turns, so that background load affects
all of them. The tables replace their section of benchmarks/RESULTS.md; text outside the section's markers is kept.

Shapes are N x C x H x W, K = 3. "conv" is `conv2d` of the same shape, layout and type: the lower bound. "repeated" is
torchvision's `deform_conv2d` with the offset repeated K*K times. It runs in float32 even in bf16 rows, because the CPU
operator has no bf16.
"""

import argparse
import sys
from collections.abc import Iterator

import gpu  # puts the repository on the import path
import torch
from authors_operators import authors_way, repeated
from measure import Step, best_ms, peak_extra_mb
from operator_steps import backward_of, forward_of, module_step, operator_case, plain_conv, relative_errors
from results import Tables, provenance, publish

import sdan.network
from sdan.ops import packed_attention, squared_deform_conv2d
from sdan.ops.reference import explicit_attention, squared_deform_repeated

SHAPES = ((1, 64, 64, 64), (4, 64, 64, 64), (4, 64, 128, 128), (1, 64, 256, 256))
TOKENS = ((4, 4096, 64), (1, 4096, 256), (1, 1024, 1024))
MODULES = ((4, 64, 64, 64), (1, 64, 128, 128))
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


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
    """Every peak includes the output and the gradients, so the convolution's is subtracted in the last columns."""
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


def error_rows() -> Iterator[str]:
    yield "| type | value | grad input | grad offset | grad weight | grad bias |"
    yield "|---|---|---|---|---|---|"
    torch.set_num_threads(2)
    for dtype in (torch.float64, torch.float32):
        ours, _, upstream = operator_case((1, 64, 64, 64), torch.float32, torch.contiguous_format)
        tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in ours]
        errors = relative_errors(squared_deform_conv2d, squared_deform_repeated, tensors, upstream.to(dtype), dtype)
        yield f"| {str(dtype).removeprefix('torch.')} | {' | '.join(f'{error:.0e}' for error in errors)} |"


def cpu_tables(seconds: float) -> Tables:
    """The CPU's tables, with about `seconds` for each cell."""
    return {
        "operator": ("Squared deformable convolution (f = forward, b = backward)", lambda: operator_rows(seconds)),
        "memory": ("Its peak memory, forward+backward", memory_rows),
        "attention": ("Packed attention", lambda: attention_rows(seconds)),
        "module": ("The whole alignment module", lambda: module_rows(seconds)),
        "errors": ("Largest relative difference to torchvision, 1x64x64x64", error_rows),
    }


def main() -> int:
    """Measure, print each row when it is ready, and update RESULTS.md; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU: time per cell, at least two turns each")
    gpu.add_device_options(parser, cpu_tables(0.0), gpu.OPERATORS)
    chosen = parser.parse_args()
    command = "python " + " ".join(["benchmarks/operators.py", *sys.argv[1:]])
    if chosen.device == "cuda":
        return gpu.run_some(gpu.OPERATORS, chosen.only, command)
    publish("operators", provenance(command), cpu_tables(chosen.seconds), chosen.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
