"""The Triton kernels equal plain PyTorch, in Triton's interpreter and on a GPU if present, and compile for many GPUs.

The interpreter must be enabled before Triton is imported, so `test_under_the_interpreter` runs this file again in a
separate process with TRITON_INTERPRET=1. Only the tests marked `interpreted` run there, through the same launch code as
on a GPU.
"""

from collections import defaultdict

import operator_cases
import pytest
import torch
from interpreter import INTERPRETING, interpreted, run_under_the_interpreter
from operator_cases import value_and_gradients

from sdan import ops
from sdan.ops import precision, rows
from sdan.ops.reference import squared_deform_repeated

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# batch, channels, height, width, margin
NEEDS = [(True, True, True), (True, False, False), (False, True, False), (False, False, True), (True, True, False)]
SHAPES = [(2, 3, 5, 7, 1), (1, 1, 1, 1, 1), (1, 64, 3, 11, 0), (2, 70, 3, 5, 2), (1, 130, 3, 3, 1), (3, 16, 1, 20, 0)]


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
    assert torch.equal(got.isnan(), expected.isnan())
    got, expected = got.double().nan_to_num(), expected.double().nan_to_num()
    assert float((got - expected).abs().max()) <= limit * max(float(expected.abs().max()), 1e-2)


def compare(launcher, shape, dtype, device="cpu", offset_dtype=None):
    """Compare the kernels with plain PyTorch on the CPU; the first shape with every option."""
    input, offset, bias, grad = case(shape, dtype, offset_dtype)
    moved = [tensor.to(device) for tensor in (input, offset, bias, grad)]
    margin = shape[-1]
    every = shape == SHAPES[0]
    for with_bias, channels_last in ((True, True), (False, True), (True, False))[: 3 if every else 1]:
        got = launcher.warp(moved[0], moved[1], moved[2] if with_bias else None, margin, channels_last=channels_last)
        expected = rows.warp(input, offset, bias if with_bias else None, margin, channels_last=channels_last)
        assert got.stride() == expected.stride()
        assert_near(got.cpu(), expected, LIMITS[dtype])
    for number, needs in enumerate(NEEDS if every else NEEDS[:1]):
        upstream = moved[3] if number % 2 else moved[3].contiguous(memory_format=torch.channels_last)
        got = launcher.warp_backward(upstream, moved[0], moved[1], margin, needs)
        for a, b, need in zip(got, rows.warp_backward(grad, input, offset, margin, needs), needs, strict=True):
            assert (a is None, b is None) == (not need, not need)
            if need:
                assert a.dtype == b.dtype
                assert a.stride() == b.stride()
                assert_near(a.cpu(), b, LIMITS[dtype])


def test_under_the_interpreter():
    run_under_the_interpreter(__file__, len(SHAPES) * len(LIMITS) + 13)


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
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", list(LIMITS))
def test_interpreter_runs_the_public_operator(dtype, layout):
    """The same path as on a GPU: autograd function, launch, kernels; against torchvision in float64."""
    from sdan.ops import backend, triton_warp

    tensors = operator_cases.case((6, 7), dtype=dtype)
    assert backend.kernels(tensors[0]) is triton_warp
    expected = value_and_gradients(squared_deform_repeated, [tensor.double() for tensor in tensors])
    tensors[0] = tensors[0].contiguous(memory_format=layout)
    got = value_and_gradients(ops.squared_deform_conv2d, tensors)
    assert got[0].is_contiguous(memory_format=layout)
    assert [tensor.dtype for tensor in got] == [dtype] * 5
    operator_cases.assert_near(got, expected, operator_cases.LIMITS[dtype])


