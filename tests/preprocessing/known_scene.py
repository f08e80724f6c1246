"""Pictures with exactly known geometry: a scene of sine waves can be viewed through any affine without resampling."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from preprocessing.raw.dng import ShotTags, write_arw, write_dng
from preprocessing.registration.affine import about_centres, compose, translation

BLACK, WHITE = 512, 16383
WB = (2.0, 1.0, 1.5)
FOCALS_MM = (240, 150, 100, 70, 50, 35, 24)


class Scene:
    """A sum of waves of 5 to 1000 units in length; a unit is a pixel of the longest focal length."""

    def __init__(self, seed: int, waves: int = 300) -> None:
        draw = np.random.default_rng(seed)
        length = np.exp(draw.uniform(np.log(5), np.log(1000), waves))
        angle = draw.uniform(0, np.pi, waves)
        self.frequency_K2 = np.stack([np.cos(angle), np.sin(angle)], 1) / length[:, None]
        self.phase_K = draw.uniform(0, 2 * np.pi, waves)
        self.amplitude_K3 = draw.normal(1, 0.3, (waves, 3)) * 0.16 * np.sqrt(2 / waves) * 2

    def view(self, to_scene: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """[H, W, 3] in [0, 1]: pixel (x, y) shows the scene at to_scene(x, y), blurred by a Gaussian PSF."""
        frequency = self.frequency_K2 @ to_scene[:, :2]  # cycles per pixel of the view
        seen = np.exp(-2 * (np.pi * 0.6) ** 2 * (frequency**2).sum(1))  # a PSF of 0.6 px
        phase = self.phase_K + 2 * np.pi * (self.frequency_K2 @ to_scene[:, 2])
        x, y = np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5
        rows = np.exp(1j * (2 * np.pi * np.outer(y, frequency[:, 1]) + phase))
        cols = np.exp(2j * np.pi * np.outer(frequency[:, 0], x))
        planes = [((rows * (seen * self.amplitude_K3[:, c])) @ cols).real for c in range(3)]
        return np.clip(0.45 + np.stack(planes, -1), 0.02, 0.98)


def to_8_bit(picture_HWC: np.ndarray) -> np.ndarray:
    return np.rint(picture_HWC * 255).astype(np.uint8)


def to_mosaic(picture_HWC: np.ndarray, cfa: str = "RGGB", black: int = BLACK, white: int = WHITE) -> np.ndarray:
    """Sensor counts of a display picture: gamma and white balance removed, one colour per pixel."""
    linear = picture_HWC**2.2
    counts = np.empty(linear.shape[:2])
    for index, colour in enumerate(cfa):
        row, col = divmod(index, 2)
        channel = "RGB".index(colour)
        counts[row::2, col::2] = linear[row::2, col::2, channel] / WB[channel]
    return np.rint(black + counts * (white - black)).astype(np.uint16)


def jpg_bytes(
    pixels_HWC: np.ndarray,
    focal_mm: float | None = None,
    orientation: int | None = None,
    exposure: tuple[float, int, float] = (0.01, 100, 8.0),
) -> bytes:
    """exposure: (seconds, ISO, f-number)."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "SONY", "ILCE-7SM2"
    if orientation is not None:
        exif[0x0112] = orientation
    if focal_mm is not None:
        seconds, iso, f_number = exposure
        exif.get_ifd(0x8769).update({0x920A: float(focal_mm), 0x8827: iso, 0x829A: seconds, 0x829D: f_number})
    out = io.BytesIO()
    Image.fromarray(pixels_HWC).save(out, "JPEG", quality=97, subsampling=0, exif=exif)
    return out.getvalue()


def write_sequence(
    folder: Path,
    *,
    seed: int = 0,
    size: tuple[int, int] = (256, 384),
    focals_mm: tuple[float, ...] = FOCALS_MM,
    raw_format: str = "dng",
    cfa: str = "RGGB",
    jpg_margin: int = 0,
    shift_px: tuple[float, float] = (0.0, 0.0),
) -> Path:
    """Write a zoom sequence in SR-RAW's layout. `size` is the RAW's; the JPG is `jpg_margin` smaller on each side.

    All frames but the first (longest) are shifted by `shift_px` (x, y), in pixels of the longest frame.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scene = Scene(seed)
    for number, focal_mm in enumerate(focals_mm, 1):
        picture = scene.view(frame_to_scene(max(focals_mm) / focal_mm, size, shift_px if number > 1 else (0, 0)), size)
        stem = f"{number:05d}"
        shown = to_8_bit(picture)
        if jpg_margin:
            shown = shown[jpg_margin:-jpg_margin, jpg_margin:-jpg_margin]
        (folder / f"{stem}.JPG").write_bytes(jpg_bytes(shown, focal_mm))
        if raw_format == "arw":
            write_arw(folder / f"{stem}.ARW", to_mosaic(picture), wb=WB, shot=ShotTags(focal_mm=focal_mm))
        else:
            write_dng(folder / f"{stem}.dng", to_mosaic(picture, cfa), cfa=cfa, wb=WB, shot=ShotTags(focal_mm=focal_mm))
    return folder


def frame_to_scene(reduction: float, size: tuple[int, int], shift_px: tuple[float, float] = (0, 0)) -> np.ndarray:
    return compose(translation(*shift_px), about_centres(reduction, size, (0, 0)))
