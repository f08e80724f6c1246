"""Reads a JPG, PNG, TIFF, WebP or AVIF picture and converts its colours to sRGB: the one place that decodes pictures.

Cameras and phones store Adobe RGB or Display P3, stated by an embedded ICC profile, by EXIF's ColorSpace or by numbers
(colour_numbers.py). 8-bit pictures with a profile go through littlecms (Pillow's ImageCms), which has no 16-bit mode in
Pillow; the others go through a matrix and curves (icc.py).
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from preprocessing.raw.exif import PROCESS_LOCK, Exif, read_exif
from preprocessing.raw.jpeg_damage import jpeg_damage
from preprocessing.raw.profiles.colour_numbers import HighDynamicRange, outranks_profile, stated_space
from preprocessing.raw.profiles.icc import ADOBE_RGB, MatrixProfile, read_matrix_profile

Pixels = NDArray[np.uint8] | NDArray[np.uint16]

KINDS = {"JPG": "JPEG", "PNG": "PNG", "TIFF": "TIFF", "WebP": "WEBP", "AVIF": "AVIF"}
"""Our names of the formats that can be read: Pillow's names."""
MAX_PIXELS = 400_000_000
_MAX_PIXELS_PER_BYTE = 256
"""A JPG stores at least two bits per block of 64 pixels, so a file that declares more pixels is damaged."""
_MAGIC = (
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"he", b"mif1", b"mif2", b"msf1")),
    *((4, b"ftyp" + brand, "AVIF") for brand in (b"avif", b"avis")),
    *((4, b"ftyp" + brand, "a video") for brand in (b"qt  ", b"mp4", b"isom", b"iso2", b"avc1", b"M4V")),
    (4, b"ftypcrx", "RAW (CR3)"),
    *((0, head, "JPEG XL") for head in (b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")),
    *((0, head, "JPEG 2000") for head in (b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  ")),
    *((8, b"WEBP", "WebP"), (0, b"GIF8", "GIF"), (0, b"BM", "BMP"), (0, b"8BPS", "PSD"), (0, b"%PDF", "PDF")),
    *((0, b"\x89PNG", "PNG"), (0, b"\xff\xd8", "JPG"), (0, b"II*\x00", "TIFF or RAW"), (0, b"MM\x00*", "TIFF or RAW")),
    *((0, b"PK\x03\x04", "ZIP"), (0, b"\x76\x2f\x31\x01", "OpenEXR"), (0, b"#?RADIANCE", "Radiance HDR")),
    *((0, head, "BigTIFF") for head in (b"II+\x00", b"MM\x00+")),
)
"""(offset, bytes, kind) at a file's start."""
_EXIF_HEADER = b"Exif\x00\x00"
_UNCALIBRATED, _ADOBE_BY_SOME = 0xFFFF, 2
"""EXIF's ColorSpace of pictures in Adobe RGB."""
_SAME_COLOUR = 2
"""Levels of 255 by which a profile may change colours and still count as sRGB: rounding, and older editions of it."""
_STRIP_ROWS = 256
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "F")


class PictureError(ValueError):
    """A picture that cannot be used; the message is one line that says why."""


@dataclass(frozen=True)
class Picture:
    """A picture in sRGB."""

    stored: Image.Image | Pixels
    """RGB, uint8 or uint16, not turned by EXIF. A Pillow image is converted to an array only where needed: a full copy
    takes half as long as decoding."""
    orientation: int | None
    """EXIF Orientation, 1 to 8; None if not stated."""
    notes: tuple[str, ...] = ()
    """What was done to it besides decoding, e.g. "Display P3 converted to sRGB"."""
    grey: bool = False
    """Whether the file holds grey values; they are expanded to RGB here."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as stored."""
        if isinstance(self.stored, Image.Image):
            return self.stored.height, self.stored.width
        return self.stored.shape[0], self.stored.shape[1]

    @cached_property
    def pixels_HWC(self) -> Pixels:
        """[H, W, 3] as stored, in [0, 255] or [0, 65535]."""
        pixels: NDArray[Any] = np.asarray(self.stored)
        return pixels

    @property
    def upright_HWC(self) -> Pixels:
        """[H, W, 3] turned for the viewer."""
        picture = self.pixels_HWC
        orientation = self.orientation or 1
        if orientation >= 5:
            picture = picture.swapaxes(0, 1)
        rows = -1 if orientation in (3, 4, 7, 8) else 1
        cols = -1 if orientation in (2, 3, 6, 7) else 1
        upright: NDArray[Any] = np.ascontiguousarray(picture[::rows, ::cols])
        return upright


def read_picture(
    data: bytes, name: str, *, kinds: tuple[str, ...] = tuple(KINDS), max_pixels: int = MAX_PIXELS
) -> Picture:
    """Decode a picture of one of these `kinds`; `name` is for messages.

    Grey is expanded to RGB. Transparent parts become white, which a note says.

    Raises PictureError, one line: another kind of file, damaged or truncated, CMYK, more than `max_pixels` pixels
    (checked before memory is taken), or a 16-bit picture whose profile has no matrix.
    """
    try:
        with _opened(data, kinds) as picture:
            _require_size(picture, name, len(data), max_pixels)
            picture.load()
            tags = _tags(picture, data)
            convert = _read_deep if _bits(picture, data) > 8 else _read_8_bit
            grey = picture.mode in _GREY_MODES
            pixels, notes = convert(picture, data, name, _space(picture, tags, data, name))
            _require_intact(picture, data, name)
    except PictureError:
        raise
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, OverflowError, RuntimeError, cv2.error) as error:
        raise _unreadable(error, data, name, kinds) from error
    return Picture(pixels, tags.orientation, notes, grey)


def declared_size(data: bytes, name: str, kinds: tuple[str, ...] = tuple(KINDS)) -> tuple[int, int]:
    """(height, width) as shown, from the file's head: nothing is decoded. Raises PictureError as `read_picture`."""
    try:
        with _opened(data, kinds) as picture:
            _require_size(picture, name, len(data), MAX_PIXELS)
            width, height = picture.size
            return (width, height) if (_tags(picture, data).orientation or 1) >= 5 else (height, width)
    except PictureError:
        raise
    except Exception as error:
        raise _unreadable(error, data, name, kinds) from error


def picture_tags(head: bytes) -> Exif:
    """The tags and the size of a JPG, PNG or TIFF by its first bytes; no size if they hold no readable header."""
    with contextlib.suppress(Exception), _opened(head, ("JPG", "PNG", "TIFF")) as picture:
        width, height = picture.size
        return replace(_tags(picture, head), size=(height, width))
    return Exif()


def kind_of(data: bytes) -> str | None:
    """The kind of file by its first bytes, e.g. "HEIC"; "TIFF or RAW" for both; None if unknown."""
    return next((kind for start, magic, kind in _MAGIC if data[start:].startswith(magic)), None)


def _unreadable(error: Exception, data: bytes, name: str, kinds: tuple[str, ...]) -> PictureError:
    if isinstance(error, Image.UnidentifiedImageError):
        if (found := kind_of(data)) and any(kind in found for kind in kinds):
            return PictureError(f"{name}: expected a complete {found}, got a damaged one; copy or export it again")
        return PictureError(f"{name}: expected a readable {_listed(kinds)}, got {_kind(data)}; export it again")
    reason = " ".join(str(error).split()) or "damaged data"
    return PictureError(f"{name}: expected a readable {_listed(kinds)}, got {reason}; copy or export it again")


def colour_space(head: bytes) -> str | None:
    """The colour space that a JPG's first bytes state, e.g. "Display P3"; None for sRGB or if it is not stated."""
    with contextlib.suppress(Exception), _opened(head, ("JPG",)) as picture:
        found = _space(picture, read_exif(head), head, "")
        return found.name if found else None
    return None


@contextlib.contextmanager
def _opened(data: bytes, kinds: tuple[str, ...]) -> Iterator[Image.Image]:
    """The picture before it is decoded. The size is checked by us, so that a limit has one message."""
    with PROCESS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            picture = Image.open(io.BytesIO(data), formats=[KINDS[kind] for kind in kinds])
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with picture:
        yield picture


def _require_size(picture: Image.Image, name: str, size: int, max_pixels: int) -> None:
    width, height = picture.size
    if picture.format in ("JPEG", "MPO") and width * height > _MAX_PIXELS_PER_BYTE * size:
        raise PictureError(
            f"{name}: expected a complete JPG, got {size} bytes that declare {width}x{height} pixels; copy it again"
        )
    if width * height > max_pixels:
        raise PictureError(
            f"{name}: expected at most {max_pixels / 1e6:.0f} megapixels, got {width}x{height} = "
            f"{width * height / 1e6:.0f}; reduce or crop it"
        )


def _require_intact(picture: Image.Image, data: bytes, name: str) -> None:
    damage = jpeg_damage(data) if picture.format in ("JPEG", "MPO") else None
    if damage:
        raise PictureError(f"{name}: expected an intact JPG, got {damage}; copy or export it again")


def _bits(picture: Image.Image, data: bytes) -> int:
    """Bits per sample: Pillow would read 16-bit RGB as 8 bits."""
    if picture.format == "PNG":
        return data[24]
    if picture.format == "TIFF":
        return max(picture.tag_v2.get(258, (8,)))  # type: ignore[attr-defined]
    return 8


def _tags(picture: Image.Image, data: bytes) -> Exif:
    """The EXIF tags. A TIFF counts as not turned, because both decoders turn it."""
    if picture.format in ("PNG", "WEBP", "AVIF"):
        return read_exif(picture.info.get("exif", b"").removeprefix(_EXIF_HEADER))
    tags = read_exif(data)
    return replace(tags, orientation=None) if picture.format == "TIFF" else tags


def _read_8_bit(
    picture: Image.Image, data: bytes, name: str, space: "_Space | None"
) -> tuple[Image.Image, tuple[str, ...]]:
    """(RGB picture in sRGB, notes)"""
    notes = []
    alpha = None
    if picture.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
    elif picture.mode not in ("1", "L", "P", "RGB", "YCbCr"):
        raise PictureError(f"{name}: expected an RGB or grey picture, got {picture.mode}; export it as sRGB")
    if space and space.profile_mode == "L" and picture.mode != "L":
        space = None  # a grey profile in a colour picture is a writer's mistake
    if space:
        notes.append(space.note)
        grey = picture.mode == "L" and space.profile_mode == "L"
        picture = space.convert(picture if grey or picture.mode == "RGB" else picture.convert("RGB"))
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    if alpha is not None and np.asarray(alpha).min() < 255:
        notes.append(_ON_WHITE)
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    return rgb, tuple(notes)


_ON_WHITE = "transparent parts composited on white"


def _read_deep(
    picture: Image.Image, data: bytes, name: str, space: "_Space | None"
) -> tuple[NDArray[np.uint16], tuple[str, ...]]:
    """The same for 16 bits per sample: uint16 [H, W, 3]."""
    notes = []
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint16 or decoded.shape[:2] != picture.size[::-1]:
        got = "other data" if decoded is None else f"{decoded.dtype} data"
        raise PictureError(f"{name}: expected 8 or 16 bits per sample, got {got}; export it again")
    if decoded.ndim == 2:
        decoded = decoded[..., None]
    channels = decoded.shape[2]
    rgb = decoded[..., [2, 1, 0]] if channels >= 3 else np.repeat(decoded[..., :1], 3, axis=2)
    if space:
        notes.append(space.note)
        if space.matrix is None:
            raise PictureError(
                f"{name}: expected a profile with a matrix for 16-bit colours, got {space.name}; export it as sRGB"
            )
        rgb = _by_matrix(rgb, space.matrix)
    if channels in (2, 4) and decoded[..., -1].min() < 65535:
        notes.append(_ON_WHITE)
        opacity = decoded[..., -1:].astype(np.float32) / 65535
        rgb = np.rint(65535 + (rgb.astype(np.float32) - 65535) * opacity).astype(np.uint16)
    return np.ascontiguousarray(rgb), tuple(notes)


@dataclass(frozen=True)
class _Space:
    """A colour space other than sRGB."""

    name: str
    profile_mode: str
    """RGB or L."""
    transform: Any
    """littlecms's, to 8-bit sRGB; None: use the matrix."""
    matrix: MatrixProfile | None

    @property
    def note(self) -> str:
        return f"colours converted from {self.name} to sRGB"

    def convert(self, picture: Image.Image) -> Image.Image:
        if self.transform is not None:
            converted = ImageCms.applyTransform(picture, self.transform)
            assert converted is not None  # only with inPlace
            return converted
        assert self.matrix is not None
        pixels: NDArray[Any] = np.asarray(picture)
        return Image.fromarray(_by_matrix(pixels, self.matrix))


_ADOBE = _Space("Adobe RGB", "RGB", None, ADOBE_RGB)


def _space(picture: Image.Image, tags: Exif, data: bytes, name: str) -> _Space | None:
    """The picture's colour space by its profile, by numbers, or else by EXIF; None for sRGB and a damaged profile."""
    profile = picture.info.get("icc_profile")
    numbers = picture.format in ("PNG", "AVIF")
    if profile and not (numbers and outranks_profile(data)):
        return _space_of_profile(profile)
    try:
        found = stated_space(data) if numbers else None
    except HighDynamicRange as error:
        raise PictureError(
            f"{name}: expected a picture of standard dynamic range, got HDR ({error}); export it as sRGB"
        ) from error
    if found:
        return _unless_srgb(_Space(found[0], "RGB", None, found[1]))
    # DCF: Adobe RGB is "uncalibrated" with the interoperability index R03. Many writers leave the index out.
    uncalibrated = tags.colour_space == _UNCALIBRATED and (tags.interoperability or "R03") == "R03"
    return _ADOBE if uncalibrated or tags.colour_space == _ADOBE_BY_SOME else None


def _unless_srgb(space: _Space) -> _Space | None:
    """The space; None if it leaves colours as they are."""
    steps = np.linspace(0, 255, 17).round().astype(np.uint8)
    rgb = space.profile_mode == "RGB"
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(17, -1, 3) if rgb else steps[None]
    before = Image.fromarray(colours)
    change = np.asarray(space.convert(before), np.int16) - np.asarray(before.convert("RGB"), np.int16)
    return space if np.abs(change).max() > _SAME_COLOUR else None


@lru_cache(maxsize=8)
def _space_of_profile(profile: bytes) -> _Space | None:
    with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L"}.get(source.profile.xcolor_space.strip())
        if mode is None:
            return None
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(
            source, target, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        )
        name = (source.profile.profile_description or "an unnamed profile").replace("\x00", "").strip()
        space = _Space(name, mode, transform, read_matrix_profile(profile) if mode == "RGB" else None)
        return _unless_srgb(space)
    return None


def _by_matrix(rgb_HWC: NDArray[Any], profile: MatrixProfile) -> Any:
    out = np.empty_like(rgb_HWC)
    for top in range(0, len(rgb_HWC), _STRIP_ROWS):
        out[top : top + _STRIP_ROWS] = profile.to_srgb(rgb_HWC[top : top + _STRIP_ROWS])
    return out


def _listed(kinds: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))


def _kind(data: bytes) -> str:
    """What the file is instead, by its first bytes."""
    if not data:
        return "an empty file"
    found = kind_of(data)
    return f"{found} data" if found else "another kind of file"
