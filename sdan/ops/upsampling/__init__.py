"""Upsampling by a convolution and a pixel shuffle."""

from sdan.ops.upsampling.conv_shuffle import conv_shuffle

__all__ = ["conv_shuffle"]
