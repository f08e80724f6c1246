"""SDAN's operators: one name each, every device."""

from sdan.ops.attention import packed_attention
from sdan.ops.squared_deform import bilinear_warp, offset_mask, squared_deform_conv2d

__all__ = ["bilinear_warp", "offset_mask", "packed_attention", "squared_deform_conv2d"]
