"""Features of a shift-tolerant VGG-16, for the losses that compare features where VGG-19's weights are not at hand.

The package `stlpips-pytorch` ships the weights (59 MB), of which 4.6 MB are used. Each 2x2 max pool has
stride 1, and a binomial filter precedes the subsampling, as in ST-LPIPS. Only the weight file is read; the package is
never imported. Random weights are never used.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdan.perceptual.st_lpips import halve, load_packaged
from sdan.perceptual.weights import check_weights

WEIGHTS = "weights/vST0.0/vgg_shift_tolerant.pth"
"""The weight file inside the package."""
STAGES = {
    "relu1_2": ("net.slice1.0", "net.slice1.2"),
    "relu2_2": ("net.slice2.6", "net.slice2.8"),
    "relu3_2": ("net.slice3.12", "net.slice3.14"),
}
"""Name of a feature map -> the convolutions, by their names in the file, that lead to it from the map before."""
CHANNELS = (64, 128, 256)
"""Channels of each stage."""
MEAN_SQUARES = {"relu1_2": 0.0063, "relu2_2": 0.0029, "relu3_2": 0.0052}
"""Mean square of each map's values over photographs: the means of the central 512 x 512 px of 12 City100 pictures."""
SCALING = ("scaling_layer.shift", "scaling_layer.scale")


class VGG16Features(nn.Module):
    """The shift-tolerant VGG-16 up to relu3_2, frozen.

    Args:
        weights: what `load_vgg16` returns.

    Raises:
        PerceptualError: missing names, other shapes, or values that are not finite.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        check_weights(weights, _expected(), "stlpips-pytorch's vgg_shift_tolerant")
        # Shift and scale are for pictures in [-1, 1].
        self.register_buffer("shift", weights[SCALING[0]].float(), persistent=False)
        self.register_buffer("scale", weights[SCALING[1]].float(), persistent=False)
        self.stages = nn.ModuleList(_stage(weights, names) for names in STAGES.values())
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Compute the feature maps, in float32 even under autocast.

        Args:
            image: [B,3,H,W], RGB in [0, 1], at least 8 pixels on each side.

        Returns:
            the names in STAGES -> [B,C,h,w] at about 1, 1/2 and 1/4 of the image's size: a map of side n is followed by
            one of side n // 2 + 1. Each is divided by the root of its MEAN_SQUARES: as they are, the values are so
            small that the papers' loss weights, chosen for VGG-19's values of about 1, would have no effect.
        """
        with torch.autocast(image.device.type, enabled=False):
            values = (2 * image.float() - 1 - self.shift) / self.scale
            maps: dict[str, Tensor] = {}
            for name, stage in zip(STAGES, self.stages, strict=True):
                if maps:
                    values = halve(F.max_pool2d(values, 2, stride=1))
                values = stage(values)
                maps[name] = values / MEAN_SQUARES[name] ** 0.5
            return maps


def _stage(weights: Mapping[str, Tensor], names: tuple[str, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for name in names:
        features, channels = weights[f"{name}.weight"].shape[:2]
        convolution = nn.Conv2d(channels, features, 3, padding=1)
        convolution.load_state_dict({part: weights[f"{name}.{part}"] for part in ("weight", "bias")})
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers)


def _expected() -> dict[str, Tensor]:
    """Name -> a tensor of the expected shape, without memory."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(SCALING, (1, 3, 1, 1))
    before = 3
    for names, features in zip(STAGES.values(), CHANNELS, strict=True):
        for name in names:
            shapes |= {f"{name}.weight": (features, before, 3, 3), f"{name}.bias": (features,)}
            before = features
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def load_vgg16() -> dict[str, Tensor]:
    """Load the weights for VGG16Features from the installed package, onto the CPU.

    Raises:
        PerceptualError: the package is not installed, or its file is damaged.
    """
    expected = _expected()
    stored = load_packaged("VGG16", WEIGHTS, expected)
    return {name: stored[name].float().clone() for name in expected}
