"""The per-point deformable convolution against torchvision's and against the squared one."""

import pytest
import torch
from operator_cases import assert_near, case
from torchvision.ops import deform_conv2d

from sdan.ops import per_point_deform_conv2d, squared_deform_conv2d


def test_repeated_offsets_equal_the_squared_form_in_any_type():
    input, offset, weight, bias = case((6, 7))
    repeated = offset.repeat(1, 9, 1, 1)
    got = per_point_deform_conv2d(input, repeated, weight, bias)
    assert_near([got], [squared_deform_conv2d(input, offset, weight, bias)], 1e-12)
    with pytest.raises(RuntimeError, match="not implemented for 'BFloat16'"):  # the reason for the upcast
        deform_conv2d(input.bfloat16(), repeated.bfloat16(), weight.bfloat16(), padding=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = per_point_deform_conv2d(*(t.bfloat16() for t in (input, repeated, weight, bias)))
    assert half.dtype == torch.bfloat16
    assert_near([half], [got], 5e-2)
