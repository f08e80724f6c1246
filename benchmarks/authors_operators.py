"""The operators of SDAN's released code, to compare ours with: deformable convolution and explicit attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

import sdan.attention
import sdan.network
from sdan.ops.reference import explicit_attention, squared_deform_repeated


def repeated(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torchvision's `deform_conv2d` with the offset repeated K*K times; half types are computed in float32."""
    wide = (tensor.float() for tensor in (input, offset, weight, bias))
    with torch.autocast(input.device.type, enabled=False):
        return squared_deform_repeated(*wide).to(input.dtype)


@contextmanager
def authors_way() -> Iterator[None]:
    """Make `sdan.network` and `sdan.attention` use the authors' two operators instead of ours."""
    with (
        mock.patch.object(sdan.network, "squared_deform_conv2d", repeated),
        mock.patch.object(sdan.attention, "packed_attention", explicit_attention),
    ):
        yield
