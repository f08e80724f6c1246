"""The pyramid: an offset learner that compares pictures, coarse to fine (ours; the idea of PWC-Net, Sun et al. 2018).

Features of x and of the reference, by the same weights, are compared on grids from coarse to fine. On each, the
features of x are moved by the offset so far and compared with the reference's in a window of displacements. The
similarities are averaged over a wide neighbourhood, because the motion between two frames is smooth; their centre of
mass corrects the offset, and a few convolutions correct it further. The offset is then enlarged for the next grid.

The convolutions see averaged similarities and the offset so far, never the reference's own features, and the offsets
have half of the finest grid's resolution. So the offsets cannot carry the reference's picture, except through where
they point.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdan.ops import offset_mask
from sdan.raw_input import mosaic_to_packed
from sdan.resample import enlarge_offset, low_pass, sample

CHANNELS = (24, 32, 48, 64)
"""Channels of the features on the grids of 1/1, 1/2, 1/4 and 1/8 of the compared pictures; the last also on coarser."""
RADII = (2, 4)
"""Similarities are computed for displacements of up to this many pixels of the finest grid, and of the others."""
REACHES = (6, 8)
"""Similarities are averaged over windows that reach this many offsets of the finest grid, and of the others."""
ROUNDS = 2
"""Corrections by the centre of mass on each grid."""
SHARPNESS = 8.0
"""Initial factor of the similarities before their softmax; it is learnt for each grid. A large one would round the
centre of mass to whole pixels."""
CONTRAST_PX = 8
"""The pictures' local mean and contrast are taken over windows that reach this many pixels."""
FEATURE_MEAN_PX = 4
"""Features are compared without their mean over windows that reach this many pixels of each grid."""


