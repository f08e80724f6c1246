"""The precision, layout and TF32 chosen for each kind of CPU and GPU, independent of this machine."""

import platform
import sys
from pathlib import Path

import pytest
import torch

from sdan.ops import precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def cpu_bf16(monkeypatch, request):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: request.param)
    return request.param


@pytest.mark.parametrize(("cpu_bf16", "expected"), [(True, "bf16"), (False, "fp32")], indirect=["cpu_bf16"])
def test_auto_on_a_cpu(cpu_bf16, expected):
    assert precision.resolve("auto", CPU) == expected
    with precision.autocast("auto", CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if cpu_bf16 else torch.float32)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_on_a_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.resolve("auto", CUDA) == expected


@pytest.mark.parametrize("cpu_bf16", [True, False], indirect=True)
def test_an_explicit_precision_is_kept(cpu_bf16):
    assert precision.resolve("bf16", CPU) == "bf16"
    assert precision.resolve("fp32", CPU) == "fp32"
    assert precision.resolve("fp16", CPU) == "fp32"
    assert precision.resolve("fp16", CUDA) == "fp16"


@pytest.mark.parametrize("cpu_bf16", [True, False], indirect=True)
def test_a_slow_choice_gets_one_line(cpu_bf16):
    emulated = precision.slow_choice(CPU, "bf16", "auto", tf32=False)
    assert emulated is None if cpu_bf16 else "which this CPU emulates about 10 times slower" in emulated
    slow = precision.slow_choice(CUDA, "fp32", "channels_last", tf32=False)
    assert slow.startswith("train.layout: expected auto or contiguous for fp32 without TF32, got channels_last")
    for device, name, layout, tf32 in (
        (CPU, "auto", "auto", False),
        (CPU, "fp32", "channels_last", False),
        (CUDA, "bf16", "channels_last", False),
        (CUDA, "fp32", "auto", False),
        (CUDA, "fp32", "channels_last", True),
    ):
        assert precision.slow_choice(device, name, layout, tf32=tf32) is None


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="expected auto, fp32, bf16 or fp16, got 'int8'"):
        precision.resolve("int8", CPU)
    with pytest.raises(ValueError, match="expected auto, channels_last or contiguous, got 'rows'"):
        precision.compute_plan(CPU, layout="rows")


@pytest.fixture
def gpu(monkeypatch, request):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: request.param)
    return CUDA


@pytest.mark.parametrize(
    ("gpu", "name", "tf32", "expected"),
    [
        ((9, 0), "fp32", True, "fp32, channels_last, TF32 on"),
        ((9, 0), "fp32", False, "fp32, contiguous, TF32 off"),
        ((9, 0), "auto", True, "bf16, channels_last, TF32 on"),
        ((8, 0), "auto", False, "bf16, channels_last, TF32 off"),
        ((7, 5), "fp32", True, "fp32, contiguous, TF32 off"),  # the paper's 2080 Ti has no TF32
        ((7, 5), "auto", True, "fp16, channels_last, TF32 off"),
    ],
    indirect=["gpu"],
)
def test_the_layout_on_a_gpu_follows_precision_and_tf32(gpu, name, tf32, expected):
    plan = precision.compute_plan(gpu, name, tf32=tf32)
    assert str(plan) == expected
    assert plan.memory_format == (torch.channels_last if "channels_last" in expected else torch.contiguous_format)


@pytest.mark.parametrize("gpu", [(9, 0)], indirect=True)
def test_a_layout_that_was_set_is_kept(gpu):
    assert precision.compute_plan(gpu, "fp32", "channels_last").layout == "channels_last"
    assert precision.compute_plan(gpu, "bf16", "contiguous").layout == "contiguous"


@pytest.mark.parametrize("cpu_bf16", [True, False], indirect=True)
def test_a_cpu_computes_in_channels_last_without_tf32(cpu_bf16):
    plan = precision.compute_plan(CPU, tf32=True)
    assert str(plan) == f"{'bf16' if cpu_bf16 else 'fp32'}, channels_last"
    assert not plan.tf32


