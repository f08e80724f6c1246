"""Packed attention against the explicit form, which stores the matrix."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from sdan import ops
from sdan.ops import attention
from sdan.ops.reference import explicit_attention

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def tokens(*shape, dtype=torch.float64, scale=0.5):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).to(dtype)


def value_and_gradient(operator, x_NLC):
    leaf = x_NLC.detach().requires_grad_()
    output = operator(leaf)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return output.detach(), torch.autograd.grad(output, leaf, upstream.to(output.dtype))[0]


def assert_near(got, expected, limit):
    for a, b in zip(got, expected, strict=True):
        assert float((a.double() - b.double()).abs().max()) <= limit * max(float(b.abs().max()), 1e-3)


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 5, 7), (1, 70, 64), (3, 64, 9)])
def test_equals_the_explicit_form(shape, dtype):
    x = tokens(*shape, dtype=dtype)
    got = value_and_gradient(ops.packed_attention, x)
    assert got[0].dtype == got[1].dtype == dtype
    assert_near(got, value_and_gradient(explicit_attention, x.double()), LIMITS[dtype])


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_several_blocks_equal_one(dtype, monkeypatch):
    x = tokens(2, 75, 24, dtype=dtype)
    monkeypatch.setattr(attention, "_BLOCK_VALUES", 16 * 75)
    assert [block.stop for block in attention._blocks(75)] == [16, 32, 48, 64, 75]
    expected = value_and_gradient(explicit_attention, x.double())
    assert_near(value_and_gradient(ops.packed_attention, x), expected, LIMITS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("onednn", [True, False])
def test_both_cpu_forms_equal_the_explicit_one(onednn, dtype, monkeypatch):
    """Extreme logits, down to -1000: rows dominated by one exponential, and rows with hundreds of similar ones."""
    x = tokens(2, 300, 64, dtype=torch.float64, scale=0.3)
    x[0] += 1.0  # all rows similar
    x[1, ::7] *= 10
    if not onednn:
        monkeypatch.setattr(attention, "_use_onednn", lambda matrix: False)
    elif not attention._use_onednn(x.to(dtype)):
        pytest.skip("oneDNN has no fast product of this type on this CPU")
    expected = value_and_gradient(explicit_attention, x.to(dtype).double())
    got = value_and_gradient(ops.packed_attention, x.to(dtype))
    assert_near(got, expected, 3e-5 if dtype == torch.float32 else LIMITS[dtype])  # float32 resolves 1000 to 6e-5


def test_gradcheck_and_opcheck(monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK_VALUES", 1)  # blocks of 16 rows
    x = tokens(2, 20, 3).requires_grad_()
    torch.autograd.gradcheck(ops.packed_attention, x)
    torch.library.opcheck(torch.ops.sdan.packed_attention.default, (x,))
    forward = torch.ops.sdan.packed_attention(x.detach())
    backward = torch.ops.sdan.packed_attention_backward.default
    torch.library.opcheck(backward, (torch.ones_like(x), x.detach(), *forward))


def test_an_empty_batch_and_strided_tokens():
    assert ops.packed_attention(tokens(0, 4, 3)).shape == (0, 4, 3)
    x = tokens(2, 6, 20).transpose(1, 2)
    got = value_and_gradient(ops.packed_attention, x)
    assert_near(got, value_and_gradient(explicit_attention, x), 1e-12)


def test_logits_stay_float32_under_autocast():
    """Logits near 1000 that differ by 1: bfloat16 would round them to the same value."""
    x = torch.zeros(1, 3, 2)
    x[0, :, 0] = torch.tensor([32.0, 31.0, 30.0])
    x[0, :, 1] = torch.tensor([0.0, 2.0, 4.0])
    expected = explicit_attention(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = ops.packed_attention(x)
        half = ops.packed_attention(x.bfloat16())
    assert kept.dtype == torch.float32
    assert half.dtype == torch.bfloat16
    assert_near([kept], [expected], 1e-5)
    assert_near([half], [expected], 1e-2)


class LargestTensor(TorchDispatchMode):
    """Records the number of values in the largest result of any operator."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.values = max(self.values, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matrix_is_never_stored(dtype, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK_VALUES", 2**15)
    x = tokens(1, 1024, 16, dtype=dtype)
    with LargestTensor() as largest:
        forward = attention._attention_op._init_fn(x)
        attention._attention_backward_op._init_fn(torch.ones_like(x), x, *forward)
    assert 2**14 <= largest.values <= 2**15  # the matrix has 2**20 values
    with LargestTensor() as largest:
        explicit_attention(x)
    assert largest.values == 2**20


def test_a_second_derivative_needs_the_portable_form():
    x = tokens(1, 5, 4).requires_grad_()
    (first,) = torch.autograd.grad(ops.packed_attention(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"expected a single backward pass.*portable_form"):
        first.sum().backward()
    with ops.portable_form(), sdpa_kernel(SDPBackend.MATH):
        (first,) = torch.autograd.grad(ops.packed_attention(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
    assert x.grad.abs().max() > 0


def test_the_portable_form_is_the_same():
    x = tokens(2, 30, 8)
    with ops.portable_form():
        got = value_and_gradient(ops.packed_attention, x)
    assert_near(got, value_and_gradient(ops.packed_attention, x), 1e-12)


def test_a_wrong_number_of_axes_is_refused():
    with pytest.raises(ValueError, match=r"x.dim\(\): expected 3 for \[N, L, C\], got 4"):
        ops.packed_attention(torch.zeros(1, 2, 3, 4))


def test_wide_tokens_on_cuda_use_blocks():
    """K=4 at 128x128 has 1024 values per token, which no fused kernel supports. Blocks never store the matrix."""
    hopper, turing = (9, 0), (7, 5)
    assert attention.fused_on_cuda(64, torch.float32, hopper)
    assert attention.fused_on_cuda(256, torch.bfloat16, hopper)
    assert not attention.fused_on_cuda(1024, torch.bfloat16, hopper)
    assert not attention.fused_on_cuda(100, torch.float32, hopper)  # not a multiple of 8
    assert not attention.fused_on_cuda(64, torch.float64, hopper)
    assert not attention.fused_on_cuda(64, torch.bfloat16, turing)
    assert attention.fused_on_cuda(64, torch.float16, turing)


def test_fake_tensors_keep_the_shape():
    with FakeTensorMode():
        assert ops.packed_attention(torch.empty(2, 2**16, 2**16)).shape == (2, 2**16, 2**16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
@pytest.mark.parametrize("width", [64, 100, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gpu_equals_the_explicit_form(width, dtype):
    x = tokens(2, 96, width, dtype=dtype, scale=0.2)
    expected = value_and_gradient(explicit_attention, x.double())
    got = [tensor.cpu() for tensor in value_and_gradient(ops.packed_attention, x.cuda())]
    assert_near(got, expected, 10 * LIMITS[dtype])