class PyramidOffsetLearner(nn.Module):
    """(x, reference) -> offsets [N, 2, H, W] = (dy, dx) in pixels of x, float32 even under autocast.

    Any H and W; no value depends on the size of the input, away from its borders.
    """

    def __init__(self, layout: str, max_shift: int) -> None:
        """Args:
        layout: of x (network.Input).
        max_shift: the largest shift wanted, pixels of x; the coarsest window covers at least that.
        """
        super().__init__()
        self.layout, self.shrink = layout, 2 if layout == "mosaic" else 1
        reach = -(-max_shift // (self.shrink * RADII[1]))
        count = max(2, 1 + (reach - 1).bit_length())
        self.stride = 2**count
        self.features = _stages([CHANNELS[min(stage, len(CHANNELS) - 1)] for stage in range(count)])
        self.radii = [RADII[min(stage, 1)] for stage in range(count)]
        self.heads = nn.ModuleList(_head(radius) for radius in self.radii)
        self.sharpness = nn.Parameter(torch.full((count,), SHARPNESS))

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            height, width = x.shape[-2:]
            pictures = torch.cat((_colours(x.float(), self.layout), low_pass(reference.float(), self.shrink)))
            pyramid = self._pyramid(self._padded(_normalised(pictures)))
            mine, theirs = zip(*(features.chunk(2) for features in pyramid), strict=True)
            coarsest = mine[-1].shape
            offset = mine[-1].new_zeros(x.shape[0], 2, coarsest[-2] // 4, coarsest[-1] // 4)
            for stage in reversed(range(len(mine))):
                offset = enlarge_offset(offset, 2)
                for number in range(ROUNDS):
                    # The last round teaches the features; gradients of the others would double a step's cost.
                    with torch.set_grad_enabled(torch.is_grad_enabled() and number == ROUNDS - 1):
                        cost, centre = self._compare(stage, mine[stage], theirs[stage], offset.detach())
                    offset = offset + 0.5 * centre  # the offsets' grid is half as dense as the features'
                offset = offset + self.heads[stage](torch.cat((cost, centre, offset), dim=1))
            return enlarge_offset(offset, 2 * self.shrink)[:, :, :height, :width]

    def _pyramid(self, picture: Tensor) -> list[Tensor]:
        features = []
        for stage in self.features:
            picture = stage(picture)
            features.append(picture)
        return features

    def _compare(self, stage: int, mine: Tensor, theirs: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """(averaged similarities, their centre of mass) at half the features' size, [N, ., h/2, w/2].

        The centre is in pixels of the features. Points outside the picture do not count.
        """
        radius, reach = self.radii[stage], REACHES[min(stage, 1)]
        fine = enlarge_offset(offset, 2)
        inside = _windows(offset_mask(fine), radius).flatten(1, 3)
        cost = low_pass(cost_volume(sample(mine, fine), theirs, radius) * inside, 2)
        # The small constant takes weight from displacements that hardly any point has.
        cost = _local_mean(cost, reach) / (_local_mean(low_pass(inside, 2), reach) + 0.05)
        return cost, centre_of_mass(cost, self.sharpness[stage], radius)

    def _padded(self, picture: Tensor) -> Tensor:
        """The picture with sides that are multiples of twice the coarsest grid's stride."""
        height, width = picture.shape[-2:]
        return F.pad(picture, (0, -width % (2 * self.stride), 0, -height % (2 * self.stride)))


def cost_volume(features: Tensor, reference: Tensor, radius: int) -> Tensor:
    """Similarity of reference(p) with features(p + d), d within radius: [N, (2 radius + 1)^2, H, W] in [-1, 1].

    Each similarity is the cosine between vectors of channels from which their local mean was subtracted; 0 where p + d
    is outside. Displacements are in row-major order, from (-radius, -radius).
    """
    side = 2 * radius + 1
    n, _, height, width = features.shape
    a, b = _directions(features), _directions(reference)
    cost = torch.einsum("nchw,ncijhw->nijhw", b, _windows(a, radius))
    return cost.reshape(n, side * side, height, width)


def _windows(picture: Tensor, radius: int) -> Tensor:
    """The values at every displacement within radius, 0 outside: [N, C, rows, columns of the window, H, W]."""
    side = 2 * radius + 1
    windows = F.pad(picture, (radius,) * 4).unfold(2, side, 1).unfold(3, side, 1)
    return windows.permute(0, 1, 4, 5, 2, 3)


def centre_of_mass(cost: Tensor, sharpness: Tensor, radius: int) -> Tensor:
    """The mean displacement, weighted by softmax(sharpness . similarity): [N, 2, H, W]; 0 where all are alike."""
    steps = torch.arange(-radius, radius + 1, device=cost.device, dtype=cost.dtype)
    weights = (sharpness * cost).softmax(1).unflatten(1, (2 * radius + 1, 2 * radius + 1))
    rows = torch.einsum("nijhw,i->nhw", weights, steps)
    columns = torch.einsum("nijhw,j->nhw", weights, steps)
    return torch.stack((rows, columns), 1)


def _colours(x: Tensor, layout: str) -> Tensor:
    """x as RGB, one pixel for each cell of a mosaic."""
    if layout == "mosaic":
        x = mosaic_to_packed(x)
    if layout in ("mosaic", "packed"):
        return torch.stack((x[:, 0], (x[:, 1] + x[:, 2]) / 2, x[:, 3]), 1).clamp_min(0).sqrt()
    return x.unflatten(1, (3, 4)).mean(2) if layout == "packed_rgb" else x


def _directions(features: Tensor) -> Tensor:
    """The features without their local mean, as vectors of length 1 over the channels."""
    return F.normalize(features - _local_mean(features, FEATURE_MEAN_PX), dim=1, eps=1e-4)


def _normalised(picture: Tensor) -> Tensor:
    """(picture - local mean) / local standard deviation, each channel by itself."""
    centred = picture - _local_mean(picture, CONTRAST_PX)
    return centred / (_local_mean(centred.square(), CONTRAST_PX) + 1e-5).sqrt()


def _local_mean(picture: Tensor, reach: int) -> Tensor:
    """Mean of the window of (2 reach + 1)^2 pixels, of those inside the picture; along one axis, then the other."""
    if reach >= max(picture.shape[-2:]) - 1:  # every window is the whole picture
        return picture.mean((2, 3), keepdim=True).expand_as(picture)
    side = 2 * reach + 1
    columns = F.avg_pool2d(picture, (side, 1), stride=1, padding=(reach, 0), count_include_pad=False)
    return F.avg_pool2d(columns, (1, side), stride=1, padding=(0, reach), count_include_pad=False)


def _stages(widths: list[int]) -> nn.ModuleList:
    """The first keeps the picture's size, each other halves it."""
    stages, channels = nn.ModuleList(), 3
    for number, width in enumerate(widths):
        first = nn.Conv2d(channels, width, 3, padding=1) if number == 0 else nn.Conv2d(channels, width, 4, 2, padding=1)
        stages.append(nn.Sequential(first, nn.LeakyReLU(0.1), nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.1)))
        channels = width
    return stages


def _head(radius: int) -> nn.Sequential:
    """(similarities, their centre of mass, offset so far) -> a correction, pixels of the grid; zero at first."""
    last = nn.Conv2d(32, 2, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    first, second = nn.Conv2d((2 * radius + 1) ** 2 + 4, 64, 3, padding=1), nn.Conv2d(64, 32, 3, padding=1)
    return nn.Sequential(first, nn.LeakyReLU(0.1), second, nn.LeakyReLU(0.1), last)
