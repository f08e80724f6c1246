"""The pyramid: an offset learner that compares pictures, coarse to fine (ours; the idea of PWC-Net, Sun et al. 2018).

Features of x and of the reference are compared on grids from coarse to fine. On each, the features of x are moved by
the offset so far and compared with the reference's in a window; a few convolutions turn the similarities into a
correction. The offset is then enlarged for the next grid.

The convolutions see similarities and the offset so far, never the reference's own features, and the finest offsets have
half of x's resolution. So the offsets cannot carry the reference's picture, except through where they point.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdan.resample import enlarge_offset, sample

RADIUS = 4
"""Similarities are computed for displacements of up to this many pixels of each grid."""
CHANNELS = (32, 48, 64, 96)
"""Channels of the features on the grids of 1/2, 1/4, 1/8 and 1/16 of x's size; the last also on coarser ones."""
CONTRAST_PX = 16
"""The pictures' local mean and contrast are taken over windows that reach this many pixels of x."""


class PyramidOffsetLearner(nn.Module):
    """(x, reference) -> offsets [N, 2, H, W] = (dy, dx) in pixels of x, float32 even under autocast; zero at first.

    Any H and W; no value depends on the size of the input, away from its borders.
    """

    offset_channels = 2

    def __init__(self, channels: int, max_shift: int) -> None:
        """Args:
        channels: of x.
        max_shift: the largest shift wanted, pixels of x; the coarsest window covers twice as much.
        """
        super().__init__()
        stages = max(2, -(-2 * max_shift // RADIUS) - 1).bit_length()
        widths = [CHANNELS[min(stage, len(CHANNELS) - 1)] for stage in range(stages)]
        self.stride = 2**stages
        self.input_features = _stages(channels, widths)
        self.reference_features = _stages(3, widths)
        self.heads = nn.ModuleList(_head() for _ in range(stages))

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            height, width = x.shape[-2:]
            mine = _pyramid(self.input_features, self._prepared(x))
            theirs = _pyramid(self.reference_features, self._prepared(reference))
            offset = mine[-1].new_zeros(x.shape[0], 2, *mine[-1].shape[-2:])
            for own, other, head in zip(reversed(mine), reversed(theirs), reversed(self.heads), strict=True):
                if offset.shape[-1] != own.shape[-1]:
                    offset = enlarge_offset(offset, 2)
                moved = sample(own, offset.detach())
                offset = offset + head(torch.cat((cost_volume(moved, other), offset), dim=1))
            return enlarge_offset(offset, 2)[:, :, :height, :width]

    def _prepared(self, picture: Tensor) -> Tensor:
        """The picture without local brightness and contrast, its sides multiples of the coarsest grid's stride."""
        height, width = picture.shape[-2:]
        padding = (0, -width % self.stride, 0, -height % self.stride)
        return F.pad(_normalised(picture.float()), padding)


def cost_volume(features: Tensor, reference: Tensor) -> Tensor:
    """Similarity of reference(p) with features(p + d), d within RADIUS: [N, (2 RADIUS + 1)^2, H, W] in [-1, 1].

    Each similarity is the cosine between vectors of channels from which their local mean was subtracted; 0 where p + d
    is outside. Displacements are in row-major order, from (-RADIUS, -RADIUS).
    """
    side = 2 * RADIUS + 1
    n, _, height, width = features.shape
    a, b = _directions(features), _directions(reference)
    windows = F.pad(a, (RADIUS,) * 4).unfold(2, side, 1).unfold(3, side, 1)
    cost = torch.einsum("nchw,nchwij->nijhw", b, windows)
    return cost.reshape(n, side * side, height, width)


def _directions(features: Tensor) -> Tensor:
    """The features without their local mean, as vectors of length 1 over the channels."""
    return F.normalize(features - _local_mean(features, RADIUS), dim=1, eps=1e-4)


def _normalised(picture: Tensor) -> Tensor:
    """(picture - local mean) / local standard deviation, each channel by itself."""
    centred = picture - _local_mean(picture, CONTRAST_PX)
    return centred / (_local_mean(centred.square(), CONTRAST_PX) + 1e-5).sqrt()


def _local_mean(picture: Tensor, reach: int) -> Tensor:
    return F.avg_pool2d(picture, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)


def _stages(channels: int, widths: list[int]) -> nn.ModuleList:
    """Each halves the size; the first sees whole cells of a mosaic."""
    stages = nn.ModuleList()
    for width in widths:
        stages.append(
            nn.Sequential(
                nn.Conv2d(channels, width, 4, stride=2, padding=1),
                nn.LeakyReLU(0.1),
                nn.Conv2d(width, width, 3, padding=1),
                nn.LeakyReLU(0.1),
            )
        )
        channels = width
    return stages


def _pyramid(stages: nn.ModuleList, picture: Tensor) -> list[Tensor]:
    features = []
    for stage in stages:
        picture = stage(picture)
        features.append(picture)
    return features


def _head() -> nn.Sequential:
    """(similarities, offset so far) -> a correction of the offset, in pixels of the grid; zero at first."""
    last = nn.Conv2d(64, 2, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    inputs = (2 * RADIUS + 1) ** 2 + 2
    first, second = nn.Conv2d(inputs, 96, 3, padding=1), nn.Conv2d(96, 64, 3, padding=1)
    return nn.Sequential(first, nn.LeakyReLU(0.1), second, nn.LeakyReLU(0.1), last)
