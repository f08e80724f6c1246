"""The convolution and pixel shuffle of channels-last maps equal PyTorch's: the plain form and the Triton kernels.

As in `test_triton_kernels.py`, the tests marked `interpreted` run in a separate process, with TRITON_INTERPRET=1.
"""

import importlib
from collections import defaultdict

import pytest
import torch
from interpreter import INTERPRETING, interpreted, run_under_the_interpreter
from torch.nn import functional as F

from sdan.ops import portable_form
from sdan.ops.upsampling import conv_shuffle, shuffle

module = importlib.import_module("sdan.ops.upsampling.conv_shuffle")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# N, C, H, W, r: the configs' channels, odd sizes, several tiles of cells, of values and of a program
SHAPES = [(2, 3, 4, 6, 2), (1, 64, 3, 5, 2), (2, 48, 5, 9, 2), (1, 5, 2, 7, 4), (1, 100, 2, 3, 2), (1, 3, 5, 2, 8)]
CASES = [*((shape, torch.float64) for shape in SHAPES), (SHAPES[1], torch.bfloat16)]


def random_maps(*shapes, dtype=torch.float64, device="cpu"):
    """Seeded channels-last maps."""
    random = torch.Generator().manual_seed(3)
    made = [torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype) for shape in shapes]
    return [image.contiguous(memory_format=torch.channels_last) for image in made]


def assert_near(got, expected, limit):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert float((got.double() - expected.double()).abs().max()) <= limit * max(float(expected.double().abs().max()), 1)


def by_place(image, factor):
    """Channels in pixel_shuffle's order -> grouped by place."""
    return image.unflatten(1, (-1, factor**2)).transpose(1, 2).flatten(1, 2)


