"""The offsets' convolution as a matrix product: equal to conv2d, in float32 whatever autocast says."""

import pytest
import torch
from torch.nn import functional as F

from sdan.ops import narrow_conv
from sdan.ops.narrow_conv import narrow_conv2d

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")


def case(channels_out=2, kernel=3, device="cpu"):
    """(input, weight, bias, upstream gradient), the input with values that bf16 holds exactly."""
    random = torch.Generator().manual_seed(2)
    shapes = (2, 8, 5, 7), (channels_out, 8, kernel, kernel), (channels_out,), (2, channels_out, 5, 7)
    input, *rest = (torch.randn(shape, generator=random).to(device) for shape in shapes)
    return input.bfloat16().contiguous(memory_format=torch.channels_last), *rest


def values_and_gradients(run, input, weight, bias, upstream):
    leaves = [tensor.detach().requires_grad_() for tensor in (input, weight, bias)]
    value = run(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def check(input, *rest):
    exact = [tensor.cpu().double() for tensor in (input, *rest)]
    padding = rest[0].shape[-1] // 2
    expected = values_and_gradients(lambda *leaves: F.conv2d(*leaves, padding=padding), *exact)
    with torch.autocast(input.device.type, torch.bfloat16):
        got = values_and_gradients(narrow_conv2d, input, *rest)
    assert [tensor.dtype for tensor in got] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    for a, b, limit in zip(got, expected, (3e-6, 4e-3, 3e-6, 3e-6), strict=True):
        assert float((a.cpu().double() - b).abs().max()) <= limit * float(b.abs().max())
    assert got[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("as_product", [False, True])
@pytest.mark.parametrize(("channels_out", "kernel"), [(2, 3), (18, 3), (2, 5), (1, 1)])
def test_equals_conv2d_in_float32(channels_out, kernel, as_product, monkeypatch):
    monkeypatch.setattr(narrow_conv, "_as_product", lambda input, weight: as_product)
    check(*case(channels_out, kernel))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize(("channels_out", "kernel"), [(2, 3), (18, 3)])
def test_gpu_offsets_have_float32s_precision(channels_out, kernel, tf32):
    with torch.backends.cudnn.flags(allow_tf32=tf32):
        check(*case(channels_out, kernel, "cuda"))
