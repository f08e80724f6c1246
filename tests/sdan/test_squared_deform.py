"""The squared deformable convolution against nested loops and torchvision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import LIMITS, assert_near, case, value_and_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sdan.ops import offset_mask, portable_form, rows, squared_deform, squared_deform_conv2d
from sdan.ops.reference import squared_deform_loops, squared_deform_repeated

SIZES = [(1, 1), (1, 7), (5, 123), (16, 16)]


def bilinear_warp(image, offset):
    """output(p) = image(p + offset(p)): the operator beneath the convolution."""
    return torch.ops.sdan.bilinear_warp(image, offset, None, 0)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("size", [(1, 1), (4, 7)])
def test_values_equal_nested_loops(kernel, size):
    tensors = case(size, kernel=kernel)
    assert_near([squared_deform_conv2d(*tensors)], [squared_deform_loops(*tensors)], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_equal_torchvisions(dtype, kernel, size):
    tensors = case(size, kernel=kernel, dtype=dtype)
    expected = value_and_gradients(squared_deform_repeated, tensors)
    assert_near(value_and_gradients(squared_deform_conv2d, tensors), expected, LIMITS[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset_dtype", [None, torch.float32])
def test_half_types_stay_near_float64(dtype, offset_dtype):
    tensors = case((12, 17), channels=(16, 24), dtype=dtype)
    tensors[1] = tensors[1].to(offset_dtype or dtype)
    expected = value_and_gradients(squared_deform_repeated, [tensor.double() for tensor in tensors])
    got = value_and_gradients(squared_deform_conv2d, tensors)
    assert got[0].dtype == dtype
    assert got[2].dtype == (offset_dtype or dtype)
    assert_near(got, expected, LIMITS[dtype])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second", "transposed"])
def test_output_layout_follows_conv2ds_rule(layout):
    tensors = case((8, 12), channels=(6, 5))
    expected = value_and_gradients(squared_deform_repeated, tensors)
    change = {
        "contiguous": lambda t: t,
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "every_second": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    tensors[:2] = [change(tensor) for tensor in tensors[:2]]
    got = value_and_gradients(squared_deform_conv2d, tensors)
    assert_near(got, expected, 1e-12)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert got[0].is_contiguous(memory_format=memory_format)


def test_strided_and_expanded_upstream_gradients():
    tensors = case((6, 8))
    wide = torch.randn(2, 4, 6, 16, dtype=torch.float64)[..., ::2]
    expected = value_and_gradients(squared_deform_repeated, tensors, wide.contiguous())
    assert_near(value_and_gradients(squared_deform_conv2d, tensors, wide), expected, 1e-12)
    broadcast = torch.ones((), dtype=torch.float64).expand(2, 4, 6, 8)
    expected = value_and_gradients(squared_deform_repeated, tensors, broadcast.clone())
    assert_near(value_and_gradients(squared_deform_conv2d, tensors, broadcast), expected, 1e-12)


@pytest.mark.parametrize("shift", [0.0, 1.0, -1.0, -2.0, 0.5, 5.0, 6.0, -6.0, 7.0, 1e4, -1e30])
def test_integer_and_far_offsets_equal_torchvisions(shift):
    input, offset, weight, bias = case((6, 6))
    tensors = [input, torch.full_like(offset, shift), weight, bias]
    expected = value_and_gradients(squared_deform_repeated, tensors)
    assert_near(value_and_gradients(squared_deform_conv2d, tensors), expected, 1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_bad_offset_touches_its_own_pixel_only(bad, axis):
    input, offset, weight, bias = case((7, 8))
    spoiled = offset.clone()
    spoiled[0, axis, 3, 4] = bad
    good, got = (value_and_gradients(squared_deform_conv2d, [input, o, weight, bias]) for o in (offset, spoiled))
    there = torch.zeros(2, 1, 7, 8, dtype=torch.bool)
    there[0, 0, 3, 4] = True
    assert torch.equal(got[0].masked_fill(there, 0), good[0].masked_fill(there, 0))
    value = got[0][0, :, 3, 4]
    assert value.isnan().all() if bad != bad else torch.equal(value, bias)  # only the bias outside the image
    assert torch.equal(got[2].masked_fill(there, 0), good[2].masked_fill(there, 0))
    gradient = got[2][0, :, 3, 4]
    assert gradient.isnan().all() if bad != bad else (gradient == 0).all()
    assert got[1].isfinite().all()
    assert got[3].isfinite().all()
    assert offset_mask(spoiled)[0, 0, 3, 4] == 0


def test_a_nan_in_the_image_reaches_only_samples_next_to_it():
    image = torch.ones(1, 1, 6, 6)
    image[0, 0, 0, 0] = float("nan")
    offset = torch.full((1, 2, 6, 6), -20.0)
    assert (bilinear_warp(image, offset) == 0).all()
    assert bilinear_warp(image, torch.zeros(1, 2, 6, 6)).isnan().sum() == 1


def test_an_empty_batch_has_empty_gradients():
    tensors = case((5, 6), batch=0)
    output, *gradients = value_and_gradients(squared_deform_conv2d, tensors)
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
    assert_near(value_and_gradients(squared_deform_conv2d, tensors), expected, 1e-12)


def test_an_integer_offset_moves_the_image():
    image = torch.arange(20.0).view(1, 1, 4, 5)
    offset = torch.zeros(1, 2, 4, 5)
    offset[:, 0], offset[:, 1] = 1, -2  # sample one row below, two columns to the left
    expected = torch.zeros(1, 1, 4, 5)
    expected[..., :3, 2:] = image[..., 1:, :3]
    assert torch.equal(bilinear_warp(image, offset), expected)


def test_mask_is_one_exactly_where_the_sample_is_inside():
    offset = torch.zeros(1, 2, 3, 4)
    offset[0, :, 0, 0] = torch.tensor([-0.01, 0.0])
    offset[0, :, 2, 3] = torch.tensor([0.0, 0.01])
    offset[0, :, 1, 1] = torch.tensor([1.0, 2.0])
    expected = torch.ones(1, 1, 3, 4)
    expected[0, 0, 0, 0] = expected[0, 0, 2, 3] = 0
    assert torch.equal(offset_mask(offset), expected)
    assert not offset_mask(offset.requires_grad_()).requires_grad
    with pytest.raises(ValueError, match=r"expected \[N, 2, H, W\] with \(dy, dx\), got \(1, 1, 3, 4\)"):
        offset_mask(offset[:, :1])


def test_bands_of_the_offset_gradient_equal_one(monkeypatch):
    tensors = case((12, 17), channels=(16, 24), dtype=torch.bfloat16)
    whole = value_and_gradients(squared_deform_conv2d, tensors)
    monkeypatch.setattr(rows, "_BAND_SAMPLES", 50)
    assert torch.equal(value_and_gradients(squared_deform_conv2d, tensors)[2], whole[2])


def inner_offset(size, batch=2, seed=0):
    """Offsets at least 0.2 pixels from integers, where the gradient is defined; some leave the image."""
    random = torch.Generator().manual_seed(seed)
    whole = torch.randint(-3, 4, (batch, 2, *size), generator=random)
    return whole + 0.2 + 0.6 * torch.rand(whole.shape, generator=random, dtype=torch.float64)


def test_gradcheck():
    input, _, weight, bias = case((4, 5), channels=(2, 3))
    tensors = [tensor.requires_grad_() for tensor in (input, inner_offset((4, 5)), weight, bias)]
    torch.autograd.gradcheck(squared_deform_conv2d, tensors)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 1), (2, 3)])
def test_gradients_of_some_tensors_alone(needed):
    tensors = case((5, 6))
    expected = value_and_gradients(squared_deform_repeated, tensors)
    leaves = [tensor.requires_grad_(number in needed) for number, tensor in enumerate(tensors)]
    output = squared_deform_conv2d(*leaves)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    got = torch.autograd.grad(output, [leaves[number] for number in needed], upstream)
    assert_near(got, [expected[1 + number] for number in needed], 1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", list(LIMITS))
def test_the_custom_operator_equals_the_eager_form(dtype, autocast, monkeypatch):
    """torch.compile and torch.export use the first, eager code the second."""
    results = []
    for eager in (True, False):
        monkeypatch.setattr(squared_deform, "_is_eager", lambda *tensors, eager=eager: eager)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(value_and_gradients(squared_deform_conv2d, case((9, 8), dtype=dtype)))
    assert [tensor.dtype for tensor in results[0]] == [tensor.dtype for tensor in results[1]]
    assert_near(*results, 1e-12 if dtype == torch.float64 else 1e-6)


def test_traces_contain_the_custom_operator():
    input, offset, weight, bias = case((4, 5))
    traced = make_fx(lambda input: squared_deform_conv2d(input, offset, weight, bias))(input)
    assert "sdan.bilinear_warp" in traced.code


@pytest.mark.parametrize("eager", [True, False])
def test_a_second_derivative_needs_the_portable_form(eager, monkeypatch):
    whether = squared_deform._is_eager
    monkeypatch.setattr(squared_deform, "_is_eager", lambda *tensors: eager and whether(*tensors))
    tensors = [tensor.requires_grad_() for tensor in case((4, 5))]
    (first,) = torch.autograd.grad(squared_deform_conv2d(*tensors).square().sum(), tensors[1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"expected a single backward pass.*portable_form"):
        first.sum().backward()
    with portable_form():
        output = squared_deform_conv2d(*tensors).square().sum()
        (first,) = torch.autograd.grad(output, tensors[1], create_graph=True)
        first.square().sum().backward()
    assert tensors[1].grad.abs().max() > 0


def test_autocast_keeps_offsets_in_float32():
    tensors = case((10, 10), channels=(8, 8), dtype=torch.float32)
    tensors[1] = tensors[1] + 100.03  # bfloat16 would round this to 100
    tensors[1][:, :, 5:] -= 100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_gradients(squared_deform_conv2d, tensors)
        assert bilinear_warp(tensors[0], tensors[1]).dtype == torch.float32
        half = bilinear_warp(tensors[0].bfloat16(), tensors[1].bfloat16())
    assert half.dtype == torch.bfloat16
    assert got[0].dtype == torch.bfloat16
    assert [gradient.dtype for gradient in got[1:]] == [torch.float32] * 4
    assert_near(got, value_and_gradients(squared_deform_repeated, tensors), 3e-2)


def test_autocast_takes_offsets_of_the_lower_type():
    """Under autocast a convolution returns bfloat16 offsets, while the input may still be float32."""
    tensors = case((10, 10), channels=(8, 8), dtype=torch.float32)
    tensors[1] = tensors[1].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = squared_deform_conv2d(*tensors)
    tensors[1] = tensors[1].float()
    assert_near([got], [squared_deform_conv2d(*tensors)], 3e-2)


def test_deterministic_algorithms_give_the_same_bits():
    tensors = case((40, 50), channels=(8, 8), dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (value_and_gradients(squared_deform_conv2d, tensors) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_sizes_past_two_to_the_31_keep_their_shapes():
    with FakeTensorMode():
        input = torch.empty(2, 64, 8192, 8192, dtype=torch.bfloat16)  # 2**33 values
        offset = torch.empty(2, 2, 8192, 8192)
        output = squared_deform_conv2d(
            input, offset, torch.empty(64, 64, 3, 3, dtype=torch.bfloat16), torch.empty(64, dtype=torch.bfloat16)
        )
        assert output.shape == input.shape
        assert output.stride() == input.stride()
        assert offset_mask(offset).shape == (2, 1, 8192, 8192)
        found = torch.ops.sdan.bilinear_warp_backward(output, input, offset, 0, True, True, True)
        assert [grad.shape for grad in found] == [input.shape, offset.shape, (64,)]


def test_indices_are_64_bit_where_32_would_overflow(monkeypatch):
    tensors = case((9, 13))
    expected = value_and_gradients(squared_deform_conv2d, tensors)
    assert rows.find_corners(tensors[1], (11, 15), 1).index_P4.dtype == torch.int32
    monkeypatch.setattr(rows, "_INT32_ROWS", 1)
    assert rows.find_corners(tensors[1], (11, 15), 1).index_P4.dtype == torch.int64
    assert_near(value_and_gradients(squared_deform_conv2d, tensors), expected, 1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i, o, w, b: (i, o.repeat(1, 9, 1, 1), w, b), ValueError, r"offset.shape\[1\]: expected 2 .* got 18"),
        (lambda i, o, w, b: (i, o[:1], w, b), ValueError, r"offset.shape\[0\]: expected input's batch size 2, got 1"),
        (lambda i, o, w, b: (i, o[..., 1:], w, b), ValueError, r"expected the output's size \(5, 6\), got \(5, 5\)"),
        (lambda i, o, w, b: (i, o, w[:, :2], b), ValueError, r"weight.shape\[1\]: expected input's 3 channels, got 2"),
        (lambda i, o, w, b: (i, o, w, b[:3]), ValueError, r"bias.shape: expected \(4,\), .* got \(3,\)"),
        (lambda i, o, w, b: (i, o, w[..., :2, :2], b), ValueError, r"expected .* K odd, got \(4, 3, 2, 2\)"),
        (lambda i, o, w, b: (i, o, w[..., :1], b), ValueError, r"expected .* K odd, got \(4, 3, 3, 1\)"),
        (lambda i, o, w, b: (i[0], o, w, b), ValueError, r"expected 4 and 4, got 3 and 4"),
        (
            lambda i, o, w, b: (i, o, w.float(), b),
            TypeError,
            r"weight.dtype: expected input's torch.float64, got torch.float32",
        ),
        (
            lambda i, o, w, b: (i, o.half(), w, b),
            TypeError,
            r"offset.dtype: expected input's torch.float64 .* got torch.float16",
        ),
        (lambda i, o, w, b: (i.long(), o, w.long(), b), TypeError, r"input.dtype: expected one of .* got torch.int64"),
        (lambda i, o, w, b: (i, o.to("meta"), w, b), ValueError, r"offset.device: expected input's cpu, got meta"),
        (lambda i, o, w, b: (i, o, w.to("meta"), b), ValueError, r"weight.device: expected input's cpu, got meta"),
    ],
)
def test_errors_name_both_values(change, error, message):
    with pytest.raises(error, match=message):
        squared_deform_conv2d(*change(*case((5, 6))))