def compare_kernels(kernels, shape, dtype, device="cpu"):
    """Both functions of `kernels` against F.pixel_shuffle and its gradient in float64."""
    num_images, channels, height, width, factor = shape
    size, large = (num_images, channels * factor**2, height, width), (channels, height * factor, width * factor)
    y, grad = random_maps(size, (num_images, *large), dtype=dtype, device=device)
    bias = torch.randn(size[1], generator=torch.Generator().manual_seed(4)).to(device)
    bias = bias.double() if dtype == torch.float64 else bias
    grouped = by_place(y, factor).contiguous(memory_format=torch.channels_last)
    for relu in (False, True):
        for given in (bias, None):
            total = y.double() if given is None else y.double() + bias.double()[:, None, None]
            expected = F.pixel_shuffle(total, factor)
            expected = F.relu(expected) if relu else expected
            out = kernels.shuffle(grouped, given, factor, relu=relu)
            assert out.is_contiguous(memory_format=torch.channels_last)
            assert_near(out, expected.to(dtype), LIMITS[dtype])
            masked = torch.where(out > 0, grad, 0) if relu else grad  # rounding may turn small values into zeros
            expected_y = by_place(F.pixel_unshuffle(masked, factor), factor)
            got_y, got_bias = kernels.shuffle_gradient(grad, out if relu else None, factor, need_bias=given is not None)
            assert torch.equal(got_y, expected_y)
            assert got_y.is_contiguous(memory_format=torch.channels_last)
            assert (got_bias is None) == (given is None)
            if got_bias is not None:
                sums = F.pixel_unshuffle(masked.double(), factor).sum((0, 2, 3))
                assert_near(got_bias.double(), sums, LIMITS[dtype] if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_plain_shuffle_equals_pytorchs(shape, dtype):
    compare_kernels(shuffle, shape, dtype)


def test_under_the_interpreter():
    run_under_the_interpreter(__file__, len(CASES) + 2)


@interpreted
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_interpreter_equals_pytorchs(shape, dtype):
    compare_kernels(importlib.import_module("sdan.ops.upsampling.triton_shuffle"), shape, dtype)


@interpreted
@pytest.mark.parametrize("relu", [False, True])
def test_interpreter_runs_the_whole_operator(relu, monkeypatch):
    monkeypatch.setattr(module, "_keeps_channels_last", lambda x: True)
    assert module._kernels(torch.zeros(1)).__name__.endswith("triton_shuffle")
    compare_operator(relu, "eager", torch.channels_last, monkeypatch)


def values_and_gradients(x, weight, bias, upstream, **options):
    leaves = [x, weight, *([] if bias is None else [bias])]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = conv_shuffle(leaves[0], leaves[1], None if bias is None else leaves[2], 2, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def compare_operator(relu, way, layout, monkeypatch, device="cpu", dtype=torch.float64, limit=1e-12):
    """The operator against the portable form on the CPU, in float64."""
    x, weight, upstream = random_maps((2, 5, 4, 6), (12, 5, 3, 3), (2, 3, 8, 12))
    x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
    for bias in (torch.randn(12, generator=torch.Generator().manual_seed(5), dtype=torch.float64), None):
        with portable_form():
            expected = values_and_gradients(x, weight, bias, upstream, relu=relu)
        on = [None if tensor is None else tensor.to(device, dtype) for tensor in (x, weight, bias, upstream)]
        if way == "traced":
            monkeypatch.setattr(module, "runs_eagerly", lambda x: False)
        got = values_and_gradients(*on, relu=relu)
        for a, b in zip(got, expected, strict=True):
            assert_near(a.cpu().double(), b, limit)
        if layout == torch.channels_last:  # else autograd would convert the gradients once more
            cudnn = dtype != torch.float64 or device == "cpu"  # cuDNN computes float64 in contiguous memory
            assert all(a.is_contiguous(memory_format=layout) for a in got[: 3 if cudnn else 1])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("way", ["eager", "traced"])
@pytest.mark.parametrize("relu", [False, True])
def test_the_grouped_convolution_equals_pytorchs(relu, way, layout, monkeypatch):
    monkeypatch.setattr(module, "_keeps_channels_last", lambda x: True)
    compare_operator(relu, way, layout, monkeypatch)


def test_autocast_lowers_it_like_conv2d(monkeypatch):
    x, weight, upstream = random_maps((2, 5, 4, 6), (12, 5, 3, 3), (2, 3, 8, 12), dtype=torch.float32)
    bias = torch.randn(12, generator=torch.Generator().manual_seed(5))
    results = []
    for keeps in (False, True):
        monkeypatch.setattr(module, "_keeps_channels_last", lambda x, keeps=keeps: keeps)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(values_and_gradients(x, weight, bias, upstream.bfloat16()))
    for got, expected in zip(results[1], results[0], strict=True):
        assert_near(got, expected, 4 * LIMITS[torch.bfloat16])
    assert [tensor.dtype for tensor in results[1]] == [torch.bfloat16, *[torch.float32] * 3]


def test_a_second_derivative_is_refused(monkeypatch):
    monkeypatch.setattr(module, "_keeps_channels_last", lambda x: True)
    x, weight = random_maps((1, 2, 2, 2), (4, 2, 3, 3))
    value = conv_shuffle(x, weight.requires_grad_(), None, 2)
    (gradient,) = torch.autograd.grad(value.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="conv_shuffle: expected a single backward pass"):
        gradient.sum().backward()


def resources(name, dtype, channels, architecture):
    """(cuobjdump's resource usage, PTX) of a kernel, compiled as for maps of the configs and r = 2."""
    import triton
    from compile_report import _NAMES, _resource_usage
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sdan.ops.upsampling import triton_shuffle

    kernel, wide = getattr(triton_shuffle, name), "*fp64" if dtype == torch.float64 else "*fp32"
    constants = dict.fromkeys(("HAS_BIAS", "NEED_BIAS", "RELU"), True) | {"STEPS": triton_shuffle._STEPS}
    constants |= triton_shuffle.launch_meta(4 * channels, dtype, 2)
    types = {"bias_ptr": wide, "parts_ptr": wide, "cells": "i32", "columns": "i32"} | dict.fromkeys(
        constants, "constexpr"
    )
    place = {argument: (number,) for number, argument in enumerate(kernel.arg_names)}
    signature = {argument: types.get(argument, f"*{_NAMES[dtype]}") for argument in place}
    attributes = {place[a]: [["tt.divisibility", 16]] for a in place if a.endswith("_ptr") or a == "cells"}
    values = {place[argument]: value for argument, value in constants.items() if argument in place}
    source = ASTSource(kernel, signature, values, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
    return _resource_usage(built.asm["cubin"]), built.asm["ptx"]


@pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", ["shuffle_kernel", "shuffle_gradient_kernel"])
def test_shuffles_compile_without_spills(name, architecture):
    pytest.importorskip("triton")
    for dtype, channels in ((torch.bfloat16, 64), (torch.bfloat16, 48), (torch.float32, 64), (torch.float64, 64)):
        usage, ptx = resources(name, dtype, channels, architecture)
        assert usage["LOCAL"] == usage["STACK"] == 0 and usage["REG"] <= 64, usage
        wide = ptx.count("st.global.v4.b32") + ptx.count("st.global.v2.b64")
        assert wide >= 2, (dtype, channels, ptx.count("st.global."))  # both 16-byte stores of a thread's values


@pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
def test_prepared_launches_pass_what_triton_passes(monkeypatch):
    """The second launch of a shape passes the kernel's arguments by their order only."""
    pytest.importorskip("triton")
    from test_triton_kernels import FakeDriver
    from triton.runtime import driver

    from sdan.ops.upsampling import triton_shuffle

    fake = FakeDriver()
    monkeypatch.setattr(driver, "_active", fake)
    for name, number in (("shuffle_kernel", 3), ("shuffle_gradient_kernel", 4)):
        kernel = getattr(triton_shuffle, name)
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
        types = torch.float32, torch.float32
        launch = triton_shuffle._launch.__wrapped__(kernel, torch.Size((2, 64, 4, 8)), types, 0, 2, True)
        tensors = [torch.zeros(4)] * number
        launch(*tensors)
        launch._kernel = None  # Triton's own launch
        launch(*tensors)
        (_, expected), (_, got) = fake.launches[-2:]
        launch_metadata = 6  # a new object for each launch, for profilers
        assert len(got) == len(expected)
        for place, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert a is b or place == launch_metadata or a == b, place


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("shape", [*SHAPES, (2, 64, 64, 64, 2), (2, 3, 32, 32, 8)])
def test_gpu_shuffles_equal_pytorchs(shape, dtype):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the Triton kernels need sm_80; this GPU uses plain PyTorch")
    kernels = pytest.importorskip("sdan.ops.upsampling.triton_shuffle")
    compare_kernels(kernels, shape, dtype, device="cuda")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("way", ["eager", "traced"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
def test_gpu_operator_equals_pytorchs(relu, dtype, way, monkeypatch):
    limit = 1e-1 if relu and dtype == torch.bfloat16 else 3 * LIMITS[dtype]
    if relu and dtype == torch.bfloat16:
        pytest.skip("rounding turns small values into zeros; test_gpu_shuffles_equal_pytorchs compares the ReLU")
    with torch.backends.cudnn.flags(allow_tf32=False):
        compare_operator(relu, way, torch.channels_last, monkeypatch, "cuda", dtype, limit)


@pytest.mark.gpu
@on_gpu
def test_gpu_operator_is_the_same_every_time():
    x, weight, upstream = random_maps((4, 16, 64, 64), (64, 16, 3, 3), (4, 16, 128, 128), device="cuda")
    bias = torch.ones(64, dtype=torch.float64, device="cuda")
    first, second = (values_and_gradients(x, weight, bias, upstream, relu=True)[-1] for _ in range(2))
    assert torch.equal(first, second)
