"""Compile the Triton kernels for several GPUs and print their resource use: `python benchmarks/compile_report.py`.

No GPU is needed. `cuobjdump`, which comes with Triton, reads registers, stack and spilled (local) bytes from the cubin.
A spill moves values through memory in the middle of the kernel; the command exits with code 1 if there is one.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sdan.ops import triton_kernels
from sdan.ops.triton_warp import BIAS_ROWS, launch_meta

ARCHITECTURES = (80, 90, 100)
CHANNELS = (3, 64, 256)
_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one dtype, number of channels and GPU."""

    kernel: str
    dtype: str
    channels: int
    layout: str
    architecture: int
    registers: int
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int
    vector_loads: int
    """128-bit loads from global memory in the PTX."""


def compile_all(architectures: Sequence[int] = ARCHITECTURES, channels: Sequence[int] = CHANNELS) -> Iterator[Compiled]:
    """Compile every kernel that `triton_warp` launches."""
    for architecture in architectures:
        for name in ("warp_forward_kernel", "warp_backward_kernel"):
            for dtype in _NAMES:
                for width in channels:
                    for channels_last in (True, False):
                        yield compile_one(name, dtype, width, architecture, channels_last=channels_last)


def compile_one(
    name: str, dtype: torch.dtype, channels: int, architecture: int, *, channels_last: bool = True
) -> Compiled:
    """Compile one kernel as for a launch on tensors of this dtype and number of channels, with every gradient.

    channels_last   the layout of output and grad
    """
    kernel = getattr(triton_kernels, name)
    meta = launch_meta(channels, dtype, backward="backward" in name)
    options = {"num_warps": meta.pop("num_warps")}
    flags: dict[str, Any] = dict.fromkeys(("HAS_BIAS", "NEED_INPUT", "NEED_OFFSET", "NEED_BIAS"), True)
    flags |= {"CHANNELS_LAST": channels_last, "BIAS_ROWS": BIAS_ROWS}
    constants = {key: value for key, value in (flags | meta).items() if key in kernel.arg_names}
    if channels == 1:
        constants["channels"] = 1
    signature = {arg: _type(arg, dtype) if arg not in constants else "constexpr" for arg in kernel.arg_names}
    aligned = [arg for arg in kernel.arg_names if arg.endswith("_ptr")] + (["channels"] if channels % 16 == 0 else [])
    attributes = {(kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in aligned}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    usage = _resource_usage(built.asm["cubin"])
    return Compiled(
        kernel=name,
        dtype=_NAMES[dtype],
        channels=channels,
        layout="NHWC" if channels_last else "NCHW",
        architecture=architecture,
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        spilled_bytes=usage["LOCAL"],
        shared_bytes=built.metadata.shared,
        vector_loads=len(re.findall(r"ld\.global[^ ]*\.v4\.b32|ld\.global[^ ]*\.v2\.b64", built.asm["ptx"])),
    )


def _type(arg: str, dtype: torch.dtype) -> str:
    wide = "fp64" if dtype == torch.float64 else "fp32"
    if arg in ("offset_ptr", "grad_offset_ptr", "sums_ptr"):
        return f"*{wide}"
    return f"*{_NAMES[dtype]}" if arg.endswith("_ptr") else "i32"


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if anything spills, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="compute capabilities, e.g. 80 90"
    )
    parser.add_argument("--channels", type=int, nargs="+", default=list(CHANNELS))
    chosen = parser.parse_args(arguments)
    write: Any = sys.stdout.write
    write(f"Triton {triton.__version__}\n")
    write("| kernel | type | channels | layout | GPU | registers | stack B | spilled B | shared B | 128-bit loads |\n")
    write("|---|---|---|---|---|---|---|---|---|---|\n")
    spilled = 0
    for row in compile_all(chosen.arch, chosen.channels):
        spilled += row.spilled_bytes + row.stack_bytes
        write(
            f"| {row.kernel} | {row.dtype} | {row.channels} | {row.layout} | sm_{row.architecture} | {row.registers} "
            f"| {row.stack_bytes} | {row.spilled_bytes} | {row.shared_bytes} | {row.vector_loads} |\n"
        )
    write("no spills\n" if not spilled else "SPILLS: reduce the values per program in triton_warp.py\n")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
