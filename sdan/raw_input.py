"""Convert sensor counts to the network's input, and between the layouts of RAW and of RGB.

mosaic: [N, 1, 2h, 2w], one value per photosite, as in the released code.
packed: [N, 4, h, w], channels R, G1, G2, B of one RGGB cell (R G1 / G2 B).
packed RGB: [N, 12, h, w], the four pixels of a 2x2 cell in reading order, all of red, then of green, then of blue.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Photo(Protocol):
    """A decoded RAW file, as `preprocessing.raw.decode.load` returns it; channels in the order R, G1, G2, B."""

    @property
    def packed(self) -> Any:
        """numpy uint16 [4, h, w], sensor counts."""

    @property
    def black_level(self) -> Any:
        """numpy float32 [4], counts."""

    @property
    def white_level(self) -> float:
        """Counts."""

    @property
    def wb(self) -> Any:
        """numpy float32 [4], white-balance gains, green = 1."""

    @property
    def rendering(self) -> Any:
        """numpy uint8 [2h, 2w, 3]; primaries of sRGB, encoded with the curve that the photo was loaded with."""


def from_photo(photo: Photo) -> tuple[Tensor, Tensor]:
    """Convert a decoded RAW photo to the inputs of `sdan.zoom`.

    Returns:
        raw, float32 [4, h, w] in [0, 1] (packed), and rendering, float32 [3, 2h, 2w] in [0, 1].

    Raises:
        ValueError: a white level that is not above the black level.
    """
    raw = normalise(
        torch.from_numpy(photo.packed)[None],
        torch.from_numpy(photo.black_level)[None],
        torch.tensor([photo.white_level]),
        torch.from_numpy(photo.wb)[None],
    )[0]
    return raw, torch.from_numpy(photo.rendering).permute(2, 0, 1).float().div_(255)


def normalise(packed_N4HW: Tensor, black_N4: Tensor, white_N: Tensor, wb_N4: Tensor) -> Tensor:
    """Convert sensor counts to white-balanced values in [0, 1].

    The released code leaves the input unbalanced and divides the *target* by the gains. Balancing the input instead
    keeps the target as the camera shot it.

    Args:
        packed_N4HW: sensor counts, any integer or float dtype, channels R, G1, G2, B.
        black_N4: black level of each channel, counts.
        white_N: white level, counts.
        wb_N4: white-balance gain of each channel, green = 1.

    Returns:
        float32 [N, 4, H, W], clipped to [0, 1].

    Raises:
        ValueError: shapes that do not match, or a white level that is not above the black level.
    """
    n = packed_N4HW.shape[0]
    shapes = [tuple(t.shape) for t in (packed_N4HW, black_N4, white_N, wb_N4)]
    if packed_N4HW.dim() != 4 or packed_N4HW.shape[1] != 4 or shapes[1:] != [(n, 4), (n,), (n, 4)]:
        raise ValueError(f"RAW: expected packed [N,4,H,W], black [N,4], white [N], wb [N,4], got {shapes}")
    black = black_N4.float()[:, :, None, None]
    span = white_N.float()[:, None, None, None] - black
    if n and float(span.min()) <= 0:
        raise ValueError(f"white level: expected more than the black level {black_N4.tolist()}, got {white_N.tolist()}")
    gain = wb_N4.float()[:, :, None, None] / span
    return (packed_N4HW.float() - black).mul_(gain).clamp_(0, 1)


def packed_to_mosaic(packed_N4HW: Tensor) -> Tensor:
    """[N, 4, h, w] (R, G1, G2, B) -> [N, 1, 2h, 2w]; any dtype."""
    if packed_N4HW.dtype == torch.uint16:  # pixel_shuffle has no uint16 kernel; it only moves values
        return F.pixel_shuffle(packed_N4HW.view(torch.int16), 2).view(torch.uint16)
    return F.pixel_shuffle(packed_N4HW, 2)


def mosaic_to_packed(mosaic_N1HW: Tensor) -> Tensor:
    """[N, 1, 2h, 2w] with R at (0, 0) -> [N, 4, h, w] (R, G1, G2, B); any dtype."""
    if mosaic_N1HW.dtype == torch.uint16:
        return F.pixel_unshuffle(mosaic_N1HW.view(torch.int16), 2).view(torch.uint16)
    return F.pixel_unshuffle(mosaic_N1HW, 2)


def rgb_to_packed(image_N3HW: Tensor) -> Tensor:
    """[N, 3, 2h, 2w] -> [N, 12, h, w], the input of a network with input="packed_rgb"."""
    return F.pixel_unshuffle(image_N3HW, 2)


def rendering_from_srgb(image_3HW: Tensor, curve: str) -> Tensor:
    """Encode an sRGB picture with a model's rendering curve (SDANConfig.rendering_curve).

    Args:
        image_3HW: sRGB in [0, 1].
        curve: srgb (returns the picture itself) or bt709.

    Returns:
        float32 [3, H, W] in [0, 1].
    """
    image = image_3HW.float()
    if curve == "srgb":
        return image
    linear = _srgb_to_linear(image)
    return torch.where(linear < 0.018, 4.5 * linear, 1.099 * linear.clamp_min(0.018) ** 0.45 - 0.099)


def mosaic_from_srgb(image_N3HW: Tensor) -> Tensor:
    """Make a synthetic mosaic from a picture without RAW: linearise it and sample one colour per photosite.

    The camera's colour matrix and tone curve are not undone, since a JPG does not contain them.

    Args:
        image_N3HW: sRGB in [0, 1], even H and W.

    Returns:
        float32 [N, 4, H/2, W/2] (R, G1, G2, B) in [0, 1].
    """
    linear = _srgb_to_linear(image_N3HW.float())
    planes = (linear[:, 0, ::2, ::2], linear[:, 1, ::2, 1::2], linear[:, 1, 1::2, ::2], linear[:, 2, 1::2, 1::2])
    return torch.stack(planes, dim=1)


def _srgb_to_linear(image: Tensor) -> Tensor:
    """sRGB's curve (IEC 61966-2-1), encoded -> linear, float32 in [0, 1]."""
    return torch.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)