@interpreted
def test_interpreter_gradcheck():
    tensors = operator_cases.case((3, 4), channels=(2, 3), batch=1)
    whole = torch.randint(-2, 3, tensors[1].shape, generator=torch.Generator().manual_seed(8))
    tensors[1] = whole + 0.25 + tensors[0][:, :1].sigmoid() / 2  # not near integers, where there is no gradient
    leaves = [tensor.requires_grad_() for tensor in tensors]
    torch.autograd.gradcheck(ops.squared_deform_conv2d, leaves, fast_mode=True)
    expected = value_and_gradients(ops.squared_deform_conv2d, tensors)[1:]
    for needed in range(4):
        leaves = [tensor.detach().requires_grad_(number == needed) for number, tensor in enumerate(tensors)]
        upstream = torch.randn(1, 3, 3, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        got = torch.autograd.grad(ops.squared_deform_conv2d(*leaves), leaves[needed], upstream)
        operator_cases.assert_near(got, [expected[needed]], 1e-12)


@interpreted
@pytest.mark.parametrize("layout", ["strided", "deterministic"])
def test_interpreter_strided_inputs_and_deterministic_mode(layout):
    from sdan.ops import triton_warp

    input, offset, _, grad = case(SHAPES[3], torch.float32)
    expected = rows.warp_backward(grad, input, offset, 2, NEEDS[0])
    if layout == "strided":
        wide = [tensor.repeat_interleave(2, dim=-1)[..., ::2] for tensor in (grad, input, offset)]
        got = triton_warp.warp_backward(*wide, 2, NEEDS[0])
    else:
        torch.use_deterministic_algorithms(True)
        try:
            got = triton_warp.warp_backward(grad, input, offset, 2, NEEDS[0])
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.equal(got[0], expected[0])
    for a, b in zip(got, expected, strict=True):
        assert_near(a, b, 1e-5)


class FakeDriver:
    """Stands for Triton's CUDA driver: kernels are compiled for sm_90, launches are only noted."""

    def __init__(self):
        from triton.backends.compiler import GPUTarget

        self.utils, self.launches, self.target = self, [], GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return self.target

    def get_device_properties(self, device):
        return {"max_shared_mem": 2**17}

    def load_binary(self, *arguments):
        return None, 2, 40, 0, 1024

    def launcher_cls(self, source, metadata):
        return lambda *arguments: self.launches.append((metadata.name, arguments))


@pytest.fixture
def fake_driver(monkeypatch):
    pytest.importorskip("triton")
    from triton.runtime import driver

    from sdan.ops import triton_kernels, triton_warp

    fake = FakeDriver()
    monkeypatch.setattr(driver, "_active", fake)
    names = "warp_forward_kernel", "warp_backward_kernel", "warp_backward_sums_kernel"
    for kernel in (getattr(triton_kernels, name) for name in names):
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    caches = triton_warp._forward_launch, triton_warp._backward_launch, triton_warp._sums_launch
    for cache in caches:
        cache.cache_clear()
    yield fake
    for cache in caches:
        cache.cache_clear()


@pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
def test_a_prepared_launch_passes_what_triton_passes(fake_driver):
    """The first launch of a shape is Triton's own; the second one uses the kernel that it returned."""
    from sdan.ops import triton_warp

    input, offset, bias, grad = case((2, 16, 4, 5, 1), torch.float32)
    types = (torch.float32,) * 3
    forward = triton_warp._forward_launch(input.shape, offset.shape, 1, types, 0, True)
    backward = triton_warp._backward_launch(input.shape, offset.shape, 1, types, 0, False, NEEDS[0])
    for launch, tensors in ((forward, (input, offset, bias, grad)), (backward, (grad, input, offset, input, offset))):
        launch(*tensors)
        launch._kernel = None  # Triton's own launch
        launch(*tensors)
        (name, expected), (again, got) = fake_driver.launches[-2:]
        assert again == name
        assert len(got) == len(expected)
        launch_metadata = 6  # a new object for each launch, for profilers
        for number, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert a is b or number == launch_metadata or a == b, number


@pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
def test_unaligned_tensors_get_a_kernel_of_their_own(fake_driver):
    from sdan.ops import triton_warp

    _, offset, bias, _ = case((1, 16, 4, 5, 0), torch.float32)
    wide = torch.zeros(1 + 16 * 20)
    for start in (0, 1, 0, 1):
        image = wide[start : start + 16 * 20].view(1, 4, 5, 16).permute(0, 3, 1, 2)
        triton_warp.warp(image, offset, bias, 0)
    functions = [arguments[5] for _, arguments in fake_driver.launches]
    assert len(functions) == 4


@pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["warp_forward_kernel", "warp_backward_kernel"])
def test_compiles_without_spills(kernel, architecture):
    pytest.importorskip("triton")
    from compile_report import compile_one

    for dtype, channels, last in ((torch.float32, 64, True), (torch.bfloat16, 64, False), (torch.float32, 3, True)):
        built = compile_one(kernel, dtype, channels, architecture, channels_last=last)
        assert built.spilled_bytes == built.stack_bytes == 0, built
        assert 16 <= built.registers <= 128, built
        if channels == 64 and (dtype == torch.float32 or kernel == "warp_forward_kernel"):
            assert built.vector_loads >= 4, built  # 128-bit loads for each of the four corners


@pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_the_sums_kernel_compiles_without_spills(needs, architecture):
    pytest.importorskip("triton")
    import triton
    from compile_report import _resource_usage
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sdan.ops import triton_warp

    types = torch.float32, torch.bfloat16, torch.bfloat16
    launch = triton_warp._sums_launch(64, 64 * 66 * 66, types, 0, *needs)
    place = {name: (number,) for number, name in enumerate(launch._kernel.arg_names)}
    signature = {"sums_ptr": "*fp32", "grad_input_ptr": "*bf16", "grad_bias_ptr": "*bf16"}
    signature |= dict.fromkeys(("channels", "values"), "i32") | dict.fromkeys(launch._constants, "constexpr")
    attributes = {place[name]: [["tt.divisibility", 16]] for name, kind in signature.items() if kind != "constexpr"}
    values = {place[name]: value for name, value in launch._constants.items()}
    source = ASTSource(launch._kernel, {name: signature[name] for name in place}, values, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
    usage = _resource_usage(built.asm["cubin"])
    assert usage["LOCAL"] == usage["STACK"] == 0, usage
    assert usage["REG"] <= 64, usage
    assert not needs[0] or ".v4.b32" in built.asm["ptx"]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
def test_the_whole_report_has_no_spills(capsys):
    pytest.importorskip("triton")
    import compile_report

    assert compile_report.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| sm_") == 144
    assert printed.endswith("no spills\n")


def triton_or_skip():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the Triton kernels need sm_80; this GPU uses plain PyTorch")
    return pytest.importorskip("sdan.ops.triton_warp")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("shape", SHAPES)
def test_gpu_equals_plain_pytorch(shape, dtype):
    compare(triton_or_skip(), shape, dtype, device="cuda")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", list(LIMITS))
def test_plain_pytorch_on_a_gpu_equals_the_cpus(dtype):
    compare(rows, SHAPES[3], dtype, device="cuda")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", list(LIMITS))
def test_gpu_operator_equals_the_cpus(dtype, layout):
    """Eager, by cuDNN, for 16 to 24 channels; TF32 would hide errors of float32."""
    tensors = operator_cases.case((13, 18), channels=(16, 24), dtype=dtype)
    expected = value_and_gradients(ops.squared_deform_conv2d, [tensor.double() for tensor in tensors])
    moved = [tensor.cuda() for tensor in tensors]
    moved[0] = moved[0].contiguous(memory_format=layout)
    with precision.compute_plan(torch.device("cuda"), "fp32").tf32_flags():
        got = value_and_gradients(ops.squared_deform_conv2d, moved)
    assert got[0].is_contiguous(memory_format=layout)
    assert [tensor.dtype for tensor in got] == [dtype] * 5
    operator_cases.assert_near([tensor.cpu() for tensor in got], expected, operator_cases.LIMITS[dtype])


@pytest.mark.gpu
@on_gpu
def test_gpu_call_does_not_wait_for_the_gpu():
    triton_or_skip()
    tensors = [tensor.cuda() for tensor in operator_cases.case((13, 18), channels=(16, 16), dtype=torch.float32)]
    upstream = torch.ones_like(tensors[0])
    value_and_gradients(ops.squared_deform_conv2d, tensors, upstream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradients(ops.squared_deform_conv2d, tensors, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_gpu
def test_gpu_call_can_be_captured_in_a_graph():
    triton_or_skip()
    tensors = [tensor.cuda() for tensor in operator_cases.case((13, 18), channels=(16, 16), dtype=torch.float64)]
    upstream = torch.ones_like(tensors[0])  # float64: atomics change the last bits, which TF32 may round apart
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and fills the caches of cuDNN and the launches
        value_and_gradients(ops.squared_deform_conv2d, tensors, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(ops.squared_deform_conv2d, tensors, upstream)
    tensors[0].mul_(-2)
    tensors[1].add_(0.3)
    graph.replay()
    expected = value_and_gradients(ops.squared_deform_conv2d, tensors, upstream)
    operator_cases.assert_near(captured, expected, 1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_gpu_launch_follows_the_tensors_device():
    tensors = [tensor.to("cuda:1") for tensor in operator_cases.case((6, 7), dtype=torch.float32)]
    got = value_and_gradients(ops.squared_deform_conv2d, tensors)
    assert {tensor.device for tensor in got} == {tensors[0].device}
    expected = value_and_gradients(ops.squared_deform_conv2d, [tensor.cpu() for tensor in tensors])
    operator_cases.assert_near([tensor.cpu() for tensor in got], expected, 1e-2)  # TF32
