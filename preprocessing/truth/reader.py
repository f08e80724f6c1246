"""Reads the truth beside a simulated sequence: ideal 4x and 8x pictures, and the exact position of every pixel.

The files lie in SEQUENCE/truth/; all paths are relative to the sequence, so that it can be copied:

    geometry.json     parameters; each frame's exact geometry and exposure; the windows of the ideal pictures
    00005_4x.png      the scene in frame 00005's geometry and JPG tone at 4 times its density, without noise, mosaic,
                      sharpening or aliasing; only the window that a 4x pair can use
    00001_near.png    mask of the near plane in frame 00001: 1 bit, a quarter of the JPG's size
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from preprocessing.frames import TRUTH_FOLDER
from preprocessing.registration.affine import apply
from preprocessing.truth.frame import FAR, NEAR, Exposure, FrameGeometry, Window, nominal_lr_to_hr

Points = npt.NDArray[np.float64]

GEOMETRY_FILE = "geometry.json"
NEAR_SHRINK = 4
"""JPG pixels per pixel of the near plane's mask, along each axis."""


def ideal_file(stem: str, scale: int) -> str:
    """Name of a frame's ideal picture in the truth folder."""
    return f"{stem}_{scale}x.png"


def near_file(stem: str) -> str:
    """Name of a frame's mask of the near plane in the truth folder."""
    return f"{stem}_near.png"


