"""ST-LPIPS: a learnt distance between pictures that a shift of a few pixels hardly changes (Ghildyal and Liu 2022).

LPIPS with an AlexNet that does not alias: its convolutions and poolings have stride 1, and a binomial filter precedes
each subsampling. The package `stlpips-pytorch` 0.0.2 (BSD 2-Clause) ships the weights of network and heads. Only that
file is read; the package is never imported, because its modules need IPython and torchsummary. Random weights are never
used.

Cost: 75,000 multiplications for each pixel of a picture, half as many as VGG-19 up to relu3_2. A pair needs twice that,
and its gradient towards one of the pictures the same once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdan.perceptual.weights import PerceptualError, check_weights, read_state_dict

PACKAGE = "stlpips_pytorch"
REQUIREMENT = "stlpips-pytorch==0.0.2"
WEIGHTS = "weights/vST0.0/alex_shift_tolerant.pth"
"""The weight file (9.9 MB) inside the package."""
MIN_PX = 21
"""Smallest picture side: the reflecting padding of the last subsampling then has its 3 points."""
LAYERS = {
    "net.slice1.0": (3, 64, 11, 2),
    "net.slice2.5": (64, 192, 5, 2),
    "net.slice3.9": (192, 384, 3, 1),
    "net.slice4.11": (384, 256, 3, 1),
    "net.slice5.13": (256, 256, 3, 1),
}
"""Name of each convolution in the file -> input channels, output channels, kernel size, zero padding."""
EPSILON = 1e-10
"""Added to the length of a feature vector, as in the package."""


class STLPIPS(nn.Module):
    """The network and its heads, frozen.

    Args:
        weights: the state dict that `load_st_lpips` returns.

    Raises:
        PerceptualError: missing names, other shapes, or values that are not finite.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        check_weights(weights, _expected(), "stlpips-pytorch's alex_shift_tolerant")
        # Shift and scale are for pictures in [-1, 1].
        self.register_buffer("shift", weights["scaling_layer.shift"].float(), persistent=False)
        self.register_buffer("scale", weights["scaling_layer.scale"].float(), persistent=False)
        self.convolutions, self.heads = nn.ModuleList(), nn.ParameterList()
        for number, (name, (channels, features, kernel, padding)) in enumerate(LAYERS.items()):
            convolution = nn.Conv2d(channels, features, kernel, padding=padding)
            convolution.load_state_dict({part: weights[f"{name}.{part}"] for part in ("weight", "bias")})
            self.convolutions.append(convolution)
            self.heads.append(weights[_head(number)].float())
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the distances, in float32 even under autocast.

        Args:
            image, target: [N,3,H,W], RGB in [0, 1], at least MIN_PX on each side.
            mask: [N,1,H,W], 0 to 1; its area mean weights each layer's distances, whose mean stays over all points.

        Returns:
            [N] float32, 0 for equal pictures.

        Raises:
            ValueError: pictures that are too small.
        """
        if min(image.shape[-2:]) < MIN_PX:
            raise ValueError(f"ST-LPIPS: expected at least {MIN_PX}x{MIN_PX} pixels, got {tuple(image.shape[-2:])}")
        with torch.autocast(image.device.type, enabled=False):
            distances = []
            for own, wanted, head in zip(self._maps(image), self._maps(target), self.heads, strict=True):
                distance = F.conv2d((_unit(own) - _unit(wanted)).square(), head)
                if mask is not None:
                    distance = distance * F.interpolate(mask.float(), size=distance.shape[-2:], mode="area")
                distances.append(distance.mean(dim=(1, 2, 3)))
            return torch.stack(distances).sum(0)

    def _maps(self, picture: Tensor) -> list[Tensor]:
        """The features of each layer: [N,C,h,w] at 1/2, 1/4, 1/8, 1/8 and 1/8 of the picture's size."""
        first, second, third, *rest = self.convolutions
        maps = [F.relu(halve(first((2 * picture.float() - 1 - self.shift) / self.scale)))]
        for convolution in (second, third):
            maps.append(F.relu(convolution(halve(F.max_pool2d(maps[-1], 3, stride=1)))))
        for convolution in rest:
            maps.append(F.relu(convolution(maps[-1])))
        return maps


def halve(values: Tensor) -> Tensor:
    """Blur [N,C,H,W] by the binomial filter, (1, 2, 1) / 4 in both directions, then keep every second row and column.

    Reflecting padding of 2 on each side: a side of n becomes (n + 1) // 2 + 1.
    """
    channels = values.shape[1]
    taps = torch.tensor([0.25, 0.5, 0.25], device=values.device, dtype=values.dtype)
    padded = F.pad(values, (2, 2, 2, 2), mode="reflect")
    return F.conv2d(padded, torch.outer(taps, taps).expand(channels, 1, 3, 3), stride=2, groups=channels)


def _unit(values: Tensor) -> Tensor:
    """Feature vectors of length 1. A vector of zeros stays, with gradient 0; the root alone would give NaN."""
    return values / (values.square().sum(1, keepdim=True).clamp_min(EPSILON**2).sqrt() + EPSILON)


def _head(number: int) -> str:
    return f"lin{number}.model.1.weight"


def _expected() -> dict[str, Tensor]:
    """Name -> a tensor of the expected shape, without memory."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("scaling_layer.shift", "scaling_layer.scale"), (1, 3, 1, 1))
    for number, (name, (channels, features, kernel, _)) in enumerate(LAYERS.items()):
        shapes[f"{name}.weight"] = (features, channels, kernel, kernel)
        shapes[f"{name}.bias"] = (features,)
        shapes[_head(number)] = (1, features, 1, 1)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def load_st_lpips() -> Mapping[str, Tensor]:
    """Read the weights for STLPIPS from the installed package, onto the CPU.

    Raises:
        PerceptualError: the package is not installed, or its file is damaged.
    """
    return load_packaged("ST-LPIPS", WEIGHTS, _expected())


def load_packaged(network: str, file: str, expected: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Read a weight file of the installed package, which is found without importing it, onto the CPU.

    Args:
        network: what messages call it.
        file: its path inside the package.
        expected: name -> a tensor of the shape that the file must have.

    Raises:
        PerceptualError: the package is not installed, or its file is damaged.
    """
    found = find_spec(PACKAGE)
    places = (found and found.submodule_search_locations) or ()
    path = next((Path(place) / file for place in places), None)
    if path is None:
        raise PerceptualError(f"{network}: expected the package stlpips-pytorch, got none; pip install {REQUIREMENT}")
    remedy = f"pip install --force-reinstall {REQUIREMENT}"
    weights = read_state_dict(path, f"{network}: {path}", remedy)
    try:
        check_weights(weights, expected, f"stlpips-pytorch's {path.stem}")
    except PerceptualError as error:
        raise PerceptualError(f"{network}: {path}: {error}; {remedy}") from error
    return weights


@lru_cache(maxsize=4)
def st_lpips_on(device: torch.device) -> STLPIPS:
    """The network on a device, read once.

    Raises:
        PerceptualError: as `load_st_lpips`.
    """
    return STLPIPS(load_st_lpips()).to(device)
