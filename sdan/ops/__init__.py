"""SDAN's operators: one name each, every device."""

from sdan.ops.attention import packed_attention
from sdan.ops.per_point import per_point_deform_conv2d
from sdan.ops.portable import portable_form
from sdan.ops.selftest import Check, selftest
from sdan.ops.squared_deform import (
    bilinear_warp,
    offset_mask,
    squared_deform_conv2d,
    squared_deform_conv2d_with_mask,
)

__all__ = [
    "Check",
    "bilinear_warp",
    "offset_mask",
    "packed_attention",
    "per_point_deform_conv2d",
    "portable_form",
    "selftest",
    "squared_deform_conv2d",
    "squared_deform_conv2d_with_mask",
]
