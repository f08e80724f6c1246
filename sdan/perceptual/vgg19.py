"""VGG-19 features for the losses that compare features instead of pixels.

The weights are torchvision's (IMAGENET1K_V1), from a file that the user names or from torchvision's cache or download.
Without them these losses raise an error; random weights are never used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sdan.perceptual.weights import PerceptualError, check_weights, first_line, read_state_dict

STAGES = ((64, 64), (128, 128), (256, 256))
"""Output channels of the convolutions up to conv3_2, by stage; a 2x2 max pool separates the stages."""
TAPS = {3: "relu1_2", 8: "relu2_2", 13: "relu3_2"}
"""Index in torchvision's vgg19().features -> name of the feature map."""
MIN_PX = 8
"""Smallest image side: relu3_2 then has 2x2 points."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VGG19Features(nn.Module):
    """VGG-19 up to relu3_2, frozen.

    Args:
        weights: torchvision's vgg19 state dict, or the part of it that `load_vgg19` returns.

    Raises:
        PerceptualError: missing names, other shapes, or values that are not finite.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.features = _layers()
        expected = self.state_dict()
        check_weights(weights, expected, "torchvision's vgg19")
        self.load_state_dict({name: weights[name] for name in expected})
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).reshape(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Compute the feature maps, in float32 even under autocast.

        Args:
            image: [B,3,H,W], RGB in [0, 1].

        Returns:
            the names in TAPS -> [B,C,h,w] at 1, 1/2 and 1/4 of the image's size.
        """
        with torch.autocast(image.device.type, enabled=False):
            values = (image.float() - self.mean) / self.deviation
            maps = {}
            for index, layer in enumerate(self.features):
                values = layer(values)
                if index in TAPS:
                    maps[TAPS[index]] = values
            return maps


def _layers() -> nn.Sequential:
    """torchvision's vgg19().features[:14], without the other 140 million weights."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, widths in enumerate(STAGES):
        layers += [nn.MaxPool2d(2)] if stage else []
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(*layers)


def load_vgg19(path: str | Path | None = None) -> dict[str, Tensor]:
    """Load the weights for VGG19Features (4.6 MB), on the CPU.

    Args:
        path: a torchvision vgg19 state dict, .safetensors or .pth; None: torchvision's cache or download.

    Raises:
        PerceptualError: the weights cannot be read or downloaded, or belong to another network.
    """
    stored = _download() if path is None else read_state_dict(Path(path), _origin(path), _remedy())
    try:
        names = [name for name in _layers().state_dict(prefix="features.") if name in stored]
        kept = {name: stored[name].float().clone() for name in names}
        VGG19Features(kept)
    except (PerceptualError, AttributeError) as error:
        raise PerceptualError(f"{_origin(path)}: {error}; {_remedy()}") from error
    return kept


def _download() -> Mapping[str, Tensor]:
    from torchvision.models import VGG19_Weights  # `import sdan` must not need torchvision

    try:
        return VGG19_Weights.IMAGENET1K_V1.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except Exception as error:  # no network, another hash, a damaged file in the cache
        raise PerceptualError(f"{_origin(None)}: expected weights, got {first_line(error)}; {_remedy()}") from error


def _origin(path: Path | str | None) -> str:
    if path is not None:
        return f"--vgg-weights {path}"
    return f"VGG-19 weights, torchvision's copy in {Path(torch.hub.get_dir()) / 'checkpoints'}"


def _remedy() -> str:
    from torchvision.models import VGG19_Weights

    return (
        f"download {VGG19_Weights.IMAGENET1K_V1.url} and pass it with --vgg-weights PATH, "
        "or set loss.perceptual_weight, loss.contextual_weight and loss.cobi_vgg_weight to 0"
    )
