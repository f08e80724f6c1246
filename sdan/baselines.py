"""SRResNet, Table 1's baseline network: SDAN's head and trunk without alignment.

The other baseline, bicubic enlargement, is `sdan.resample.bicubic`. To add a network: give it SDAN's `forward`,
`find_offset`, `zoom_at`, `offset_channels`, `config` and `input_tile_px`, add it to `Network` here and to
`ARCHITECTURES` in sdan/checkpoint.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdan.network import CHANNELS, SDAN, SDANConfig, SDANOutput, SuperResolution, as_picture, check_inputs
from sdan.resample import bicubic


class SRResNet(nn.Module):
    """SDAN without the alignment module: shows what a pixel loss on misaligned pairs teaches.

    The config's packing_kernel, offset, attention and flips have no effect.
    """

    input_tile_px: int | None = None
    """As SDAN.input_tile_px."""

    def __init__(self, config: SDANConfig) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Conv2d(CHANNELS[config.input], config.features, 3, padding=1)
        self.super_resolution = SuperResolution(config)

    def forward(self, x: Tensor, reference: Tensor, rendering: Tensor | None = None) -> SDANOutput:
        """Arguments, result and errors as SDAN.forward, with offset 0, mask 1 and X' = reference.

        X' = reference makes the alignment term of the loss exactly zero. The reference does not affect the zoomed
        output.
        """
        check_inputs(self.config, x, reference, rendering)
        n, _, height, width = x.shape
        zeros = torch.zeros(n, 2, height, width, device=x.device)
        return SDANOutput(self.zoom_at(x, zeros, rendering), reference, torch.ones_like(zeros[:, :1]), zeros)

    def find_offset(self, x: Tensor, reference: Tensor) -> Tensor:
        """As SDAN.find_offset: no channels, because this network has no offsets."""
        return x.new_empty((x.shape[0], 0, *x.shape[2:]))

    def zoom_at(self, x: Tensor, offset: Tensor, rendering: Tensor | None = None) -> Tensor:
        """As SDAN.zoom_at; the offset has no effect."""
        zoomed = as_picture(self.super_resolution(F.relu(self.head(x))))
        if self.config.skip == "rendering":
            assert rendering is not None  # by check_inputs
            zoomed = zoomed + bicubic(rendering, self.config.scale)
        return zoomed

    @property
    def offset_channels(self) -> int:
        """As SDAN.offset_channels."""
        return 0


Network = SDAN | SRResNet
"""The networks that can be trained, stored in a checkpoint and used for zooming."""
