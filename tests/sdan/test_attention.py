"""Packed attention against the explicit form, which stores the matrix; cross packing attention on the CPU."""

import contextlib
from unittest import mock

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from sdan import ops
from sdan.network import OffsetLearner, SDANConfig
from sdan.ops import precision
from sdan.ops.attention import blocks, cross_packing, packed
from sdan.ops.reference import explicit_attention

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def tokens(*shape, dtype=torch.float64, scale=0.5):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).to(dtype)


def value_and_gradient(operator, x_NLC):
    leaf = x_NLC.detach().requires_grad_()
    output = operator(leaf)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return output.detach(), torch.autograd.grad(output, leaf, upstream.to(output))[0]


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
    monkeypatch.setattr(blocks, "_BLOCK_VALUES", 16 * 75)
    assert [block.stop for block in blocks._blocks(75, 16 * 75)] == [16, 32, 48, 64, 75]
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
        monkeypatch.setattr(blocks, "_use_onednn", lambda matrix: False)
    elif not blocks._use_onednn(x.to(dtype)):
        pytest.skip("oneDNN has no fast product of this type on this CPU")
    expected = value_and_gradient(explicit_attention, x.to(dtype).double())
    got = value_and_gradient(ops.packed_attention, x.to(dtype))
    assert_near(got, expected, 3e-5 if dtype == torch.float32 else LIMITS[dtype])  # float32 resolves 1000 to 6e-5


