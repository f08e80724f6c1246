"""What SDAN is compared with in Table 1: bicubic enlargement, and the same trunk without alignment."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdan.network import CHANNELS, SDAN, SDANConfig, SDANOutput, SuperResolution, check_inputs
from sdan.resample import bicubic

__all__ = ["Network", "SRResNet", "bicubic"]


class SRResNet(nn.Module):
    """SDAN's head and trunk without the alignment module: what a pixel loss on misaligned pairs teaches.

    The config's packing_kernel, offset, attention and flips are unused.
    """

    tile_px: int | None = None
    """As SDAN.tile_px."""

    def __init__(self, config: SDANConfig) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Conv2d(CHANNELS[config.input], config.features, 3, padding=1)
        self.super_resolution = SuperResolution(config)

    def forward(self, x: Tensor, reference: Tensor, rendering: Tensor | None = None) -> SDANOutput:
        """As SDAN.forward; nothing is aligned, so the offset is 0, M is 1 and X' is the reference itself.

        X' = reference makes the alignment term of the loss exactly zero; the reference does not reach the output.
        """
        check_inputs(self.config, x, reference, rendering)
        zoomed = self.super_resolution(F.relu(self.head(x))).float()
        if self.config.skip == "rendering":
            assert rendering is not None  # check_inputs
            zoomed = zoomed + bicubic(rendering, self.config.scale)
        n, _, height, width = x.shape
        zeros = torch.zeros(n, 2, height, width, device=x.device)
        return SDANOutput(zoomed, reference, torch.ones_like(zeros[:, :1]), zeros)


Network = SDAN | SRResNet
"""Whatever a checkpoint can hold: the same inputs, the same SDANOutput."""
