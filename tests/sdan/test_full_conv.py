"""The full convolution against conv2d with the same padding."""

import pytest
import torch
from operator_cases import LIMITS, assert_near, case, value_and_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from sdan.ops import full_conv


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_full_convolution_and_its_gradients(kernel):
    input, _, weight, _ = case((6, 9), kernel=kernel)
    expected = value_and_gradients(lambda x, w: functional.conv2d(x, w, padding=kernel - 1), [input, weight])
    assert_near(value_and_gradients(full_conv.full_conv2d, [input, weight]), expected, 1e-12)


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("band", [1, 100, 300, 10_000])
def test_bands_of_the_weight_gradient_add_up(band, products, monkeypatch):
    """Bands of one row, of several rows, of one image, and of the whole batch; by convolution and by products."""
    monkeypatch.setattr(full_conv, "_BAND_VALUES", band)
    monkeypatch.setattr(full_conv, "_PRODUCT_VALUES", band)
    monkeypatch.setattr(full_conv, "_prefers_products", lambda: products)
    input, _, weight, _ = case((7, 9), batch=3, kernel=5)
    for layout in (torch.contiguous_format, torch.channels_last):
        tensors = [input.contiguous(memory_format=layout), weight]
        expected = value_and_gradients(lambda x, w: functional.conv2d(x, w, padding=4), tensors)
        assert_near(value_and_gradients(full_conv.full_conv2d, tensors), expected, 1e-12)


@pytest.mark.parametrize("products", [False, True])
def test_weight_gradient_of_half_types_sums_in_float32(products, monkeypatch):
    monkeypatch.setattr(full_conv, "_prefers_products", lambda: products)
    tensors = [tensor.bfloat16() for tensor in case((40, 40), channels=(3, 4))[::2]]
    wide = [tensor.double() for tensor in tensors]
    expected = value_and_gradients(lambda x, w: functional.conv2d(x, w, padding=2), wide)
    got = value_and_gradients(full_conv.full_conv2d, tensors)
    assert got[2].dtype == torch.bfloat16
    assert_near(got, expected, LIMITS[torch.bfloat16])


@pytest.mark.parametrize(
    ("dtype", "allowed", "has_tf32", "expected"),
    [
        (torch.bfloat16, False, True, torch.channels_last),
        (torch.float16, False, False, torch.channels_last),
        (torch.float32, True, True, torch.channels_last),
        (torch.float32, False, True, torch.contiguous_format),
        (torch.float32, True, False, torch.contiguous_format),
        (torch.float64, True, True, torch.contiguous_format),
    ],
)
def test_layout_on_cuda_follows_the_tensor_cores(dtype, allowed, has_tf32, expected, monkeypatch):
    monkeypatch.setattr(full_conv, "_has_tf32", lambda device_index: has_tf32)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed), FakeTensorMode(allow_non_fake_inputs=True):
        assert full_conv.layout_now(dtype, 0) == expected
        image = torch.empty(2, 3, 8, 9, dtype=dtype, device="cuda:0")
        weight = torch.empty(4, 3, 3, 3, dtype=dtype, device="cuda:0")
        for input in (image, image.contiguous(memory_format=torch.channels_last), image[..., ::2]):
            tensors = full_conv.lowered(input, weight)
            assert all(tensor.is_contiguous(memory_format=expected) for tensor in tensors)
            full = full_conv.convolve(*tensors)
            assert full.is_contiguous(memory_format=torch.channels_last)
            grads = full_conv.convolve_backward(full, *tensors, True, True)
            assert [grad.shape for grad in grads] == [input.shape, weight.shape]
