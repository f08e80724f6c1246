"""`sdan zoom`: enlarge photographs with a model.

RAW is decoded and rendered as in training. For a RAW model, JPG or PNG input is converted to a synthetic mosaic from
its linearised pixels, and a console message says so; an RGB model takes it directly.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import sdan
from pipelines import registry
from pipelines.formats import png
from preprocessing.raw import decode
from preprocessing.storage import write_atomically
from sdan import STARTER, SDANConfig, raw_input
from sdan.baselines import Network

PICTURES = (".jpg", ".jpeg", ".png")
_ROWS = 256
"""Pixel rows that `write_png` converts at a time."""


class ZoomError(ValueError):
    """A photograph that cannot be read, or an output that cannot be written; the message says what to do."""


@dataclass(frozen=True)
class Photo:
    """A photograph as the network's input, in sensor orientation."""

    raw: Tensor
    """[4, h, w] packed RAW in [0, 1]; for a model with RGB input the rendering itself."""
    rendering: Tensor
    """[3, 2h, 2w] in [0, 1], with the model's rendering curve; sRGB if input is rgb."""
    flip: int
    """LibRaw's code of the rotation that makes it upright."""
    from_raw: bool


def read_photo(path: Path, network: SDANConfig) -> Photo:
    """Read RAW, JPG or PNG for a model of this config.

    Raises:
        ZoomError, RawError: no such file, not a picture, not a Bayer RAW.
    """
    if not path.is_file():
        raise ZoomError(f"{path}: expected a photograph (RAW, JPG or PNG), got no such file; check the path")
    if path.suffix.lower() in PICTURES:
        return _from_picture(path, network)
    if network.input == "rgb":
        raise ZoomError(f"{path}: expected a JPG or PNG for a model with RGB input, got RAW; pass the camera's JPG")
    image = decode.load(path, curve=network.rendering_curve)
    raw, rendering = raw_input.from_photo(image)
    return Photo(raw, rendering, image.flip, from_raw=True)


