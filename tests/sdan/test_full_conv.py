"""The full convolution against conv2d with the same padding."""

import pytest
import torch
from operator_cases import assert_near, case, value_and_gradients
from torch.nn import functional

from sdan.ops import full_conv


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_full_convolution_and_its_gradients(kernel):
    input, _, weight, _ = case((6, 9), kernel=kernel)
    expected = value_and_gradients(lambda x, w: functional.conv2d(x, w, padding=kernel - 1), [input, weight])
    assert_near(value_and_gradients(full_conv.full_conv2d, [input, weight]), expected, 1e-12)


@pytest.mark.parametrize("band", [1, 100, 300, 10_000])
def test_bands_of_the_weight_gradient_add_up(band, monkeypatch):
    """Bands of one row, of several rows, of one image, and of the whole batch."""
    monkeypatch.setattr(full_conv, "_BAND_VALUES", band)
    input, _, weight, _ = case((7, 9), batch=3, kernel=5)
    for layout in (torch.contiguous_format, torch.channels_last):
        tensors = [input.contiguous(memory_format=layout), weight]
        expected = value_and_gradients(lambda x, w: functional.conv2d(x, w, padding=4), tensors)
        assert_near(value_and_gradients(full_conv.full_conv2d, tensors), expected, 1e-12)
