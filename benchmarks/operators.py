"""Our operators against torchvision's and the authors': `python benchmarks/operators.py` (CPU, minutes on 2 cores).

Each ratio compares best times from one run in which the implementations take turns, so that background load affects
all of them. The tables replace their section of benchmarks/RESULTS.md; text outside the section's markers is kept.

Shapes are N x C x H x W, K = 3. "conv" is `conv2d` of the same shape, layout and type: the lower bound. "repeated" is
torchvision's `deform_conv2d` with the offset repeated K*K times. It runs in float32 even in bf16 rows, because the CPU
operator has no bf16.
"""

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from authors_operators import authors_way, repeated
from measure import Step, best_ms, peak_extra_mb
from results import Tables, provenance, publish
from torch import Tensor
from torch.nn import functional

import sdan.network
from sdan.ops import packed_attention, squared_deform_conv2d
from sdan.ops.reference import explicit_attention, squared_deform_repeated

SHAPES = ((1, 64, 64, 64), (4, 64, 64, 64), (4, 64, 128, 128), (1, 64, 256, 256))
TOKENS = ((4, 4096, 64), (1, 4096, 256), (1, 1024, 1024))
MODULES = ((4, 64, 64, 64), (1, 64, 128, 128))
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


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


def module_step(module: torch.nn.Module, features: Tensor, reference: Tensor, dtype: torch.dtype) -> Step:
    """Forward and backward as in a training step: bf16 through autocast."""

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


def main() -> None:
    """Measure, print each row when it is ready, and update RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per cell, at least two turns each")
    parser.add_argument(
        "--only", choices=["operator", "memory", "attention", "module", "errors"], help="print this table only"
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
