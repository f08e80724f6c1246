"""SDAN's operators: one name each, every device."""

from sdan.ops.attention import packed_attention
from sdan.ops.portable import portable_form
from sdan.ops.squared_deform import (
    bilinear_warp,
    offset_mask,
    squared_deform_conv2d,
    squared_deform_conv2d_with_mask,
)

__all__ = [
    "bilinear_warp",
    "offset_mask",
    "packed_attention",
    "portable_form",
    "squared_deform_conv2d",
    "squared_deform_conv2d_with_mask",
]