def _from_picture(path: Path, network: SDANConfig) -> Photo:
    # OpenCV applies the EXIF orientation.
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise ZoomError(f"{path}: expected a readable JPG or PNG, got a damaged or empty file; export it again")
    rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    rendering = torch.from_numpy(rgb).permute(2, 0, 1).float() / 255
    if network.input == "rgb":
        return Photo(rendering, rendering, 0, from_raw=False)
    even = rendering[..., : rgb.shape[0] // 2 * 2, : rgb.shape[1] // 2 * 2]
    encoded = raw_input.rendering_from_srgb(even, network.rendering_curve)
    return Photo(raw_input.mosaic_from_srgb(even[None])[0], encoded, 0, from_raw=False)


@dataclass(frozen=True)
class Zoomer:
    """A loaded model, to zoom any number of photographs."""

    model: Network

    @classmethod
    def load(cls, folder: Path) -> Zoomer:
        """Load a checkpoint folder onto the GPU, or the CPU if there is none."""
        return cls(sdan.load(folder))

    def zoom(
        self, photo: Photo, progress: Callable[[int, int], None] | None = None, *, precision: str = "auto"
    ) -> np.ndarray:
        """The enlarged photograph, upright: float32 [s H, s W, 3] in [0, 1]; precision as in sdan.ops.precision."""
        with _zoom_errors():
            zoomed = sdan.zoom(self.model, photo.raw, photo.rendering, precision=precision, progress=progress)
        return decode.upright(zoomed.permute(1, 2, 0).numpy(), photo.flip)

    def levels(
        self, photo: Photo, bits: int, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[np.ndarray]:
        """The same as levels, uint8 or uint16 [rows, s W, 3], in parts from top to bottom.

        Upright photographs need memory for one part; the others are turned as a whole.
        """
        # 16 bits need more than the 8 bits of mantissa that bf16 has.
        precision = "fp32" if bits == 16 else "auto"
        with _zoom_errors():
            rows = sdan.zoom_rows(
                self.model, photo.raw, photo.rendering, bits=bits, precision=precision, progress=progress
            )
            parts = (part.permute(1, 2, 0).numpy() for part in rows)
            if photo.flip:
                yield decode.upright(np.concatenate(list(parts)), photo.flip)
            else:
                yield from parts

    def size(self, photo: Photo) -> tuple[int, int]:
        """(width, height) of the enlarged photograph, upright."""
        height, width = (self.model.config.scale * side for side in photo.rendering.shape[1:])
        return (height, width) if photo.flip & 4 else (width, height)


@contextlib.contextmanager
def _zoom_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ZoomError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise ZoomError(
            "GPU memory: expected room for one tile, got none; close other programs that use the GPU, "
            "or set CUDA_VISIBLE_DEVICES= to use the CPU"
        ) from error


def check_output(path: Path, bits: int) -> None:
    """Check, before the work starts, that its result can be written."""
    if bits not in (8, 16):
        raise ZoomError(f"--bits: expected 8 or 16, got {bits}")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ZoomError(f"-o {path}: expected a writable folder, got {folder}; choose another -o")
    if path.is_dir():
        raise ZoomError(f"-o {path}: expected a file name, got a folder of that name; choose another -o")


def write_png(image_HW3: np.ndarray, path: Path, *, bits: int = 8) -> None:
    """Write float RGB [H, W, 3] in [0, 1] as a PNG with `bits` per channel.

    Raises:
        ZoomError: as `write_levels`.
    """
    height, width = image_HW3.shape[:2]
    kind, most = (np.uint8, 255) if bits == 8 else (np.uint16, 65535)
    some = range(0, height, _ROWS)
    parts = ((image_HW3[top : top + _ROWS].clip(0, 1) * most).round().astype(kind) for top in some)
    write_levels(parts, path, (width, height), bits)


def write_levels(parts: Iterable[np.ndarray], path: Path, size: tuple[int, int], bits: int) -> None:
    """Write RGB levels as a PNG; the file appears complete or not at all.

    Args:
        parts: uint8 or uint16 [rows, width, 3] by `bits`, from top to bottom.
        size: (width, height).

    Raises:
        ZoomError: the path cannot be written.
    """
    file = io.BytesIO()
    file.writelines(png.encode(parts, *size, bits))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, file.getvalue())
    except OSError as error:
        raise ZoomError(
            f"-o {path}: expected a writable place, got {error.strerror or error}; choose another"
        ) from error


def output_paths(photos: Sequence[Path], out: Path, scale: int) -> list[Path]:
    """The output path of each photograph: `out` itself if it names a .png, else NAME_4x.png in the folder `out`.

    Raises:
        ZoomError: several photographs for one file, two photographs of one name, or a suffix other than .png.
    """
    if out.suffix.lower() == ".png":
        if len(photos) > 1:
            raise ZoomError(f"-o {out}: expected a folder for several photographs, got one .png file; name a folder")
        return [out]
    if out.suffix.lower() in (".jpg", ".jpeg", ".tif", ".tiff", ".webp"):
        raise ZoomError(f"-o {out}: expected a .png or a folder, got a {out.suffix} file; use .png")
    targets = [out / f"{photo.stem}_{scale}x.png" for photo in photos]
    for number, target in enumerate(targets):
        if target in targets[:number]:
            first = photos[targets.index(target)]
            raise ZoomError(f"{photos[number]}: expected a unique file name, got that of {first}; use two folders")
    return targets


@dataclass(frozen=True)
class Zoomed:
    """One written photograph."""

    path: Path
    width: int
    height: int


def choose_model(data: Path, uri: str | None) -> tuple[Path, bool]:
    """(checkpoint folder, whether it is the starter model because there is no champion).

    Args:
        uri: a model URI (registry.resolve_model); None: the champion, or the starter model if there is none.
    """
    tracking_uri = registry.default_tracking_uri(data)
    fallback = uri is None and registry.get_champion(tracking_uri) is None
    chosen = STARTER if fallback else uri or registry.CHAMPION_URI
    return registry.resolve_model(tracking_uri, chosen), fallback


def zoom_photos(
    photos: Sequence[Path],
    out: Path,
    zoomer: Zoomer,
    *,
    bits: int = 8,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> list[Zoomed]:
    """Zoom photographs one after another; one that fails is reported through `warn`, and the rest continue.

    Args:
        out: a .png for one photograph, else a folder.
        say: takes one line of progress per photograph.
        warn: takes one line per photograph that is set aside.

    Raises:
        ZoomError: outputs that cannot be written (before any work), or photographs set aside (after the rest).
    """
    targets = output_paths(photos, out, zoomer.model.config.scale)
    for target in targets:
        check_output(target, bits)
    done = []
    for photo, target in zip(photos, targets, strict=True):
        try:
            done.append(_zoom_one(photo, target, zoomer, bits, say))
        except ValueError as error:
            if len(photos) == 1:
                raise
            warn(f"set aside: {error}")
    if len(done) < len(photos):
        failed = len(photos) - len(done)
        raise ZoomError(f"expected {len(photos)} photographs, got {len(done)}; {failed} set aside, see above")
    return done


def _zoom_one(photo: Path, target: Path, zoomer: Zoomer, bits: int, say: Callable[[str], None]) -> Zoomed:
    decoded = read_photo(photo, zoomer.model.config)
    if not decoded.from_raw and zoomer.model.config.input != "rgb":
        say(f"{photo}: no RAW, so its pixels are converted to a synthetic mosaic; expect less detail than from RAW")
    width, height = zoomer.size(decoded)
    with tqdm(desc=photo.name, unit="tile") as bar:
        write_levels(zoomer.levels(decoded, bits, partial(move_bar, bar)), target, (width, height), bits)
    say(f"{target} ({width}x{height})")
    return Zoomed(target, width, height)


def move_bar(bar: tqdm, done: int, total: int) -> None:
    """Show `done` of `total` on a tqdm bar."""
    bar.total = total
    bar.update(done - bar.n)
