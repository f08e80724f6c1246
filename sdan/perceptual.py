"""VGG-19's features for the losses that compare those instead of pixels: where its weights come from, and the stack.

Weights are torchvision's (IMAGENET1K_V1), from a file that the user names or from torchvision's own download or cache;
without them the losses are refused. Random features are never a stand-in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

STAGES = ((64, 64), (128, 128), (256, 256))
"""Output channels of the convolutions that are used, up to conv3_2; a 2x2 max pool between the stages."""
TAPS = {3: "relu1_2", 8: "relu2_2", 13: "relu3_2"}
"""Place in torchvision's vgg19().features -> name of the feature map."""
LEAST_PX = 8
"""Smallest side that leaves 2x2 points of relu3_2."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PerceptualError(ValueError):
    """VGG-19's weights are not to be had; one line that says what to do."""


class VGG19Features(nn.Module):
    """VGG-19 up to relu3_2, frozen.

    Args:
        weights: a vgg19 state dict, or only what `load_vgg19` keeps of it.

    Raises:
        PerceptualError: other names or shapes, or values that are not finite.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.features = _layers()
        wanted = self.state_dict()
        for name, like in wanted.items():
            got = weights.get(name)
            if got is None or got.shape != like.shape or not got.isfinite().all():
                found = "none" if got is None else f"{tuple(got.shape)}, or values that are not finite"
                raise PerceptualError(
                    f"torchvision's vgg19 state dict expected, with {name} {tuple(like.shape)}, got {found}"
                )
        self.load_state_dict({name: weights[name] for name in wanted})
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).reshape(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Feature maps by the names of TAPS, at 1, 1/2 and 1/4 of the size; float32 whatever autocast is on.

        Args:
            image: [B,3,H,W], RGB in [0, 1].
        """
        with torch.autocast(image.device.type, enabled=False):
            values = (image.float() - self.mean) / self.deviation
            maps = {}
            for place, layer in enumerate(self.features):
                values = layer(values)
                if place in TAPS:
                    maps[TAPS[place]] = values
            return maps


def _layers() -> nn.Sequential:
    """torchvision's vgg19().features[:14], without its 140 million other weights."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, widths in enumerate(STAGES):
        layers += [nn.MaxPool2d(2)] if stage else []
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(*layers)


def load_vgg19(path: str | Path | None = None) -> dict[str, Tensor]:
    """The weights that VGG19Features takes (4.6 MB), on the CPU.

    Args:
        path: a torchvision vgg19 state dict, .safetensors or .pth; None: torchvision's cache or download.

    Raises:
        PerceptualError: they cannot be had, or are another network's.
    """
    stored = _downloaded() if path is None else _read(Path(path))
    try:
        names = [name for name in _layers().state_dict(prefix="features.") if name in stored]
        kept = {name: stored[name].float().clone() for name in names}
        VGG19Features(kept)
    except (PerceptualError, AttributeError) as error:
        raise PerceptualError(f"{_origin(path)}: {error}; {_remedy()}") from error
    return kept


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise PerceptualError(f"{_origin(path)}: cannot be read ({error.strerror or error}); {_remedy()}") from error
    except Exception as error:  # the unpickler trips over other files in many ways
        raise PerceptualError(f"{_origin(path)}: cannot be read ({_first_line(error)}); {_remedy()}") from error
    if not isinstance(stored, Mapping):
        raise PerceptualError(f"{_origin(path)}: a state dict expected, got {type(stored).__name__}; {_remedy()}")
    return stored


def _downloaded() -> Mapping[str, Tensor]:
    from torchvision.models import VGG19_Weights  # it imports half of torchvision

    try:
        return VGG19_Weights.IMAGENET1K_V1.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except Exception as error:  # no network, another hash, a damaged file in the cache
        raise PerceptualError(f"{_origin(None)}: cannot be had ({_first_line(error)}); {_remedy()}") from error


def _origin(path: Path | str | None) -> str:
    if path is not None:
        return f"--vgg-weights {path}"
    return f"VGG-19 weights, through torchvision in {Path(torch.hub.get_dir()) / 'checkpoints'}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]


def _remedy() -> str:
    from torchvision.models import VGG19_Weights

    return (
        f"fetch {VGG19_Weights.IMAGENET1K_V1.url} and name the file with --vgg-weights PATH, "
        "or do without loss.perceptual_weight, loss.contextual_weight and loss.cobi_vgg_weight"
    )
