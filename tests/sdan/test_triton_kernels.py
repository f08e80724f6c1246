"""The Triton kernels equal plain PyTorch, in Triton's interpreter and on a GPU if present, and compile for many GPUs.

The interpreter must be enabled before Triton is imported, so `test_under_the_interpreter` runs this file again in a
separate process with TRITON_INTERPRET=1. Only the tests marked `interpreted` run there, through the same launch code as
on a GPU.
"""

import os
import subprocess
import sys

import pytest
import torch

from sdan import ops
from sdan.ops import rows

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="run by test_under_the_interpreter in a separate process")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# batch, channels, height, width, margin
SHAPES = [(2, 3, 5, 7, 1), (1, 1, 1, 1, 1), (1, 64, 5, 23, 0), (2, 70, 4, 9, 2), (1, 130, 3, 3, 1), (3, 16, 1, 40, 0)]


def case(shape, dtype, offset_dtype=None):
    batch, channels, height, width, margin = shape
    random = torch.Generator().manual_seed(4)
    make = lambda *size: torch.randn(*size, generator=random, dtype=torch.float64)  # noqa: E731
    input = make(batch, channels, height + 2 * margin, width + 2 * margin).to(dtype)
    if offset_dtype is None:
        offset_dtype = dtype if dtype == torch.float64 else torch.float32
    offset = (3 * make(batch, 2, height, width)).to(offset_dtype)
    special = [float("nan"), float("inf"), -float("inf"), 1e30, 1.0, -1.0, 0.0]
    for place, value in zip(range(offset[0, 0].numel() - 1), special, strict=False):
        offset[0, place % 2].view(-1)[place + 1] = value
    return input, offset, make(channels).to(dtype), make(batch, channels, height, width).to(dtype)


def assert_near(got, expected, limit):
    assert got.shape == expected.shape
    assert got.stride() == expected.stride()
    assert torch.equal(got.isnan(), expected.isnan())
    got, expected = got.double().nan_to_num(), expected.double().nan_to_num()
    assert float((got - expected).abs().max()) <= limit * max(float(expected.abs().max()), 1e-2)


def compare(launcher, shape, dtype, device="cpu", offset_dtype=None):
    """Compare every option of the kernels with plain PyTorch on the CPU."""
    input, offset, bias, grad = case(shape, dtype, offset_dtype)
    moved = [tensor.to(device) for tensor in (input, offset, bias, grad)]
    margin = shape[-1]
    for with_bias in (True, False):
        got = launcher.warp(moved[0], moved[1], moved[2] if with_bias else None, margin)
        expected = rows.warp(input, offset, bias if with_bias else None, margin)
        assert_near(got.cpu(), expected, LIMITS[dtype])
    for need_input, need_offset in ((True, True), (True, False), (False, True)):
        needs = {"need_input": need_input, "need_offset": need_offset}
        got = launcher.warp_backward(moved[3], moved[0], moved[1], margin, **needs)
        expected = rows.warp_backward(grad, input, offset, margin, **needs)
        for a, b in zip(got, expected, strict=True):
            if b.numel():
                assert_near(a.cpu(), b, LIMITS[dtype])
            else:
                assert a.numel() == 0


def test_under_the_interpreter():
    if INTERPRETING:
        pytest.skip("this process runs under the interpreter already")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreter", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert f"{len(SHAPES) * len(LIMITS) + 5} passed" in run.stdout


@interpreted
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("shape", SHAPES)
def test_interpreter_equals_plain_pytorch(shape, dtype):
    from sdan.ops import triton_warp

    compare(triton_warp, shape, dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_interpreter_reads_offsets_of_half_types(dtype):
    from sdan.ops import triton_warp

    compare(triton_warp, SHAPES[0], dtype, offset_dtype=dtype)


@interpreted
def test_interpreter_runs_the_public_operator():
    """The same path as on a GPU: dispatch, custom operator, autograd, launch."""
    from sdan.ops import backend, triton_warp
    from sdan.ops.reference import squared_deform_repeated

    random = torch.Generator().manual_seed(6)
    shapes = ((2, 3, 6, 7), (2, 2, 6, 7), (4, 3, 3, 3), (4,))
    tensors = [torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert backend.kernels(tensors[0]) is triton_warp
    results = []
    for operator in (ops.squared_deform_conv2d, squared_deform_repeated):
        output = operator(*tensors)
        upstream = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        results.append([output, *torch.autograd.grad(output, tensors, upstream)])
    for got, expected in zip(*results, strict=True):
        assert float((got - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


@interpreted
@pytest.mark.parametrize("layout", ["strided", "deterministic"])
def test_interpreter_strided_inputs_and_deterministic_mode(layout):
    from sdan.ops import triton_warp

    input, offset, _, grad = case(SHAPES[3], torch.float32)
    expected = rows.warp_backward(grad, input, offset, 2, need_input=True, need_offset=True)
    if layout == "strided":
        wide = [tensor.repeat_interleave(2, dim=-1)[..., ::2] for tensor in (grad, input, offset)]
        got = triton_warp.warp_backward(*wide, 2, need_input=True, need_offset=True)
    else:
        torch.use_deterministic_algorithms(True)
        try:
            got = triton_warp.warp_backward(grad, input, offset, 2, need_input=True, need_offset=True)
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.equal(got[0], expected[0])
    for a, b in zip(got, expected, strict=True):
        assert_near(a, b, 1e-5)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["warp_forward_kernel", "warp_backward_kernel"])
def test_compiles_without_spills(kernel, architecture):
    pytest.importorskip("triton")
    from compile_report import compile_one

    for dtype, channels in ((torch.float32, 64), (torch.bfloat16, 64), (torch.float32, 3)):
        built = compile_one(kernel, dtype, channels, architecture)
        assert built.spilled_bytes == built.stack_bytes == 0, built
        assert 16 <= built.registers <= 168, built
        if channels == 64 and (dtype == torch.float32 or kernel == "warp_forward_kernel"):
            assert built.vector_loads >= 4, built  # 128-bit loads for each of the four corners


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
def test_the_whole_report_has_no_spills(capsys):
    pytest.importorskip("triton")
    import compile_report

    assert compile_report.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| sm_") == 72
    assert printed.endswith("no spills\n")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("shape", SHAPES)
def test_gpu_equals_plain_pytorch(shape, dtype):
    triton_warp = pytest.importorskip("sdan.ops.triton_warp")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the Triton kernels need sm_80; this GPU uses plain PyTorch")
    compare(triton_warp, shape, dtype, device="cuda")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", list(LIMITS))
def test_plain_pytorch_on_a_gpu_equals_the_cpus(dtype):
    compare(rows, SHAPES[3], dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_gpu_launch_follows_the_tensors_device():
    image = torch.randn(1, 8, 6, 7, device="cuda:1")
    output = torch.ops.sdan.bilinear_warp(image, torch.zeros(1, 2, 6, 7, device="cuda:1"), None, 0)
    assert output.device == image.device
    assert torch.equal(output, image)
