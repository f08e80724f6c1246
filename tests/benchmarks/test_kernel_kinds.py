"""Kernels are grouped by what they compute."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from on_gpu import kernel_kinds
from on_gpu.kernel_kinds import KINDS, Launch, by_kind, kind_of, launches_of, longest
from torch.autograd import DeviceType

ENGINE = "autograd::engine::evaluate_function: ConvolutionBackward0"
COPY = "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>"
VECTOR = "void at::native::vectorized_elementwise_kernel<4, at::native::"
CASES = {
    "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x64x64": (
        ("aten::cudnn_convolution", "aten::_convolution", "aten::conv2d"),
        "convolution, forward",
    ),
    "void implicit_convolve_sgemm<float, float, 128, 6, 7, 3, 3, 5, 1, false>": ((), "convolution, forward"),
    "sm90_xmma_dgrad_implicit_gemm_f32f32_tf32f32_f32": (("aten::convolution_backward",), "convolution, backward"),
    "sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16": ((), "convolution, backward"),
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_s16816_optimized>": (
        ("aten::cudnn_convolution", "aten::conv2d", ENGINE),
        "convolution, backward",
    ),
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<256, 64, 64>>": ((), "attention, forward"),
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>": ((), "attention, backward"),
    "fmha_cutlassF_f32_aligned_64x64_rf_sm80": ((), "attention, forward"),
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>": (
        ("aten::bmm", "sdan::packed_attention"),
        "attention, forward",
    ),
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_64x64>": (
        ("aten::bmm", "_CrossPackingBackward", "autograd::engine::evaluate_function: _CrossPackingBackward"),
        "attention, backward",
    ),
    "unpack_gradient_kernel": (("_CrossPackingBackward",), "packing"),
    "pack_kernel": ((), "packing"),
    "shuffle_kernel": (("_ConvShuffle",), "copies, layout"),
    "shuffle_gradient_kernel": (("_ConvShuffleBackward",), "copies, layout"),
    "ampere_sgemm_128x64_nt": (("aten::addmm",), "matrix products"),
    "warp_forward_kernel": (("sdan::bilinear_warp",), "sampling"),
    "warp_backward_kernel": ((), "sampling"),
    "void at::native::radixSortKVInPlace<int>": (("aten::sort", "SquaredDeformConv2dBackward"), "sampling"),
    "sm80_xmma_fprop_of_the_operator": (("aten::conv2d", "SquaredDeformConv2d"), "convolution, forward"),
    "void at::native::grid_sampler_2d_kernel<float, int>": (("aten::grid_sampler_2d",), "sampling"),
    f"{COPY} a layout": (("aten::copy_", "aten::clone", "aten::contiguous"), "copies, layout"),
    f"{COPY} a type": (("aten::copy_", "aten::_to_copy", "aten::to"), "casts"),
    f"{VECTOR}bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)>": ((), "casts"),
    "void cudnn::ops::nchwToNhwcKernel<float, float, float, false, true>": (
        ("aten::cudnn_convolution", "aten::conv2d"),
        "copies, layout",
    ),
    "void at::native::CatArrayBatchedCopy<float>": (("aten::cat",), "copies, layout"),
    "Memcpy DtoD (Device -> Device)": (("aten::copy_",), "copies, layout"),
    "Memset (Device)": (("aten::zero_",), "fills"),
    f"{VECTOR}FillFunctor<float>": (("aten::fill_",), "fills"),
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": (("aten::sum",), "sums"),
    f"{VECTOR}threshold_kernel_impl<float>": (("aten::threshold_backward",), "element-wise"),
    "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>": (
        ("aten::_fused_adam_", "Optimizer.step#Adam.step"),
        "optimizer, averages",
    ),
    "a_kernel_nobody_knows": ((), "other"),
}


@pytest.mark.parametrize("kernel", CASES)
def test_kind_of_a_kernel(kernel):
    operators, kind = CASES[kernel]
    assert kind_of(Launch(kernel, operators, 1.0)) == kind


def test_a_custom_operators_forward_is_not_its_backward():
    forward = ("sdan::packed_attention", "GeneratedBackwardFor_sdan_packed_attention_default")
    assert kind_of(Launch("gemm", forward, 1.0)) == "attention, forward"
    engine = "autograd::engine::evaluate_function: GeneratedBackwardFor_sdan_packed_attention_defaultBackward"
    assert kind_of(Launch("gemm", ("sdan::packed_attention_backward", engine), 1.0)) == "attention, backward"


def test_times_are_per_step_and_every_kind_has_one():
    profile = [Launch("warp_forward_kernel", (), 30.0), Launch("unknown", (), 500.0)] * 2
    kinds = by_kind(profile, steps=2)
    assert tuple(kinds) == KINDS
    assert kinds["sampling"] == (0.03, 1.0) and kinds["other"] == (0.5, 1.0) and kinds["casts"] == (0.0, 0.0)
    assert longest(profile, steps=2, number=1) == [("unknown", "other", 0.5, 1.0)]


def test_a_profile_tells_forward_from_backward():
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    image = torch.randn(1, 4, 8, 8)

    def step():
        torch.nn.functional.conv2d(image, weight).sum().backward()

    kinds = by_kind(launches_of(step, 2, torch.device("cpu")), steps=2)
    assert kinds[kernel_kinds.CONVOLUTION][0] > 0 and kinds[kernel_kinds.CONVOLUTION_BACK][0] > 0
    assert kinds[kernel_kinds.ATTENTION] == (0.0, 0.0)


@dataclass
class Event:
    """What `launches_of` reads of a profiler's event."""

    name: str
    cpu_parent: object = None
    kernels: list = field(default_factory=list)
    device_type: DeviceType = DeviceType.CPU


class FakeProfile:
    """A profile of a GPU whose events are given."""

    def __init__(self, events):
        self.found = events

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def events(self):
        return self.found


@pytest.fixture
def gpu_profile(monkeypatch):
    """Makes the profiler return these events."""

    def use(events):
        monkeypatch.setattr(kernel_kinds, "profile", lambda activities: FakeProfile(events))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    return use


def test_kernels_carry_the_operators_around_their_launch(gpu_profile):
    outer = Event("aten::to")
    inner = Event("aten::copy_", Event("aten::_to_copy", outer), [SimpleNamespace(name=COPY, duration=7.0)])
    on_device = Event(COPY, device_type=DeviceType.CUDA)
    gpu_profile([outer, inner, on_device])
    found = launches_of(lambda: None, 1, torch.device("cuda"))
    assert found == [Launch(COPY, ("aten::copy_", "aten::_to_copy", "aten::to"), 7.0)]
    assert kind_of(found[0]) == "casts"


def test_a_profile_without_kernels_is_an_error(gpu_profile):
    gpu_profile([Event("aten::conv2d")])
    with pytest.raises(RuntimeError, match="expected kernels, got none"):
        launches_of(lambda: None, 1, torch.device("cuda"))