@dataclass(frozen=True)
class Truth:
    """A sequence's truth, loaded by `load_truth`; its pictures are read on first use."""

    frames: dict[str, FrameGeometry]
    """By frame stem."""
    exposures: dict[str, Exposure]
    ideals: dict[tuple[str, int], Window]
    """Windows of the stored ideal pictures, by (frame stem, scale)."""
    key: str
    """Identifies the sequence's content in the cache of decoded pictures."""
    read: Callable[[str], bytes]
    """Reads a file of the sequence by its relative path."""

    def true_rgb(self, lr_stem: str, rect: Window, scale: int) -> npt.NDArray[np.uint8] | None:
        """The ideal picture of a rectangle of a short frame, uint8 [scale h, scale w, 3] in the frame's JPG tone.

        None if `scale` divides no stored scale, or if `rect` is not inside the stored window. A divisor of a stored
        scale is averaged down.
        """
        for stored in sorted(s for stem, s in self.ideals if stem == lr_stem and s % scale == 0):
            top, left, height, width = self.ideals[lr_stem, stored]
            row, column = rect[0] - top, rect[1] - left
            if row < 0 or column < 0 or row + rect[2] > height or column + rect[3] > width:
                continue
            picture = _picture(self.key, _Reader(self.read), f"{TRUTH_FOLDER}/{ideal_file(lr_stem, stored)}")
            part = picture[row * stored : (row + rect[2]) * stored, column * stored : (column + rect[3]) * stored]
            if stored == scale:
                return part.copy()
            size = (rect[3] * scale, rect[2] * scale)
            return np.asarray(cv2.resize(part, size, interpolation=cv2.INTER_AREA), np.uint8)
        return None

    def true_flow(
        self, lr_stem: str, hr_stem: str, rect: Window, lr_to_hr: Callable[[Points], Points] | None = None
    ) -> npt.NDArray[np.float16]:
        """The offset that corrects the pair's map, for each packed pixel of a rectangle of the short frame.

        The pair's map takes the packed pixel with centre p to the point h = lr_to_hr(p) of the long JPG. The scene
        point visible at h is at p + flow(p) in the short frame. The sign is SDAN's: output(p) samples input at
        p + offset(p).

        rect      even height and width
        lr_to_hr  maps (x, y) [N, 2] from the short RAW to the long JPG; None: the nominal affine, from EXIF alone
        Returns float16 [2, h/2, w/2]: (dy, dx) in packed pixels (2 RAW pixels).
        """
        lr, hr = self.frames[lr_stem], self.frames[hr_stem]
        at = _packed_centres(rect)
        to_hr = lr_to_hr or partial(apply, nominal_lr_to_hr(lr, hr))
        in_jpg = to_hr(at.reshape(-1, 2)).reshape(at.shape)
        in_raw = in_jpg + np.array(hr.jpg_origin)
        found = lr.from_scene(hr.to_scene(in_raw, FAR), FAR)
        near = self.shows_near(hr_stem, in_jpg)
        if near.any():
            found[near] = lr.from_scene(hr.to_scene(in_raw[near], NEAR), NEAR)
        flow = (found - at) / 2
        return np.asarray(np.moveaxis(flow[..., ::-1], -1, 0), np.float16)

    def true_near(
        self, lr_stem: str, hr_stem: str, rect: Window, lr_to_hr: Callable[[Points], Points]
    ) -> npt.NDArray[np.uint8]:
        """Where each packed pixel of a rectangle of the short frame shows the near plane.

        Args as `true_flow`.
        Returns uint8 [2, h/2, w/2], 1 for near: by the short frame itself, and by the long JPG that the map puts there.
        """
        at = _packed_centres(rect)
        in_hr = lr_to_hr(at.reshape(-1, 2)).reshape(at.shape)
        shown = (self.shows_near(lr_stem, at - self.frames[lr_stem].jpg_origin), self.shows_near(hr_stem, in_hr))
        return np.stack(shown).astype(np.uint8)

    def true_lr_to_hr(
        self, lr_stem: str, hr_stem: str, lr_xy: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Exact long JPG positions [..., 2] of the far plane's points at short RAW positions [..., 2], and whether they
        are visible there (inside the frame and not behind the near plane), bool [...]."""
        hr = self.frames[hr_stem]
        in_jpg = hr.from_scene(self.frames[lr_stem].to_scene(lr_xy, FAR), FAR) - np.array(hr.jpg_origin)
        inside = ((in_jpg >= 0) & (in_jpg <= np.array([hr.jpg_width, hr.jpg_height]))).all(-1)
        return in_jpg, inside & ~self.shows_near(hr_stem, in_jpg)

    def shows_near(self, stem: str, jpg_xy: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Whether JPG positions [..., 2] of a frame show the near plane (coverage above a half), bool [...]."""
        mask = _picture(self.key, _Reader(self.read), f"{TRUTH_FOLDER}/{near_file(stem)}")
        at = np.floor(jpg_xy / NEAR_SHRINK).astype(int)
        row, column = np.clip(at[..., 1], 0, mask.shape[0] - 1), np.clip(at[..., 0], 0, mask.shape[1] - 1)
        return np.asarray(mask[row, column] > 127)


def _packed_centres(rect: Window) -> Points:
    """(x, y) of the centre of each packed pixel of a rectangle, RAW pixels: [h/2, w/2, 2]."""
    top, left, height, width = rect
    x, y = np.meshgrid(left + np.arange(width // 2) * 2 + 1.0, top + np.arange(height // 2) * 2 + 1.0)
    return np.stack([x, y], axis=-1)


@dataclass(frozen=True, eq=False)
class _Reader:
    """Excludes the reading function from `_picture`'s cache key; `Truth.key` distinguishes sequences."""

    read: Callable[[str], bytes]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reader)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=4)
def _picture(key: str, reader: _Reader, name: str) -> npt.NDArray[np.uint8]:
    """A decoded picture, cached for the tiles of a pair: uint8 [H, W, 3], or [H, W] for a mask."""
    with Image.open(io.BytesIO(reader.read(name))) as image:
        return np.asarray(image.convert("L" if image.mode == "1" else image.mode), np.uint8)


def load_truth(sequence_dir: Path | str, *, read: Callable[[str], bytes] | None = None) -> Truth | None:
    """A simulated sequence's truth, or None for a real sequence.

    read   for a sequence that is not on a local disk: reads a file by its relative path ("truth/geometry.json") or
           raises FileNotFoundError; None reads below `sequence_dir`
    Raises ValueError, one line, if the truth is damaged.
    """
    folder = Path(sequence_dir)
    reader = read or (lambda name: (folder / name).read_bytes())
    try:
        content = reader(f"{TRUTH_FOLDER}/{GEOMETRY_FILE}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        stored = json.loads(content)
        frames = {stem: FrameGeometry.from_json(values["geometry"]) for stem, values in stored["frames"].items()}
        exposures = {stem: Exposure.from_json(values["exposure"]) for stem, values in stored["frames"].items()}
        ideals = {(str(stem), int(scale)): tuple(window) for stem, scale, window in stored["ideals"]}
        return Truth(frames, exposures, ideals, f"{folder}|{hash(content)}", reader)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder}/{TRUTH_FOLDER}/{GEOMETRY_FILE}: expected a simulator's geometry, got a damaged file ({error}); "
            "simulate the sequence again"
        ) from error
