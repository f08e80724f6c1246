"""The squared deformable convolution against nested loops and torchvision, then gradients, then PyTorch's own
checks.
"""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torchvision.ops import deform_conv2d

from sdan import ops
from sdan.ops import backend, full_conv, rows
from sdan.ops.reference import squared_deform_loops, squared_deform_repeated
from sdan.ops.squared_deform import _backward_op, _warp_op

SIZES = [(1, 1), (1, 7), (5, 123), (16, 16)]
# limits relative to the largest value; half types against float64 of the same rounded inputs
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
gpu = pytest.mark.gpu


def case(size=(9, 13), *, batch=2, channels=(3, 4), kernel=3, dtype=torch.float64, spread=3.0, seed=0):
    """Seeded (input, offset, weight, bias); many offsets leave the image."""
    random = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, channels[0], *size),
        (batch, 2, *size),
        (channels[1], channels[0], kernel, kernel),
        (channels[1],),
    )
    input, offset, weight, bias = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
    return [tensor.to(dtype) for tensor in (input, spread * offset, weight, bias)]


def value_and_gradients(operator, tensors, upstream=None):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = operator(*leaves)
    if upstream is None:
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output))]


def assert_near(got, expected, limit):
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape
        scale = max(float(b.detach().abs().max()), 1e-3)
        error = float((a.detach().double() - b.detach().double()).abs().max())
        assert error <= limit * scale, f"tensor {number} (0 is the value)"


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("size", [(1, 1), (4, 7)])
def test_values_equal_nested_loops(kernel, size):
    tensors = case(size, kernel=kernel)
    assert_near([ops.squared_deform_conv2d(*tensors)], [squared_deform_loops(*tensors)], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_equal_torchvisions(dtype, kernel, size):
    tensors = case(size, kernel=kernel, dtype=dtype)
    expected = value_and_gradients(squared_deform_repeated, tensors)
    assert_near(value_and_gradients(ops.squared_deform_conv2d, tensors), expected, LIMITS[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset_dtype", [None, torch.float32])
def test_half_types_stay_near_float64(dtype, offset_dtype):
    tensors = case((12, 17), channels=(16, 24), dtype=dtype)
    tensors[1] = tensors[1].to(offset_dtype or dtype)
    expected = value_and_gradients(squared_deform_repeated, [tensor.double() for tensor in tensors])
    got = value_and_gradients(ops.squared_deform_conv2d, tensors)
    assert got[0].dtype == dtype
    assert got[2].dtype == (offset_dtype or dtype)
    assert_near(got, expected, LIMITS[dtype])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second", "transposed"])
def test_any_layout_in_conv2ds_layout_out(layout):
    tensors = case((8, 12), channels=(6, 5))
    expected = value_and_gradients(squared_deform_repeated, tensors)
    change = {
        "contiguous": lambda t: t,
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "every_second": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    tensors[:2] = [change(tensor) for tensor in tensors[:2]]
    got = value_and_gradients(ops.squared_deform_conv2d, tensors)
    assert_near(got, expected, 1e-12)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert got[0].is_contiguous(memory_format=memory_format)


def test_a_strided_upstream_gradient_is_understood():
    tensors = case((6, 8))
    wide = torch.randn(2, 4, 6, 16, dtype=torch.float64)[..., ::2]
    expected = value_and_gradients(squared_deform_repeated, tensors, wide.contiguous())
    assert_near(value_and_gradients(ops.squared_deform_conv2d, tensors, wide), expected, 1e-12)
    broadcast = torch.ones((), dtype=torch.float64).expand(2, 4, 6, 8)
    expected = value_and_gradients(squared_deform_repeated, tensors, broadcast.clone())
    assert_near(value_and_gradients(ops.squared_deform_conv2d, tensors, broadcast), expected, 1e-12)


@pytest.mark.parametrize("shift", [0.0, 1.0, -1.0, -2.0, 0.5, 5.0, 6.0, -6.0, 7.0, 1e4, -1e30])
def test_whole_and_far_offsets_follow_torchvisions_border_rule(shift):
    input, offset, weight, bias = case((6, 6))
    tensors = [input, torch.full_like(offset, shift), weight, bias]
    expected = value_and_gradients(squared_deform_repeated, tensors)
    assert_near(value_and_gradients(ops.squared_deform_conv2d, tensors), expected, 1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_bad_offset_touches_its_own_pixel_only(bad, axis):
    input, offset, weight, bias = case((7, 8))
    spoiled = offset.clone()
    spoiled[0, axis, 3, 4] = bad
    good, got = (value_and_gradients(ops.squared_deform_conv2d, [input, o, weight, bias]) for o in (offset, spoiled))
    there = torch.zeros(2, 1, 7, 8, dtype=torch.bool)
    there[0, 0, 3, 4] = True
    assert torch.equal(got[0].masked_fill(there, 0), good[0].masked_fill(there, 0))
    value = got[0][0, :, 3, 4]
    assert value.isnan().all() if bad != bad else torch.equal(value, bias)  # outside the image there is only the bias
    assert torch.equal(got[2].masked_fill(there, 0), good[2].masked_fill(there, 0))
    gradient = got[2][0, :, 3, 4]
    assert gradient.isnan().all() if bad != bad else (gradient == 0).all()
    assert got[1].isfinite().all()
    assert got[3].isfinite().all()
    assert ops.offset_mask(spoiled)[0, 0, 3, 4] == 0


def test_a_value_that_is_not_finite_reaches_only_its_neighbours():
    image = torch.ones(1, 1, 6, 6)
    image[0, 0, 0, 0] = float("nan")
    offset = torch.full((1, 2, 6, 6), -20.0)
    assert (ops.bilinear_warp(image, offset) == 0).all()
    assert ops.bilinear_warp(image, torch.zeros(1, 2, 6, 6)).isnan().sum() == 1


def test_an_empty_batch_has_empty_gradients():
    tensors = case((5, 6), batch=0)
    output, *gradients = value_and_gradients(ops.squared_deform_conv2d, tensors)
    assert output.shape == (0, 4, 5, 6)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in tensors]
    assert all((gradient == 0).all() for gradient in gradients)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    kernel=st.sampled_from([1, 3, 5]),
    spread=st.sampled_from([0.3, 2.0, 9.0, 100.0]),
    seed=st.integers(0, 2**20),
)
def test_property_random_shapes_equal_torchvision(size, batch, channels, kernel, spread, seed):
    tensors = case(size, batch=batch, channels=channels, kernel=kernel, spread=spread, seed=seed)
    expected = value_and_gradients(squared_deform_repeated, tensors)
    assert_near(value_and_gradients(ops.squared_deform_conv2d, tensors), expected, 1e-12)


def test_a_whole_shift_moves_the_picture():
    image = torch.arange(20.0).view(1, 1, 4, 5)
    offset = torch.zeros(1, 2, 4, 5)
    offset[:, 0], offset[:, 1] = 1, -2  # one row down, two columns left
    expected = torch.zeros(1, 1, 4, 5)
    expected[..., :3, 2:] = image[..., 1:, :3]
    assert torch.equal(ops.bilinear_warp(image, offset), expected)


def test_relu_and_mask_come_from_the_same_pass():
    tensors = case((8, 9))
    output, mask = ops.squared_deform_conv2d_with_mask(*tensors, relu=True)
    assert torch.equal(output, ops.squared_deform_conv2d(*tensors).relu())
    assert torch.equal(mask, ops.offset_mask(tensors[1]))
    assert not mask.requires_grad
    expected = value_and_gradients(lambda *t: squared_deform_repeated(*t).relu(), tensors)
    assert_near(value_and_gradients(lambda *t: ops.squared_deform_conv2d(*t, relu=True), tensors), expected, 1e-12)


def test_mask_is_one_exactly_where_the_centre_stays_inside():
    offset = torch.zeros(1, 2, 3, 4)
    offset[0, :, 0, 0] = torch.tensor([-0.01, 0.0])
    offset[0, :, 2, 3] = torch.tensor([0.0, 0.01])
    offset[0, :, 1, 1] = torch.tensor([1.0, 2.0])
    expected = torch.ones(1, 1, 3, 4)
    expected[0, 0, 0, 0] = expected[0, 0, 2, 3] = 0
    for kernel in (1, 3, 5):
        assert torch.equal(ops.offset_mask(offset, kernel), expected)
    with pytest.raises(ValueError, match="got 4, expected an odd number"):
        ops.offset_mask(offset, 4)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_full_convolution_and_its_gradients(kernel):
    input, _, weight, _ = case((6, 9), kernel=kernel)
    expected = value_and_gradients(lambda x, w: functional.conv2d(x, w, padding=kernel - 1), [input, weight])
    assert_near(value_and_gradients(full_conv.full_conv2d, [input, weight]), expected, 1e-12)


@pytest.mark.parametrize("band", [1, 100, 300, 10_000])
def test_bands_of_the_weight_gradient_add_up(band, monkeypatch):
    """Bands of one row, of several, of single images, of the batch."""
    monkeypatch.setattr(full_conv, "_BAND_VALUES", band)
    input, _, weight, _ = case((7, 9), batch=3, kernel=5)
    for layout in (torch.contiguous_format, torch.channels_last):
        tensors = [input.contiguous(memory_format=layout), weight]
        expected = value_and_gradients(lambda x, w: functional.conv2d(x, w, padding=4), tensors)
        assert_near(value_and_gradients(full_conv.full_conv2d, tensors), expected, 1e-12)


def test_bands_of_the_offset_gradient_equal_one(monkeypatch):
    tensors = case((12, 17), channels=(16, 24), dtype=torch.bfloat16)
    whole = value_and_gradients(ops.squared_deform_conv2d, tensors)
    monkeypatch.setattr(rows, "_BAND_SAMPLES", 50)
    assert torch.equal(value_and_gradients(ops.squared_deform_conv2d, tensors)[2], whole[2])


def inner_offset(size, batch=2, seed=0):
    """Offsets that land away from whole pixels, where the gradient is defined, some of them outside."""
    random = torch.Generator().manual_seed(seed)
    whole = torch.randint(-3, 4, (batch, 2, *size), generator=random)
    return whole + 0.2 + 0.6 * torch.rand(whole.shape, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck(relu):
    input, _, weight, bias = case((4, 5), channels=(2, 3))
    tensors = [tensor.requires_grad_() for tensor in (input, inner_offset((4, 5)), weight, bias)]
    torch.autograd.gradcheck(lambda *t: ops.squared_deform_conv2d(*t, relu=relu), tensors)


@pytest.mark.parametrize("need", [(True, False), (False, True), (True, True)])
def test_only_the_gradients_asked_for(need):
    tensors = case((5, 6))
    expected = value_and_gradients(squared_deform_repeated, tensors)
    leaves = [t.requires_grad_(flag) for t, flag in zip(tensors, (*need, False, False), strict=True)]
    output = ops.squared_deform_conv2d(*leaves)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    got = torch.autograd.grad(output, [t for t in leaves if t.requires_grad], upstream)
    assert_near(got, [g for g, flag in zip(expected[1:3], need, strict=True) if flag], 1e-12)


def test_a_second_derivative_is_refused_with_the_way_out():
    tensors = [tensor.requires_grad_() for tensor in case((4, 5))]
    (first,) = torch.autograd.grad(ops.squared_deform_conv2d(*tensors).square().sum(), tensors[1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once differentiable.*portable_form"):
        first.sum().backward()
    with ops.portable_form():
        output = ops.squared_deform_conv2d(*tensors).square().sum()
        (first,) = torch.autograd.grad(output, tensors[1], create_graph=True)
        first.square().sum().backward()
    assert tensors[1].grad.abs().max() > 0


@pytest.mark.parametrize("size", [(1, 1), (4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(size, dtype):
    input, offset, _, _ = case(size, dtype=dtype)
    bias = torch.randn(3, dtype=dtype)
    for sample in (
        (input.requires_grad_(), offset.requires_grad_(), bias.requires_grad_(), 0, False, True),
        (input.contiguous(memory_format=torch.channels_last), offset.float(), None, 0, True, False),
    ):
        torch.library.opcheck(_warp_op, sample)
    grad = torch.randn(2, 3, *size, dtype=dtype)
    torch.library.opcheck(_backward_op, (grad, input.detach(), offset.detach(), 0, True, True))
    torch.library.opcheck(_backward_op, (grad, input.detach(), offset.detach(), 0, False, True))


class Layer(nn.Module):
    """A module around the operator, as the network holds it."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Conv2d(3, 2, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1)))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        offset = 4 * self.shift(x)
        output, mask = ops.squared_deform_conv2d_with_mask(x, offset, self.weight, self.bias, relu=True)
        return output * mask + ops.packed_attention(x.flatten(2)).sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    torch.manual_seed(0)
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((8, 9), (7, 12)) if dynamic else ((8, 9),):
        x = torch.randn(2, 3, *size)
        expected = layer(x)
        expected.square().mean().backward()
        gradients = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        output = compiled(x)
        output.square().mean().backward()
        assert_near([output, *(p.grad for p in layer.parameters())], [expected, *gradients], 1e-5)
        layer.zero_grad()


def test_compiles_for_any_batch():
    """`mark_dynamic` raises if anything fixes the batch size."""
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)

    def run(x):
        moved = ops.squared_deform_conv2d(x, x[:, :2].contiguous(), weight)
        return moved.sum() + ops.packed_attention(x.flatten(2)).sum()

    x = torch.randn(2, 3, 6, 7, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    other = torch.randn(5, 3, 6, 7)
    assert_near([compiled(other)], [run(other)], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_with_inductor(dynamic, autocast):
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3, 12, 14), (3, 3, 8, 9)) if dynamic else ((2, 3, 12, 14),):
        x = torch.randn(shape)
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = run(x)
            output.float().square().mean().backward()
            results.append([output, *(p.grad.clone() for p in layer.parameters())])
        assert results[1][0].dtype == results[0][0].dtype
        assert_near(results[1], results[0], 5e-2 if autocast else 1e-4)


def test_exports_with_and_without_the_operator():
    torch.manual_seed(0)
    layer, x = Layer().eval(), torch.randn(2, 3, 8, 9)
    shapes = {"x": {2: torch.export.Dim("height", min=4, max=64), 3: torch.export.Dim("width", min=4, max=64)}}
    exported = torch.export.export(layer, (x,), dynamic_shapes=shapes)
    other = torch.randn(2, 3, 11, 7)
    assert_near([exported.module()(other)], [layer(other)], 1e-5)
    assert "sdan." in str(exported.graph)
    with ops.portable_form():
        portable = torch.export.export(layer, (x,), dynamic_shapes=shapes)
    assert "sdan." not in str(portable.graph)
    assert_near([portable.module()(other)], [layer(other)], 1e-5)


def test_autocast_keeps_offsets_in_float32():
    tensors = case((10, 10), channels=(8, 8), dtype=torch.float32)
    tensors[1] = tensors[1] + 100.03  # bfloat16 would round this to 100
    tensors[1][:, :, 5:] -= 100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_gradients(ops.squared_deform_conv2d, tensors)
        assert ops.bilinear_warp(tensors[0], tensors[1]).dtype == torch.float32
        half = ops.bilinear_warp(tensors[0].bfloat16(), tensors[1].bfloat16())
    assert half.dtype == torch.bfloat16
    assert got[0].dtype == torch.bfloat16
    assert [gradient.dtype for gradient in got[1:]] == [torch.float32] * 4
    assert_near(got, value_and_gradients(squared_deform_repeated, tensors), 3e-2)


def test_autocast_takes_offsets_of_the_lower_type():
    """A convolution made them under autocast, while the input has not been through one."""
    tensors = case((10, 10), channels=(8, 8), dtype=torch.float32)
    tensors[1] = tensors[1].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.squared_deform_conv2d(*tensors)
    tensors[1] = tensors[1].float()
    assert_near([got], [ops.squared_deform_conv2d(*tensors)], 3e-2)


def test_deterministic_algorithms_give_the_same_bits():
    tensors = case((40, 50), channels=(8, 8), dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (value_and_gradients(ops.squared_deform_conv2d, tensors) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_trains_under_ddp(tmp_path):
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path / "store"),), nprocs=2)


def _ddp_worker(rank, store):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = Layer()
    parallel = nn.parallel.DistributedDataParallel(layer)
    batches = torch.randn(2, 1, 3, 8, 9, generator=torch.Generator().manual_seed(5))
    parallel(batches[rank]).mean().backward()
    got = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    torch.stack([layer(batch).mean() for batch in batches]).mean().backward()
    assert_near(got, [p.grad for p in layer.parameters()], 1e-4)
    torch.distributed.destroy_process_group()


def test_sizes_past_two_to_the_31_keep_their_shapes():
    with FakeTensorMode():
        input = torch.empty(2, 64, 8192, 8192, dtype=torch.bfloat16)  # 2**33 values
        offset = torch.empty(2, 2, 8192, 8192)
        output, mask = ops.squared_deform_conv2d_with_mask(
            input, offset, torch.empty(64, 64, 3, 3, dtype=torch.bfloat16), torch.empty(64, dtype=torch.bfloat16)
        )
        assert output.shape == input.shape
        assert output.stride() == input.stride()
        assert mask.shape == (2, 1, 8192, 8192)
        grad_input, grad_offset = _backward_op(output, input, offset, 0, True, True)
        assert grad_input.shape == input.shape
        assert grad_offset.shape == offset.shape


def test_row_numbers_are_64_bit_where_32_would_overflow(monkeypatch):
    tensors = case((9, 13))
    expected = value_and_gradients(ops.squared_deform_conv2d, tensors)
    assert rows.find_corners(tensors[1], (11, 15), 1).index_P4.dtype == torch.int32
    monkeypatch.setattr(rows, "_INT32_ROWS", 1)
    assert rows.find_corners(tensors[1], (11, 15), 1).index_P4.dtype == torch.int64
    assert_near(value_and_gradients(ops.squared_deform_conv2d, tensors), expected, 1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i, o, w, b: (i, o.repeat(1, 9, 1, 1), w, b), ValueError, r"offset.shape\[1\] is not valid: got 18"),
        (lambda i, o, w, b: (i, o[:1], w, b), ValueError, r"invalid batch size of offset: got 1, expected 2"),
        (lambda i, o, w, b: (i, o[..., 1:], w, b), ValueError, r"got \(5, 5\), while the computed .* are \(5, 6\)"),
        (lambda i, o, w, b: (i, o, w[:, :2], b), ValueError, r"input.shape\[1\]=3, while weight.shape\[1\]=2"),
        (lambda i, o, w, b: (i, o, w, b[:3]), ValueError, r"bias.shape=\(3,\), while weight.shape\[0\]=4"),
        (lambda i, o, w, b: (i, o, w[..., :2, :2], b), ValueError, r"got \(4, 3, 2, 2\), expected .* K odd"),
        (lambda i, o, w, b: (i, o, w[..., :1], b), ValueError, r"got \(4, 3, 3, 1\), expected"),
        (lambda i, o, w, b: (i[0], o, w, b), ValueError, r"got input.dim\(\)=3, offset.dim\(\)=4"),
        (lambda i, o, w, b: (i, o, w.float(), b), TypeError, r"torch.float64, while weight.dtype=torch.float32"),
        (lambda i, o, w, b: (i, o.half(), w, b), TypeError, r"got torch.float16, expected torch.float64"),
        (lambda i, o, w, b: (i.long(), o, w.long(), b), TypeError, r"got torch.int64, expected one of"),
        (lambda i, o, w, b: (i, o.to("meta"), w, b), ValueError, r"got input on cpu, offset on meta"),
        (lambda i, o, w, b: (i, o, w.to("meta"), b), ValueError, r"got input on cpu, weight on meta"),
    ],
)
def test_errors_name_both_values(change, error, message):
    with pytest.raises(error, match=message):
        ops.squared_deform_conv2d(*change(*case((5, 6))))


def test_per_point_form_upcasts_and_equals_the_squared_one_on_repeated_offsets():
    input, offset, weight, bias = case((6, 7))
    repeated = offset.repeat(1, 9, 1, 1)
    got = ops.per_point_deform_conv2d(input, repeated, weight, bias)
    assert_near([got], [ops.squared_deform_conv2d(input, offset, weight, bias)], 1e-12)
    with pytest.raises(RuntimeError, match="not implemented for 'BFloat16'"):  # the reason for the upcast
        deform_conv2d(input.bfloat16(), repeated.bfloat16(), weight.bfloat16(), padding=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = ops.per_point_deform_conv2d(*(t.bfloat16() for t in (input, repeated, weight, bias)))
    assert half.dtype == torch.bfloat16
    assert_near([half], [got], 5e-2)


def test_old_gpus_and_missing_triton_use_the_plain_form_and_say_so_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    backend.why_not_triton.cache_clear()
    with caplog.at_level(logging.WARNING, logger="sdan.ops.backend"):
        assert [backend.why_not_triton(0) for _ in range(3)] == ["this GPU is sm_75, older than sm_80"] * 3
    assert len(caplog.records) == 1
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    backend.why_not_triton.cache_clear()
    assert backend.why_not_triton(0) is None
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    backend.why_not_triton.cache_clear()
    assert backend.why_not_triton(0) == "Triton is not installed"
    backend.why_not_triton.cache_clear()


def test_selftest_reports_every_check():
    checks = {check.name: check for check in ops.selftest()}
    assert checks["squared deformable convolution, CPU"].status == "ok"
    assert checks["packed attention, CPU"].status == "ok"
    if not torch.cuda.is_available():
        assert checks["GPU kernels"].status == "skipped"
    assert all(check.status != "failed" for check in checks.values())


def test_selftest_finds_a_wrong_operator(monkeypatch):
    def equal_weights(self, dtype):
        return torch.full((self.invalid.numel(), 4), 0.25, dtype=dtype)

    monkeypatch.setattr(rows.Corners, "weights_P4", equal_weights)
    assert ops.selftest()[0].status == "failed"


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
def test_gpu_selftest_passes():
    assert [check for check in ops.selftest() if check.status == "failed"] == []
