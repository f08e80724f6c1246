"""The network that zooms photographs: tensors in, tensors out.

    import sdan
    from preprocessing.raw import decode

    model = sdan.load("starter")
    photo = decode.load("PHOTO.ARW", curve=model.config.rendering_curve)
    raw, rendering = sdan.raw_input.from_photo(photo)
    zoomed = sdan.zoom(model, raw, rendering)  # [3, 4H, 4W], float32 in [0, 1]

Importing this package needs torch and safetensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from sdan import checkpoint, inference, raw_input
from sdan.baselines import Network
from sdan.metrics import check_pixels
from sdan.network import SDAN, SDANConfig
from sdan.ops import squared_deform_conv2d

__all__ = [
    "SDAN",
    "STARTER",
    "STARTERS",
    "STARTER_RGB",
    "SDANConfig",
    "load",
    "raw_input",
    "squared_deform_conv2d",
    "starter_folder",
    "zoom",
    "zoom_rows",
]

STARTER, STARTER_RGB = "starter", "starter-rgb"
STARTERS = (STARTER, STARTER_RGB)
"""The models that are installed with the package, for RAW and for RGB; `load` takes these names."""


def load(model: str | Path) -> Network:
    """Load a trained model, ready for `zoom`.

    Args:
        model: "starter" or "starter-rgb" (the models for RAW and for RGB that come with the package), or a checkpoint
            folder.

    Returns:
        the network in eval mode, on the GPU if there is one. `model.config` is its SDANConfig;
        `model.input_tile_px` is the tile size that `zoom` uses, in pixels of the network's input.

    Raises:
        CheckpointError: the folder is missing or holds no usable checkpoint; one line that says what to do.
    """
    folder = starter_folder(str(model)) if model in STARTERS else Path(model)
    return checkpoint.load(folder).model.to("cuda" if torch.cuda.is_available() else "cpu")


def zoom(
    model: Network,
    raw: Tensor,
    rendering: Tensor,
    *,
    precision: str = "auto",
    strength: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Zoom one photo by `model.config.scale`. Its own rendering is the reference; no target is needed.

    Args:
        model: from `load`.
        raw: [4,h,w] packed RAW in [0, 1], as `raw_input.from_photo` returns it; for a model of RGB input the
            rendering itself.
        rendering: [3,2h,2w] in [0, 1], rendered from the same RAW with the curve `model.config.rendering_curve`.
        precision: auto, fp32, bf16 or fp16.
        strength: 1 for the network's output, 0 for the rendering enlarged bicubically, between them a linear mixture.
        progress: called with (tiles done, total tiles).

    Returns:
        float32 [3, scale 2h, scale 2w] in [0, 1], on the CPU, in the orientation of `raw`.

    Raises:
        ValueError: shapes that do not match each other or the model, values that are not in [0, 1], or a model without
            a tile size.
    """
    x, input_tile_px = _network_input(model, raw, rendering)
    return inference.zoom(
        model, x, rendering, input_tile_px=input_tile_px, precision=precision, strength=strength, progress=progress
    )


def zoom_rows(
    model: Network,
    raw: Tensor,
    rendering: Tensor,
    *,
    bits: int | None = None,
    precision: str = "auto",
    strength: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """As `zoom`, but yields the result in parts, from top to bottom, so that it need not fit into memory.

    Args:
        bits: None for float32 in [0, 1]; 8 for levels as uint8, 16 as uint16.

    Yields:
        [3, pixel rows, scale 2w] on the CPU, channels-last in memory as image files are.

    Raises:
        ValueError: as `zoom`, at once.
    """
    x, input_tile_px = _network_input(model, raw, rendering)
    return inference.zoom_rows(
        model,
        x,
        rendering,
        input_tile_px=input_tile_px,
        precision=precision,
        bits=bits,
        strength=strength,
        progress=progress,
    )


def _network_input(model: Network, raw: Tensor, rendering: Tensor) -> tuple[Tensor, int]:
    """(raw as the model's input x, the model's tile size); raises ValueError, also for a wrong rendering."""
    if model.input_tile_px is None:
        raise ValueError(
            "model: expected a model from sdan.load, got one without input_tile_px; set model.input_tile_px"
        )
    for name, picture in (("raw", raw), ("rendering", rendering)):
        check_pixels(f"zoom, {name}", picture, finite=True)
    channels = 3 if model.config.is_rgb else 4
    if raw.dim() != 3 or raw.shape[0] != channels:
        raise ValueError(f"raw: expected [{channels},h,w] for input={model.config.input!r}, got {tuple(raw.shape)}")
    x = raw
    if model.config.input == "mosaic":
        x = raw_input.packed_to_mosaic(raw[None])[0]
    elif model.config.input == "packed_rgb":
        if raw.shape[1] % 2 or raw.shape[2] % 2:
            raise ValueError(
                f"raw: expected even height and width, for cells of 2x2 pixels, got {tuple(raw.shape[1:])}"
            )
        x = raw_input.rgb_to_packed(raw[None])[0]
    return x, model.input_tile_px


def starter_folder(name: str = STARTER) -> Path:
    """Locate a starter model, which is package data of `pipelines`, without importing that package."""
    found = find_spec("pipelines")
    folders = [Path(place) / "models" / name for place in (found and found.submodule_search_locations) or ()]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise checkpoint.CheckpointError(
        f"{name}: expected the model in the installed package `pipelines`, got none; "
        "install sdan again or name a checkpoint folder"
    )
