"""SDAN's operators. Each runs on every device: plain PyTorch everywhere, Triton on recent GPUs."""

from sdan.ops.attention import packed_attention
from sdan.ops.per_point import per_point_deform_conv2d
from sdan.ops.portable import portable_form
from sdan.ops.selftest import Check, selftest
from sdan.ops.squared_deform import offset_mask, squared_deform_conv2d

__all__ = [
    "Check",
    "offset_mask",
    "packed_attention",
    "per_point_deform_conv2d",
    "portable_form",
    "selftest",
    "squared_deform_conv2d",
]
