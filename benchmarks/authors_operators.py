"""The operators of SDAN's released code, to compare ours with: deformable convolution and explicit attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import sdan.network
from sdan.attention import CrossPackingAttention
from sdan.ops.reference import explicit_attention, squared_deform_repeated


def repeated(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torchvision's `deform_conv2d` with the offset repeated K*K times.

    Types that it lacks are computed in float32: bf16, and fp16 on a CPU.
    """
    lacks = (torch.bfloat16,) if input.is_cuda else (torch.bfloat16, torch.float16)
    dtype = torch.float32 if input.dtype in lacks else input.dtype
    same = (tensor.to(dtype) for tensor in (input, offset, weight, bias))
    with torch.autocast(input.device.type, enabled=False):
        return squared_deform_repeated(*same).to(input.dtype)


def authors_cpa(self: CrossPackingAttention, x_NCHW: Tensor, *, relu: bool = False) -> Tensor:
    """`CrossPackingAttention.forward` as released: pack, attend with the whole matrix, unpack, then ReLU."""
    packed = F.pixel_unshuffle(x_NCHW, self.packing_kernel)
    attended = F.pixel_shuffle(explicit_attention(packed.flatten(2)).view_as(packed), self.packing_kernel)
    out = x_NCHW + self.gamma.to(x_NCHW.dtype) * attended.to(x_NCHW.dtype)
    return F.relu(out) if relu else out


@contextmanager
def authors_way() -> Iterator[None]:
    """Make `sdan.network` use the authors' two operators instead of ours."""
    with (
        mock.patch.object(sdan.network, "squared_deform_conv2d", repeated),
        mock.patch.object(CrossPackingAttention, "forward", authors_cpa),
    ):
        yield