def switches():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("gpu", [(9, 0)], indirect=True)
@pytest.mark.parametrize("tf32", [True, False])
def test_only_convolutions_use_tf32_and_only_inside(gpu, tf32):
    before = switches()
    with precision.compute_plan(gpu, "fp32", tf32=tf32).tf32_flags():
        assert switches() == (False, tf32)
        assert torch.get_float32_matmul_precision() == "highest"  # readable: the two kinds of switches are not mixed
    assert switches() == before
    with precision.compute_plan(CPU, tf32=tf32).tf32_flags():
        assert switches() == before


@pytest.mark.parametrize("gpu", [(9, 0)], indirect=True)
def test_a_callers_newer_tf32_switches_come_back(gpu):
    """PyTorch refuses to read the older switches after these are set."""
    older, convolution = switches(), torch.backends.cudnn.conv
    try:
        torch.backends.cuda.matmul.fp32_precision = convolution.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            switches()
        with precision.compute_plan(gpu, "fp32").tf32_flags():
            assert switches() == (False, False)
        assert torch.backends.cuda.matmul.fp32_precision == convolution.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = older
    assert switches() == older


@pytest.mark.parametrize("cpu_bf16", [True], indirect=True)
def test_inference_records_no_gradient_and_lowers_products(cpu_bf16):
    weight = torch.ones(2, 2, requires_grad=True)
    with precision.compute_plan(CPU).inference():
        product = torch.ones(2, 2) @ weight
    assert product.dtype == torch.bfloat16 and not product.requires_grad


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="reads x86 flags from /proc")
def test_bf16_support_matches_the_processors_flags():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    if flags & {"avx512_bf16", "amx_bf16"}:
        assert precision.cpu_has_bf16()
    elif "avx512f" not in flags and "avx_ne_convert" not in flags:
        assert not precision.cpu_has_bf16()


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [({}, False), ({"avx512_bf16"}, True), ({"amx_tile"}, True)],
)
def test_bf16_on_x86_needs_instructions(monkeypatch, instructions, expected):
    """oneDNN accepts bf16 on every AVX-512 CPU and emulates it on those without these instructions."""
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512_bf16" in instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx_tile" in instructions)
    assert precision.cpu_has_bf16() == expected


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [(["bf16", "bf16"], "bf16"), (["bf16", "fp16"], "fp16"), (["fp32", "bf16"], "fp32"), (["fp16"], "fp16")],
)
def test_ranks_agree_on_one_precision(chosen, expected):
    assert precision.common_precision(chosen) == expected


def test_ranks_agree_on_one_layout_and_on_tf32():
    """An Ampere GPU beside the paper's 2080 Ti: DDP adds gradients element by element, in memory order."""
    new = precision.ComputePlan(torch.device("cuda", 0), "fp32", "channels_last", tf32=True)
    old = precision.ComputePlan(torch.device("cuda", 1), "fp32", "contiguous", tf32=False)
    for own in (new, old):
        common = precision.common_plan([new, old], own)
        assert (common.device, str(common)) == (own.device, "fp32, contiguous, TF32 off")
    assert precision.common_plan([new, new], new) == new


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
@pytest.mark.parametrize("tf32", [True, False])
def test_gpu_only_convolutions_round_to_tf32(tf32):
    """TF32 keeps 10 bits of mantissa: a relative error near 1e-3, against 1e-7 in float32."""
    plan = precision.compute_plan(torch.device("cuda"), "fp32", tf32=tf32)
    random = torch.Generator("cuda").manual_seed(0)
    image, weight, left, right = (
        torch.randn(shape, device="cuda", generator=random)
        for shape in ((1, 64, 32, 32), (64, 64, 3, 3), (256, 256), (256, 256))
    )
    image, weight = (tensor.contiguous(memory_format=plan.memory_format) for tensor in (image, weight))
    exact = torch.conv2d(image.double(), weight.double()), left.double() @ right.double()
    with plan.inference():
        found = torch.conv2d(image, weight), left @ right
    errors = [float((one - two).abs().max() / two.std()) for one, two in zip(found, exact, strict=True)]
    assert (errors[0] > 1e-4) == plan.tf32 and errors[1] < 1e-5
