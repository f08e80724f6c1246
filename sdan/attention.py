"""The attention layers of the offset learner (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdan.ops.attention import cross_packing


class CrossPackingAttention(nn.Module):
    """CPA: pack K x K neighbours into channels, attend between the channels, unpack; x + gamma * attention(x).

    Packing (space-to-depth) turns a neighbourhood into channels, so cheap channel attention relates positions as well
    as features. This widens the offset learner's receptive field. gamma is learnt and starts at 0, as in the released
    code; the attention has no other weights.
    """

    def __init__(self, packing_kernel: int) -> None:
        super().__init__()
        self.packing_kernel = packing_kernel
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x_NCHW: Tensor, *, relu: bool = False) -> Tensor:
        """[N, C, H, W] -> the same shape, type and layout; relu: with ReLU after it, in the same kernel on a GPU.

        Raises:
            ValueError: K does not divide H and W.
        """
        check_packing(self.packing_kernel, *x_NCHW.shape[-2:])
        return cross_packing(x_NCHW, self.gamma, self.packing_kernel, relu=relu)


class ChannelAttention(nn.Module):
    """RCAN's squeeze-and-excitation with reduction 16: the "CL-Attention" row of Table 2."""

    def __init__(self, features: int, reduction: int = 16) -> None:
        super().__init__()
        squeezed = max(1, features // reduction)
        self.excite = nn.Sequential(
            nn.Conv2d(features, squeezed, 1), nn.ReLU(inplace=True), nn.Conv2d(squeezed, features, 1), nn.Sigmoid()
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape, each channel scaled by a factor in (0, 1)."""
        return x_NCHW * self.excite(x_NCHW.mean(dim=(2, 3), keepdim=True))


def check_packing(packing_kernel: int, height: int, width: int) -> None:
    """Raise ValueError unless K divides H and W."""
    if height % packing_kernel or width % packing_kernel:
        divisors = [k for k in (2, 4, 8, 16) if height % k == 0 and width % k == 0]
        kernels = f"packing_kernel one of {divisors}" if divisors else "another crop"
        raise ValueError(
            f"packing_kernel={packing_kernel}: expected to divide the input's height and width, got {height}x{width} "
            f"(remainders {height % packing_kernel}, {width % packing_kernel}); "
            f"use a crop that is a multiple of {packing_kernel}, or {kernels}"
        )