def test_gradcheck_and_opcheck(monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK_VALUES", 1)  # blocks of 16 rows
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
    monkeypatch.setattr(blocks, "_BLOCK_VALUES", 2**15)
    x = tokens(1, 1024, 16, dtype=dtype)
    with LargestTensor() as largest:
        forward = packed.attend(x)
        packed.attend_backward(torch.ones_like(x), x, None, *forward)
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


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("values", [7 * 20 * 20, 20 * 20, 16 * 20])  # all images in one block, one image, 16 rows
@pytest.mark.parametrize("give_negated", [True, False])
def test_the_gpu_form_in_blocks(give_negated, values, dtype, monkeypatch):
    """Tokens that no fused kernel takes; it runs on a CPU, too."""
    monkeypatch.setattr(blocks, "_gpu_block_values", lambda x: values)
    x, grad = tokens(3, 20, 12, dtype=dtype), tokens(3, 20, 12, dtype=dtype).flip(0)
    negated = -x if give_negated else None
    output = blocks.attend_batched(x, negated)
    monkeypatch.setattr(blocks, "_gpu_block_values", lambda x: 2 * values)  # the backward pass takes half
    got = output, blocks.attend_batched_backward(grad, x, negated, output)
    leaf = x.double().requires_grad_()
    expected = explicit_attention(leaf)
    assert [tensor.dtype for tensor in got] == [dtype, dtype]
    assert_near(got, [expected.detach(), *torch.autograd.grad(expected, leaf, grad.double())], LIMITS[dtype])


def rounded_to_tf32(x):
    """The nearest float32 with 10 bits of mantissa."""
    return ((x.view(torch.int32) + 2**12) & blocks._TF32_MASK).view(torch.float32)


def test_logits_of_tf32_products_are_exact():
    """The plain product is off by more than the 0.01 that a logit may be wrong by."""
    x = tokens(1, 200, 256, dtype=torch.float32, scale=1)
    exact = -x.double() @ x.double().mT
    plain = rounded_to_tf32(-x).double() @ rounded_to_tf32(x).double().mT
    assert float((plain - exact).abs().max()) > 1e-2
    queries, keys = (rounded_to_tf32(part).double() for part in (blocks._query_parts(-x), blocks._key_parts(x)))
    assert float((queries @ keys.mT - exact).abs().max()) < 5e-4


@pytest.mark.parametrize("values", [7 * 20 * 20, 16 * 20])
def test_tf32_parts_give_the_same_attention(values, monkeypatch):
    monkeypatch.setattr(blocks, "uses_tf32", lambda x: True)
    monkeypatch.setattr(blocks, "_gpu_block_values", lambda x: values)
    x, grad = tokens(3, 20, 12, dtype=torch.float32), tokens(3, 20, 12, dtype=torch.float32).flip(0)
    output = blocks.attend_batched(x, None)
    leaf = x.double().requires_grad_()
    expected = explicit_attention(leaf)
    got = output, blocks.attend_batched_backward(grad, x, None, output)
    assert_near(got, [expected.detach(), *torch.autograd.grad(expected, leaf, grad.double())], 1e-5)


@pytest.mark.parametrize(("width", "capability", "way"), [(256, (9, 0), "batched"), (64, (9, 0), "efficient")])
def test_tf32_products_need_a_plan_that_uses_them(width, capability, way):
    plan = precision.ComputePlan(torch.device("cuda"), "fp32", "channels_last", tf32=True)
    with on_fake_gpu(capability):
        x = torch.empty(2, 40, width, device="cuda")
        with plan.tf32_flags():
            assert packed._way(x) == way
            results = packed.attend(x)
        assert packed._way(x) == "efficient"
        assert len(packed.attend_backward(x, x, None, *results)) == (1 if way == "batched" else 3)
    assert not precision.attention_tf32()


def test_gpu_blocks_are_sized_by_the_input():
    small, large = torch.empty(4, 1024, 1024, device="meta"), torch.empty(8, 4096, 1024, device="meta")
    groups, rows = blocks._batches(small, blocks._gpu_block_values(small) // 2)
    assert (len(groups), len(rows)) == (2, 1)
    groups, rows = blocks._batches(large, blocks._gpu_block_values(large) // 2)
    assert (len(groups), len(rows)) == (8, 2)  # half of one image's matrix, which has half as many values as all tokens


@pytest.mark.parametrize(
    ("width", "dtype", "capability", "way"),
    [
        (64, torch.bfloat16, (9, 0), "flash"),
        (64, torch.float16, (8, 6), "flash"),
        (64, torch.float16, (7, 5), "efficient"),
        (64, torch.float32, (9, 0), "efficient"),
        (64, torch.float64, (9, 0), "batched"),
        (64, torch.bfloat16, (7, 5), "batched"),
        (200, torch.bfloat16, (9, 0), "flash"),
        (200, torch.bfloat16, (8, 9), "efficient"),  # flash attention lacks the backward pass there
        (256, torch.bfloat16, (8, 9), "flash"),
        (100, torch.float32, (9, 0), "batched"),  # not a multiple of 8
        (1024, torch.bfloat16, (9, 0), "batched"),  # K=4 at 128x128
    ],
)
def test_the_way_on_a_gpu(width, dtype, capability, way):
    """On fake tensors, so that both operators' schemas and the shapes of their results are PyTorch's."""
    with on_fake_gpu(capability):
        x = torch.empty(2, 40, width, dtype=dtype, device="cuda")
        assert packed._way(x) == way
        results, expected = packed.attend(x), packed.attend_fake(x)
        for got, fake in zip(results, expected, strict=True):
            assert (got.shape, got.dtype, got.stride()) == (fake.shape, fake.dtype, fake.stride())
        grads = packed.attend_backward(x, x, None, *results)
        assert len(grads) == (1 if way == "batched" else 3)
        assert all((grad.shape, grad.dtype, grad.is_contiguous()) == (x.shape, dtype, True) for grad in grads)


def on_fake_gpu(capability=(9, 0)):
    """Tensors without values on a GPU of this compute capability, which need not exist."""
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda *device: capability))
    stack.enter_context(mock.patch.object(torch.backends.cuda, "is_flash_attention_available", lambda: True))
    stack.enter_context(FakeTensorMode())
    return stack


def test_compiles_on_a_gpu_as_one_operator():
    """Dynamo of torch 2.11 cannot trace scaled_dot_product_attention inside sdpa_kernel."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    with on_fake_gpu(), torch.no_grad():
        with torch.device("cuda"):
            learner = OffsetLearner(SDANConfig(features=8, packing_kernel=2), offset_channels=2)
            x = torch.empty(2, 16, 16, 16)
        compiled = torch.compile(learner, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        assert compiled(x).shape == (2, 2, 16, 16)
    assert len(graphs) == 1
    assert graphs[0].count("torch.ops.sdan.cross_packing.default") == 2
    assert "scaled_dot_product" not in graphs[0]
    assert "relu" not in graphs[0]


@pytest.mark.parametrize("way", ["flash", "efficient"])
def test_gradients_of_the_fused_kernels_are_joined(way, monkeypatch):
    """With plain PyTorch in place of the kernels: queries are negated, and their gradient is subtracted."""

    def forward(query, key, value, *rest, scale):
        assert scale == 1.0
        return functional.scaled_dot_product_attention(query, key, value, scale=scale), query.new_zeros(1)

    def backward(grad, query, key, value, *rest, scale):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        with torch.enable_grad():
            output = functional.scaled_dot_product_attention(*leaves, scale=scale)
        return torch.autograd.grad(output, leaves, grad)

    monkeypatch.setattr(packed, "_way", lambda x: way)
    monkeypatch.setattr(packed, f"_{way}", forward)
    monkeypatch.setattr(packed, f"_{way}_backward", backward)
    x = tokens(2, 20, 8)
    assert_near(value_and_gradient(ops.packed_attention, x), value_and_gradient(explicit_attention, x), 1e-12)


def test_fake_tensors_keep_the_shape():
    with FakeTensorMode():
        assert ops.packed_attention(torch.empty(2, 2**16, 2**16)).shape == (2, 2**16, 2**16)


def cross_packing_results(x, gamma, relu, upstream):
    leaves = [x.detach().requires_grad_(), gamma.detach().requires_grad_()]
    value = cross_packing(*leaves, 2, relu=relu)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second"])
@pytest.mark.parametrize("dtype", list(LIMITS))
def test_cross_packing_equals_the_portable_form(dtype, layout, relu):
    wide = tokens(2, 3, 4, 12, dtype=dtype, scale=1)
    x = {
        "contiguous": wide[..., :6].contiguous(),
        "channels_last": wide[..., :6].contiguous(memory_format=torch.channels_last),
        "every_second": wide[..., ::2],
    }[layout]
    gamma = torch.tensor([0.7], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with ops.portable_form():
        value = cross_packing(x.double(), gamma.double(), 2, relu=relu)
        upstream = torch.where(value.abs() < 0.05, 0, tokens(2, 3, 4, 6, scale=1))  # rounding may change a sign near 0
        expected = cross_packing_results(x.double(), gamma.double(), relu, upstream)
    got = cross_packing_results(x, gamma, relu, upstream.to(dtype))
    assert [tensor.dtype for tensor in got] == [dtype, dtype, gamma.dtype]
    for tensor in got[:2]:
        assert tensor.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
        assert tensor.is_contiguous() == (layout != "channels_last")
    assert_near(got[:2], expected[:2], LIMITS[dtype])
    assert float((got[2] - expected[2]).abs()) <= LIMITS[dtype] * x.numel() ** 0.5


def test_cross_packing_gradcheck_and_opcheck():
    x = tokens(1, 2, 4, 6, scale=1).contiguous(memory_format=torch.channels_last)
    gamma = torch.tensor([0.7], dtype=torch.float64)
    leaves = x.clone().requires_grad_(), gamma.clone().requires_grad_()
    torch.autograd.gradcheck(lambda *leaves: cross_packing(*leaves, 2, relu=True), leaves)
    for relu, channels_last in ((True, True), (False, False)):
        sample = (*leaves, 2, relu, channels_last)
        torch.library.opcheck(torch.ops.sdan.cross_packing.default, sample)
        out, *saved = torch.ops.sdan.cross_packing(x, gamma, 2, relu, channels_last)
        sample = (torch.ones_like(out), out if relu else None, gamma, *saved, 2, channels_last)
        torch.library.opcheck(torch.ops.sdan.cross_packing_backward.default, sample)


def test_cross_packing_of_an_empty_batch():
    x = torch.zeros(0, 3, 4, 6, requires_grad=True)
    gamma = torch.ones(1, requires_grad=True)
    value = cross_packing(x, gamma, 2, relu=True)
    assert value.shape == x.shape
    value.sum().backward()
    assert x.grad.shape == x.shape
    assert gamma.grad == 0


def test_cross_packing_refuses_a_second_derivative():
    x = tokens(1, 2, 4, 4).requires_grad_()
    gamma = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(cross_packing(x, gamma, 2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"sdan::cross_packing: expected a single backward pass.*portable_form"):
        first.sum().backward()
    with ops.portable_form(), sdpa_kernel(SDPBackend.MATH):
        (first,) = torch.autograd.grad(cross_packing(x, gamma, 2).square().sum(), x, create_graph=True)
        first.square().sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
@pytest.mark.parametrize("width", [64, 100, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gpu_equals_the_explicit_form(width, dtype):
    x = tokens(2, 96, width, dtype=dtype, scale=0.2)
    expected = value_and_gradient(explicit_attention, x.double())
    got = [tensor.cpu() for tensor in value_and_gradient(ops.packed_attention, x.cuda())]
    assert_near(got, expected, 10 * LIMITS[dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
@pytest.mark.parametrize("width", [256, 1024])
def test_gpu_tf32_rounds_sums_but_not_logits(width):
    """Logits near 250 and 1000: rounded to TF32 they would be wrong by 0.02 to 0.07."""
    x = tokens(2, 512, width, dtype=torch.float32, scale=1).cuda()
    plan = precision.compute_plan(torch.device("cuda"), "fp32", tf32=True)
    expected = value_and_gradient(explicit_attention, x.double())
    with plan.tf32_flags():
        assert_near(value_and_gradient(ops.packed_attention, x), expected, 1e-2)
        if plan.tf32:
            with precision.tf32_products(True):
                logits = blocks._logits(blocks._query_parts(-x), blocks._key_parts(x))
            assert float((logits.double() + x.double() @ x.double().mT).abs().max()) < 1e-2
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
def test_gpu_memory_of_wide_tokens():
    """Beyond the tokens and the upstream gradient: 46 MB with blocks for a CPU's caches; at most 1.3 times as much."""
    x = tokens(4, 1024, 1024, dtype=torch.bfloat16, scale=0.2).cuda().requires_grad_()
    upstream = torch.ones_like(x)
    torch.autograd.grad(ops.packed_attention(x), x, upstream)  # cuBLAS allocates its workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(ops.packed_attention(x), x, upstream)
    assert torch.cuda.max_memory_allocated() - before <= 60e6
