"""The feature network of the losses perceptual, CX and CoBi: VGG-19, or VGG16 where VGG-19's weights are not at hand.

The paper uses VGG-19. Scores of runs with one network cannot be compared with those of runs with the other: each run
and each table names its network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sdan.perceptual.vgg16 import STAGES, VGG16Features, load_vgg16
from sdan.perceptual.vgg19 import VGG19Features, load_vgg19
from sdan.perceptual.weights import PerceptualError

VGG19, VGG16 = "VGG19", "VGG16"
"""The names of the networks in tables and runs."""
FeatureNetwork = VGG19Features | VGG16Features


def load_features(path: str | Path | None = None) -> dict[str, Tensor]:
    """Load the weights of the feature network, on the CPU.

    Args:
        path: a torchvision vgg19 state dict, .safetensors or .pth. None: VGG-19 from torchvision's cache or download,
            else VGG16 from the package stlpips-pytorch.

    Raises:
        PerceptualError: the file that was named cannot be used; or neither network's weights are there.
    """
    try:
        return load_vgg19(path)
    except PerceptualError as no_vgg19:
        if path is not None:
            raise
        try:
            return load_vgg16()
        except PerceptualError as no_vgg16:
            raise PerceptualError(f"{no_vgg19}; or {no_vgg16}") from no_vgg16


def network_name(weights: Mapping[str, Tensor]) -> str:
    """VGG19 or VGG16: the network whose weights `load_features` returned."""
    first = STAGES["relu1_2"][0]
    return VGG16 if f"{first}.weight" in weights else VGG19


def feature_network(weights: Mapping[str, Tensor]) -> FeatureNetwork:
    """The network of these weights, frozen.

    Raises:
        PerceptualError: as the networks.
    """
    return VGG16Features(weights) if network_name(weights) == VGG16 else VGG19Features(weights)
