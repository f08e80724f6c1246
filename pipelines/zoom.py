"""`sdan zoom`: enlarge photographs with a model.

The parts are in zooming/: request.py (what is asked for, and its checks), photo.py (reading) and rows.py (what happens
to the network's output rows). Files are written by formats/.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import sdan
from pipelines.formats import dng, jpg, png, tags, tiff
from pipelines.zooming import rows
from pipelines.zooming.models import Chosen
from pipelines.zooming.photo import Photo, read_photo
from pipelines.zooming.request import (
    DEFAULTS,
    Output,
    OutputError,
    ZoomError,
    check_options,
    check_outputs,
    existing_files,
    kind_of_photo,
    output_paths,
    require_raw,
    shown,
)
from preprocessing.storage import new_file, one_line
from sdan import STARTER_RGB, checkpoint, inference
from sdan.baselines import Network

__all__ = ["Output", "Photo", "ZoomError", "Zoomed", "Zoomer", "read_photo", "write_png", "zoom_photos"]

_ROWS = 256
"""Pixel rows that `write_png` converts at a time."""


@dataclass(frozen=True)
class Zoomer:
    """A loaded model, to zoom any number of photographs."""

    model: Network
    strength: float = 1.0
    """1 for the network's output, 0 for the rendering enlarged bicubically, between them a linear mixture."""
    note: str = ""
    """A line for the user about each photograph that it zooms."""
    start: Future[None] | None = None
    """The start of the GPU in the background; None: the model is where it computes."""

    @classmethod
    def load(cls, folder: Path, strength: float = 1.0, note: str = "", device: str = "auto") -> Zoomer:
        """Load a checkpoint folder onto the device.

        A GPU starts in the background, so that a photograph can be read meanwhile.

        Args:
            device: auto (the first GPU, or the CPU if there is none), cpu, cuda or cuda:N.

        Raises:
            ZoomError: no such GPU.
        """
        chosen = _device(device)
        model = checkpoint.load(folder).model
        thread = ThreadPoolExecutor(1)
        start = thread.submit(_start, model, chosen)
        thread.shutdown(wait=False)
        return cls(model, strength, note, start)

    def wait(self) -> None:
        """Wait until the model is where it computes. Raises ZoomError: a GPU without memory for the model."""
        if self.start is not None:
            with _zoom_errors():
                self.start.result()

    def zoom(
        self, photo: Photo, progress: Callable[[int, int], None] | None = None, *, precision: str = "auto"
    ) -> np.ndarray:
        """The enlarged photograph, upright: float32 [s H, s W, 3] in [0, 1]; precision as in sdan.ops.precision."""
        self.wait()
        with _zoom_errors():
            zoomed = sdan.zoom(
                self.model,
                photo.raw,
                photo.rendering,
                precision=precision,
                strength=self.strength,
                progress=progress,
            )
        top, left, height, width = self._window(photo)
        part: np.ndarray = zoomed.permute(1, 2, 0)[top : top + height, left : left + width].numpy()
        return part

    def levels(
        self,
        photo: Photo,
        bits: int,
        progress: Callable[[int, int], None] | None = None,
        *,
        scale: int | None = None,
        finish: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Iterator[np.ndarray]:
        """The same as levels, uint8 or uint16 [rows, s W, 3], in parts from top to bottom.

        Args:
            scale: resample to this scale; None: the model's.
            finish: makes what is returned of each part, of levels as uint16; `bits` are what it returns.
        """
        # 16 bits need more than the 8 bits of mantissa that bf16 has.
        precision = "fp32" if bits == 16 else "auto"
        own = self.model.config.scale
        self.wait()
        with _zoom_errors():
            found = sdan.zoom_rows(
                self.model,
                photo.raw,
                photo.rendering,
                bits=16 if finish else bits,
                precision=precision,
                strength=self.strength,
                progress=progress,
            )
            top, left, height, width = self._window(photo)
            # `map` keeps no part, so each is freed as soon as it is written.
            parts = rows.cropped(map(_as_picture, found), top, left, height, width)
            if photo.grey:
                parts = rows.grey(parts)
            if scale is not None and scale != own:
                parts = rows.resampled(parts, width, own, scale)
            yield from map(finish, parts) if finish else parts

    def size(self, photo: Photo, scale: int | None = None) -> tuple[int, int]:
        """(width, height) of the enlarged photograph, upright."""
        height, width = ((scale or self.model.config.scale) * side for side in photo.window[2:])
        return width, height

    def _window(self, photo: Photo) -> tuple[int, ...]:
        return tuple(self.model.config.scale * value for value in photo.window)


def _device(name: str) -> torch.device:
    available = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= available:
        raise ZoomError(
            f"--device: expected a GPU that PyTorch finds ({available} here), got {name}; use auto or cpu, "
            "or see sdan doctor"
        )
    return device


def _start(model: Network, device: torch.device) -> None:
    """Move the model to a GPU, and load the libraries and kernels that it needs."""
    if device.type == "cuda":
        model.to(device)
        if model.input_tile_px is not None:
            inference.warm_up(model, input_tile_px=model.input_tile_px)


def _as_picture(part: Tensor) -> np.ndarray:
    """[3, rows, W] -> [rows, W, 3]."""
    return part.permute(1, 2, 0).numpy()


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


def write_levels(
    parts: Iterable[np.ndarray],
    path: Path,
    size: tuple[int, int],
    bits: int,
    *,
    output: Output = DEFAULTS,
    exif: bytes = b"",
    photo: Photo | None = None,
    replace: bool = True,
) -> None:
    """Write RGB levels in sRGB (for a DNG: camera light) while they arrive; the file appears complete or not at all.

    Args:
        parts: uint8 or uint16 [rows, width, 3] by `bits`, from top to bottom.
        size: (width, height).
        output: its format and quality.
        exif: a block as `formats.tags.written` gives it.
        photo: a RAW that is written as a DNG.
        replace: whether a file that appears at `path` meanwhile is replaced.

    Raises:
        OutputError: the path cannot be written.
        ZoomError: the path was written meanwhile, or the picture is too large for a JPG or DNG.
    """
    kind = output.chosen_format(path)
    if kind == "jpg" and max(size) > jpg.MAX_SIDE:
        raise ZoomError(
            f"-o {shown(path)}: expected at most {jpg.MAX_SIDE} pixels a side for a JPG, got {size[0]}x{size[1]}; "
            "use --format tiff or png"
        )
    if kind == "dng" and dng.size_bytes(*size) > dng.MAX_BYTES:
        raise ZoomError(
            f"-o {shown(path)}: expected at most 4.29 GB for a DNG, got {size[0]}x{size[1]} pixels of 6 bytes; "
            "use --crop, a smaller --scale or --format tiff"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path, replace=replace) as file:
            if kind == "dng" and photo is not None and photo.camera is not None:
                dng.write(file, parts, *size, photo.camera, photo.reduced(dng.PREVIEW_PX), exif=exif)
            else:
                _write(file, kind, parts, size, bits, output.quality, exif)
    except FileExistsError as error:
        raise ZoomError(
            f"-o {shown(path)}: expected a new file, got one that another program wrote meanwhile; "
            "choose another -o or add --overwrite"
        ) from error
    except OSError as error:
        raise OutputError(
            f"-o {shown(path)}: expected a writable place, got {error.strerror or error}; choose another"
        ) from error


def _write(
    file: BinaryIO,
    kind: str,
    parts: Iterable[np.ndarray],
    size: tuple[int, int],
    bits: int,
    quality: int,
    exif: bytes,
) -> None:
    icc = tags.srgb_profile()
    if kind == "tiff":
        tiff.write(file, parts, *size, bits, icc=icc, exif=exif)
    elif kind == "jpg":
        file.writelines(jpg.encode(parts, *size, quality=quality, icc=icc, exif=exif))
    else:
        file.writelines(png.encode(parts, *size, bits, icc=icc, exif=exif))


def load_models(chosen: Chosen, strength: float = 1.0, device: str = "auto") -> tuple[Zoomer, Zoomer]:
    """(the model for RAW, the model for pictures), as `Zoomer.load` starts them; one object if they are the same."""
    raw = Zoomer.load(chosen.for_raw, strength, chosen.raw_note, device)
    if chosen.for_pictures == chosen.for_raw:
        return raw, raw
    return raw, Zoomer.load(chosen.for_pictures, strength, chosen.picture_note, device)


@dataclass(frozen=True)
class Zoomed:
    """One written photograph."""

    path: Path
    width: int
    height: int


def zoom_with(
    chosen: Chosen,
    inputs: Sequence[Path],
    out: Path,
    *,
    strength: float,
    output: Output,
    device: str = "auto",
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> list[Zoomed]:
    """`zoom_photos` with the chosen models on a device, as `Zoomer.load` takes it."""
    if chosen.note:
        say(chosen.note)
    raw, pictures = load_models(chosen, strength, device)
    return zoom_photos(inputs, out, raw, pictures=pictures, output=output, say=say, warn=warn)


def zoom_photos(
    inputs: Sequence[Path],
    out: Path,
    zoomer: Zoomer,
    *,
    pictures: Zoomer | None = None,
    output: Output = DEFAULTS,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> list[Zoomed]:
    """Zoom photographs one after another; one that fails is reported through `warn`, and the rest continue.

    Args:
        inputs: files; zoom_folder/ takes folders.
        out: a .png, .tif or .jpg for one photograph, else a folder.
        pictures: the model for JPG, PNG, TIFF, WebP and AVIF, of the same scale; None: `zoomer` takes them, too.
        say: takes one line of progress per photograph.
        warn: takes one line per photograph that is set aside.

    Raises:
        ZoomError: outputs that cannot be written (before any work), or photographs set aside (after the rest).
    """
    check_options(out, output)
    network = zoomer.model.config
    photos = existing_files(inputs)
    targets = output_paths(photos, out, output.scale or network.scale, output)
    check_outputs(targets, photos, output.overwrite)
    if note := resampling_note(network.scale, output.scale or network.scale):
        say(note)
    done = []
    for photo, target in zip(photos, targets, strict=True):
        try:
            chosen = pictures if pictures and kind_of_photo(photo) == "picture" else zoomer
            done.append(zoom_one(photo, target, chosen, output, say, replace=output.overwrite))
            say(f"{shown(target)} ({done[-1].width}x{done[-1].height})")
        except Exception as error:
            line = str(error) if isinstance(error, ValueError) else unexpected(photo, error)
            if len(photos) == 1:
                raise ZoomError(line) from error
            warn(f"set aside: {line}")
    if len(done) < len(photos):
        failed = len(photos) - len(done)
        raise ZoomError(f"expected {len(photos)} photographs, got {len(done)}; {failed} set aside, see above")
    return done


def resampling_note(own: int, wanted: int) -> str:
    """Says that a model's scale is not the wanted one; "" if it is."""
    return "" if own == wanted else f"the model enlarges {own}x; its result is resampled to {wanted}x"


def unexpected(photo: Path, error: Exception) -> str:
    """The line about an error that no check has foreseen."""
    if isinstance(error, MemoryError) or "not enough memory" in str(error):
        return f"{shown(photo)}: expected memory for this photograph, got too little; use --crop or close programs"
    return (
        f"{shown(photo)}: expected a photograph that can be zoomed, got "
        f"{type(error).__name__}: {one_line(error)[:200]}; copy or export it again"
    )


def zoom_one(
    photo: Path,
    target: Path,
    zoomer: Zoomer,
    output: Output,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
    *,
    replace: bool = False,
) -> Zoomed:
    """Zoom one photograph into the file `target`.

    Args:
        say: takes lines about it.
        progress: called with (tiles done, total tiles); None: a bar on the console.
        replace: whether a file that appears at `target` meanwhile is replaced.
    """
    output = dataclasses.replace(output, format=output.chosen_format(target))
    require_raw(photo, target, output)
    decoded = read_photo(photo, zoomer.model.config, output)
    for note in (*decoded.notes, *([zoomer.note] if zoomer.note else [])):
        say(f"{shown(photo)}: {note}")
    if not decoded.from_raw and not zoomer.model.config.is_rgb:
        say(
            f"{shown(photo)}: no RAW, so its pixels are converted to a synthetic mosaic; "
            f"expect more detail from --model {STARTER_RGB}"
        )
    width, height = zoomer.size(decoded, output.scale)
    bits = output.chosen_bits(target)
    scale = output.scale or zoomer.model.config.scale
    exif = tags.written(decoded.exif, width, height, gps=output.gps, scale=scale, crop_factor=decoded.crop_factor)
    finish: Callable[[np.ndarray], np.ndarray] | None = None
    if decoded.camera:
        finish = decoded.camera.light
    elif decoded.look:
        finish = partial(decoded.look.add, bits=bits)
    with _bar(photo) if progress is None else contextlib.nullcontext(progress) as moved:
        parts = zoomer.levels(decoded, bits, moved, scale=output.scale, finish=finish)
        size = (width, height)
        write_levels(parts, target, size, bits, output=output, exif=exif, photo=decoded, replace=replace)
    return Zoomed(target, width, height)


@contextlib.contextmanager
def _bar(photo: Path) -> Iterator[Callable[[int, int], None]]:
    with tqdm(desc=shown(Path(photo.name)), unit="tile") as bar:
        yield partial(move_bar, bar)


def move_bar(bar: tqdm, done: int, total: int) -> None:
    """Show `done` of `total` on a tqdm bar."""
    bar.total = total
    bar.update(done - bar.n)
