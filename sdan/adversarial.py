"""Adversarial training as in SRGAN and ESRGAN: the discriminator, its loss, and the generator's term.

The discriminator tells enlarged pictures from real ones; the network that enlarges is trained to be taken for real.
D(y) is the discriminator's logit, s the sigmoid, y a real picture and x an enlarged one.

    standard (Ledig et al. 2017)       generator -log s(D(x));   discriminator -log s(D(y)) and -log(1 - s(D(x)))
    relativistic (Wang et al. 2018)    the same with D(y) - mean D(x) for D(y) and D(x) - mean D(y) for D(x), and the
                                       generator with both terms, real and enlarged exchanged

Departures from both papers: the batch normalisation uses the statistics of the batch at hand always (there is no
evaluation mode), and the two terms of a loss are averaged, not added.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AdversarialKind = Literal["standard", "relativistic"]
MIN_PX = 16
"""Smallest picture side that the discriminator takes."""
_LAST_PX = 4
"""The halvings end before the side falls below this."""
_WIDEST = 8
"""Most channels, as a multiple of the first convolution's."""
_DENSE = 100
_SLOPE = 0.2
"""Of the leaky ReLU below 0."""


class Discriminator(nn.Module):
    """VGG-style: pairs of 3x3 convolutions, the second with stride 2, until the side is 4 to 7; then two dense layers.

    The channels double from pair to pair, from `features` to 8 times that. For a side of 96 these are SRGAN's eight
    convolutions, for 128 ESRGAN's ten.

    Args:
        side_px: side of the square pictures, at least MIN_PX; the dense layers fit it.
        features: channels of the first convolution, 64 in both papers.
    """

    def __init__(self, side_px: int, features: int = 64) -> None:
        super().__init__()
        if side_px < MIN_PX:
            raise ValueError(f"discriminator: expected pictures of at least {MIN_PX} px, got {side_px}")
        self.side_px = side_px
        layers: list[nn.Module] = []
        before, side, stage = 3, side_px, 0
        while side >= 2 * _LAST_PX:
            channels = features * min(2**stage, _WIDEST)
            layers += _block(before, channels, stride=1, norm=stage > 0)
            layers += _block(channels, channels, stride=2, norm=True)
            before, side, stage = channels, -(-side // 2), stage + 1
        self.convolutions = nn.Sequential(*layers)
        self.dense = nn.Sequential(nn.Linear(before * side**2, _DENSE), nn.LeakyReLU(_SLOPE), nn.Linear(_DENSE, 1))

    def forward(self, picture: Tensor) -> Tensor:
        """[N,3,side_px,side_px], RGB in [0, 1], to one logit each, [N]; in float32 even under autocast.

        Raises:
            ValueError: pictures of another size.
        """
        if picture.shape[1:] != (3, self.side_px, self.side_px):
            expected = (3, self.side_px, self.side_px)
            raise ValueError(f"discriminator: expected pictures of shape {expected}, got {tuple(picture.shape[1:])}")
        with torch.autocast(picture.device.type, enabled=False):
            logits: Tensor = self.dense(self.convolutions(2 * picture.float() - 1).flatten(1))
            return logits.flatten()


def _block(channels: int, features: int, *, stride: int, norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(channels, features, 3, stride, padding=1, bias=not norm)]
    layers += [nn.BatchNorm2d(features, track_running_stats=False)] if norm else []
    return [*layers, nn.LeakyReLU(_SLOPE)]


def generator_loss(enlarged: Tensor, real: Tensor, kind: AdversarialKind) -> Tensor:
    """The generator's term, a scalar, from the logits [N] of enlarged and real pictures."""
    if kind == "standard":
        return _taken_for(enlarged, 1.0)
    return (_taken_for(enlarged - real.mean(), 1.0) + _taken_for(real - enlarged.mean(), 0.0)) / 2


def discriminator_loss(enlarged: Tensor, real: Tensor, kind: AdversarialKind) -> Tensor:
    """The discriminator's loss, a scalar, from the logits [N] of enlarged and real pictures."""
    if kind == "standard":
        return (_taken_for(real, 1.0) + _taken_for(enlarged, 0.0)) / 2
    return (_taken_for(real - enlarged.mean(), 1.0) + _taken_for(enlarged - real.mean(), 0.0)) / 2


def _taken_for(logits: Tensor, label: float) -> Tensor:
    """Binary cross entropy: 1 real, 0 enlarged."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))
