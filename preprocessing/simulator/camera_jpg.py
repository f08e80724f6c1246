"""The preset wide: the look of a camera's JPG, from the mosaic to the encoder's settings.

Ranges
    sharpening   radius 0.5 to 1.6 px, amount 0 (neutral) to 1.5 (a phone), as the settings of RAW converters run
    denoising    a bilateral filter on luminance, a Gaussian on chroma; phones smooth most
    tones        a brightening that keeps white, contrast, a gamma; saturation 0.8 to 1.4
    encoder      quality 85 to 98 (cameras), down to 60 (messengers and web pages); 4:2:0, 4:2:2, 4:4:4
    history      a third were reduced 2 to 4 times from a finer picture, as nearly every picture on a screen is;
                 a quarter were compressed once before, on another grid of blocks
"""

import io
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from preprocessing.colour import linear_to_srgb
from preprocessing.raw.dng import Mosaic
from preprocessing.simulator.wide import CameraModel
from preprocessing.truth.frame import Exposure

SUBSAMPLINGS = ("4:2:0", "4:2:2", "4:4:4")
QUALITY = (60, 98)
SHARPEN_RADIUS_PX = (0.5, 1.6)
SHARPEN_AMOUNT = 1.5
KINDS = ("camera", "phone", "neutral")
RESIZED_SHARE = 0.33
COMPRESSED_BEFORE_SHARE = 0.25

# OpenCV names a Bayer pattern by the second and third pixel of its second row.
_DEMOSAIC = {
    "RGGB": cv2.COLOR_BayerBG2RGB_EA,
    "BGGR": cv2.COLOR_BayerRG2RGB_EA,
    "GRBG": cv2.COLOR_BayerGB2RGB_EA,
    "GBRG": cv2.COLOR_BayerGR2RGB_EA,
}
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
_STEPS = 65535


@dataclass(frozen=True)
class JpgLook:
    """How a camera makes its JPGs. Lengths are pixels of the developed picture."""

    kind: str
    brighten: float
    """Slope of the tone curve at black, linear light; white stays."""
    contrast: float
    gamma: float
    saturation: float
    chroma_px: float
    """Standard deviation of the blur of chroma."""
    luma: float
    """Tolerance of the bilateral filter on luminance, of 1; 0: none."""
    sharpen_px: float
    sharpen: float
    halo: float
    """Most that sharpening changes a pixel, of 1."""
    quality: int
    subsampling: str
    resized: int
    """Factor by which the picture was reduced; 1: not."""
    resize_by: str
    earlier_quality: int
    """Quality of an earlier compression; 0: none."""
    earlier_shift: tuple[int, int]
    """(rows, columns) between the two grids of blocks."""

    def curve(self) -> npt.NDArray[np.float32]:
        """Encoded values in [0, 1] of 65,536 steps of linear light in [0, 1]."""
        light = np.arange(_STEPS + 1) / _STEPS
        encoded = linear_to_srgb(self.brighten * light / (1 + (self.brighten - 1) * light)) ** self.gamma
        return (encoded + self.contrast * np.sin(2 * np.pi * (encoded - 0.5))).astype(np.float32)


def draw_look(rng: np.random.Generator) -> JpgLook:
    kind = str(rng.choice(KINDS, p=[0.45, 0.35, 0.2]))
    sharpen, luma, chroma, saturation = {
        "camera": ((0.1, 1.0), (0.0, 0.05), (0.6, 2.0), (0.9, 1.3)),
        "phone": ((0.5, SHARPEN_AMOUNT), (0.03, 0.12), (1.2, 3.0), (1.0, 1.4)),
        "neutral": ((0.0, 0.2), (0.0, 0.01), (0.3, 1.0), (0.8, 1.1)),
    }[kind]
    quality = rng.integers(85, QUALITY[1] + 1) if rng.random() < 0.7 else rng.integers(QUALITY[0], 86)
    filters = ("area", "bicubic", "lanczos", "bilinear")
    return JpgLook(
        kind=kind,
        brighten=float(rng.uniform(1.0, 1.8)) if kind != "neutral" else 1.0,
        contrast=float(rng.uniform(-0.01, 0.05)) if kind != "neutral" else 0.0,
        gamma=float(rng.uniform(0.9, 1.12)),
        saturation=float(rng.uniform(*saturation)),
        chroma_px=float(rng.uniform(*chroma)),
        luma=float(rng.uniform(*luma)),
        sharpen_px=float(rng.uniform(*SHARPEN_RADIUS_PX)),
        sharpen=float(rng.uniform(*sharpen)),
        halo=float(rng.uniform(0.06, 0.4)),
        quality=int(quality),
        subsampling=str(rng.choice(SUBSAMPLINGS, p=[0.45, 0.3, 0.25])),
        resized=int(rng.integers(2, 5)) if rng.random() < RESIZED_SHARE else 1,
        resize_by=str(rng.choice(filters)),
        earlier_quality=int(rng.integers(70, 96)) if rng.random() < COMPRESSED_BEFORE_SHARE else 0,
        earlier_shift=(int(rng.integers(8)), int(rng.integers(8))),
    )


