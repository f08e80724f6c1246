"""`sdan zoom`: a photograph in, the same photograph `scale` times larger out.

RAW goes through the decoder and the rendering that training used. A JPG or PNG has no RAW: for a model that reads RAW a
mosaic is made from its linearised pixels (said on the console), for an RGB model it is the input itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from pipelines import config as configs
from preprocessing.raw import decode
from sdan import checkpoint, inference, raw_input
from sdan.baselines import Network

PICTURES = (".jpg", ".jpeg", ".png")


class ZoomError(ValueError):
    """A photograph that cannot be read, or an output that cannot be written."""


@dataclass(frozen=True)
class Photo:
    """A photograph as the network takes it, in sensor orientation."""

    x: Tensor
    """[C, h, w] in the model's input layout."""
    rendering: Tensor
    """[3, H, W] in [0, 1]."""
    flip: int
    """LibRaw's code of the rotation that turns it upright."""
    from_raw: bool


def read_photo(path: Path, model_input: str) -> Photo:
    """Read RAW, JPG or PNG for a model whose input is "mosaic", "packed" or "rgb".

    Raises:
        ZoomError, RawError: no such file, not a picture, not a Bayer RAW.
    """
    if not path.is_file():
        raise ZoomError(f"{path}: a photograph expected (RAW, JPG or PNG), got no such file")
    if path.suffix.lower() in PICTURES:
        return _from_picture(path, model_input)
    if model_input == "rgb":
        raise ZoomError(f"{path}: the camera's JPG expected by a model with RGB input, got RAW; give the JPG beside it")
    image = decode.load(path)
    rendering = _to_tensor(image.rendering)
    packed = raw_input.normalise(
        torch.from_numpy(image.packed.astype(np.float32))[None],
        torch.from_numpy(image.black_level)[None],
        torch.tensor([image.white_level]),
        torch.from_numpy(image.wb)[None],
    )
    return Photo(_layout(packed, model_input), rendering, image.flip, from_raw=True)


def _from_picture(path: Path, model_input: str) -> Photo:
    # OpenCV turns the picture upright by its EXIF orientation.
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise ZoomError(f"{path}: a readable JPG or PNG expected, got a damaged or empty file")
    rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    rendering = _to_tensor(rgb)
    if model_input == "rgb":
        return Photo(rendering, rendering, 0, from_raw=False)
    even = rendering[..., : rgb.shape[0] // 2 * 2, : rgb.shape[1] // 2 * 2]
    return Photo(_layout(raw_input.mosaic_from_srgb(even[None]), model_input), even, 0, from_raw=False)


def _layout(packed: Tensor, model_input: str) -> Tensor:
    return (packed if model_input == "packed" else raw_input.packed_to_mosaic(packed))[0]


def _to_tensor(image_HW3: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image_HW3)).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class Zoomer:
    """A loaded model, ready for many photographs."""

    model: Network
    tile_px: int

    @classmethod
    def load(cls, folder: Path) -> Zoomer:
        stored = checkpoint.load(folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(stored.model.to(device).eval(), configs.from_dict(stored.config).input_px)

    def zoom(self, photo: Photo, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """float32 [s H, s W, 3] in [0, 1], upright."""
        try:
            zoomed = inference.zoom(self.model, photo.x, photo.rendering, tile_px=self.tile_px, progress=progress)
        except ValueError as error:
            raise ZoomError(str(error)) from error
        return decode.upright(zoomed.permute(1, 2, 0).cpu().numpy(), photo.flip)


def check_output(path: Path, bits: int) -> None:
    """Say before the work is done, not after it, that its result could not be written."""
    if bits not in (8, 16):
        raise ZoomError(f"--bits: 8 or 16 expected, got {bits}")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ZoomError(f"{path}: a writable folder expected, got {folder}; choose another -o")
    if path.is_dir():
        raise ZoomError(f"{path}: a file name expected, got a folder of that name; choose another -o")


def write_png(image_HW3: np.ndarray, path: Path, *, bits: int = 8) -> None:
    """Write float RGB in [0, 1] as an 8 or 16 bit PNG, in one step.

    Raises:
        ZoomError: the path cannot be written.
    """
    levels = 2**bits - 1
    encoded = (image_HW3.clip(0, 1) * levels).round().astype(np.uint8 if bits == 8 else np.uint16)
    done, data = cv2.imencode(".png", cv2.cvtColor(encoded, cv2.COLOR_RGB2BGR))
    if not done:
        raise ZoomError(
            f"{path}: a picture that PNG can hold expected, got {encoded.shape[1]}x{encoded.shape[0]} pixels"
        )
    aside = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(data.tobytes())
        aside.replace(path)
    except OSError as error:
        raise ZoomError(
            f"{path}: a writable place expected, got {error.strerror or error}; choose another -o"
        ) from error


def output_paths(photos: Sequence[Path], out: Path, scale: int) -> list[Path]:
    """Where each zoomed photograph goes: `out` itself if it names a .png, else NAME_4x.png inside it.

    Raises:
        ZoomError: several photographs and one file, two photographs for one file, or a suffix that is not PNG's.
    """
    if out.suffix.lower() == ".png":
        if len(photos) > 1:
            raise ZoomError(f"-o {out}: a folder expected for several photographs, got one .png file")
        return [out]
    if out.suffix.lower() in (".jpg", ".jpeg", ".tif", ".tiff", ".webp"):
        raise ZoomError(f"-o {out}: a .png or a folder expected, got a {out.suffix} file")
    targets = [out / f"{photo.stem}_{scale}x.png" for photo in photos]
    for number, target in enumerate(targets):
        if target in targets[:number]:
            first = photos[targets.index(target)]
            raise ZoomError(f"{photos[number]}: another name expected than {first} has; zoom them into two folders")
    return targets