def toned(camera_HW3: npt.NDArray[np.float32], rgb_to_camera: npt.NDArray[np.float64], look: JpgLook) -> npt.NDArray:
    """White-balanced camera colours in [0, 1] to encoded sRGB float32 [H, W, 3] in [0, 1]."""
    grey = np.outer(np.ones(3), _LUMINANCE)
    saturate = look.saturation * np.eye(3) + (1 - look.saturation) * grey
    linear = cv2.transform(camera_HW3, np.linalg.inv(rgb_to_camera).astype(np.float32))
    # The gamut's edge clips before saturation, as in a rendering, and again after it.
    linear = cv2.transform(np.clip(linear, 0, 1), saturate.astype(np.float32))
    index = (np.clip(linear, 0, 1) * np.float32(_STEPS) + np.float32(0.5)).astype(np.uint16)
    return look.curve()[index]


def develop(mosaic_HW: Mosaic, camera: CameraModel, exposure: Exposure, look: JpgLook) -> npt.NDArray[np.uint8]:
    """The camera's picture of a mosaic, uint8 [H, W, 3]: demosaicing, tones, denoising, sharpening."""
    light = (mosaic_HW.astype(np.float32) - camera.black_level) / (camera.white_level - camera.black_level)
    for place, colour in enumerate(camera.cfa):
        light[place // 2 :: 2, place % 2 :: 2] *= exposure.wb["RGB".index(colour)]
    counts = (np.clip(light, 0, 1) * np.float32(_STEPS) + np.float32(0.5)).astype(np.uint16)
    demosaiced = cv2.cvtColor(counts, _DEMOSAIC[camera.cfa]).astype(np.float32) / np.float32(_STEPS)
    ycc = cv2.cvtColor(toned(demosaiced, camera.rgb_to_camera, look), cv2.COLOR_RGB2YCrCb)
    chroma = cv2.GaussianBlur(ycc[..., 1:], (0, 0), look.chroma_px)
    luma = np.ascontiguousarray(ycc[..., 0])
    if look.luma:
        luma = cv2.bilateralFilter(luma, 5, look.luma, 1.5)
    detail = luma - cv2.GaussianBlur(luma, (0, 0), look.sharpen_px)
    luma = luma + np.clip(np.float32(look.sharpen) * detail, -look.halo, look.halo)
    rgb = cv2.cvtColor(np.dstack([luma, chroma]), cv2.COLOR_YCrCb2RGB)
    return np.asarray(np.rint(np.clip(rgb, 0, 1) * 255), np.uint8)


def resize(picture_HW3: npt.NDArray[np.uint8], look: JpgLook) -> npt.NDArray[np.uint8]:
    """The picture reduced by `look.resized`. bilinear does not average, so it aliases, as fast resizers do."""
    size = (picture_HW3.shape[1] // look.resized, picture_HW3.shape[0] // look.resized)
    if look.resize_by in ("area", "bilinear"):
        how = cv2.INTER_AREA if look.resize_by == "area" else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(picture_HW3, size, interpolation=how), np.uint8)
    pillow = Image.Resampling.BICUBIC if look.resize_by == "bicubic" else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(picture_HW3).resize(size, pillow))


def compressed_before(picture_HW3: npt.NDArray[np.uint8], look: JpgLook) -> npt.NDArray[np.uint8]:
    """The picture after its earlier compression, if any."""
    if not look.earlier_quality:
        return picture_HW3
    rows, columns = look.earlier_shift
    padded = np.pad(picture_HW3, ((rows, 0), (columns, 0), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    Image.fromarray(padded).save(buffer, "JPEG", quality=look.earlier_quality, subsampling="4:2:0")
    with Image.open(buffer) as image:
        return np.ascontiguousarray(np.asarray(image)[rows:, columns:])
