"""What `sdan zoom` is asked for, and every check that needs neither a model nor a decoded photograph.

Nothing here imports torch, so that a mistake on the command line is answered at once.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from preprocessing.raw.checks import RAW_SUFFIXES
from preprocessing.raw.picture import kind_of

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".tif", ".tiff", ".webp", ".avif")
FORMATS = {"png": (".png",), "tiff": (".tif", ".tiff"), "jpg": (".jpg", ".jpeg"), "dng": (".dng",)}
"""Format -> suffixes that name it; the first is that of outputs in a folder."""
SCALES = (2, 3, 4, 8)
_HEAD_BYTES = 4096
_OTHERS = {
    *("HEIC", "JPEG XL", "JPEG 2000", "GIF", "BMP", "PSD", "PDF", "ZIP", "OpenEXR", "Radiance HDR", "a video"),
}
_RAW_MAGIC = (
    *((0, b"II*\x00"), (0, b"MM\x00*"), (0, b"IIRO"), (0, b"IIRS"), (0, b"MMOR"), (0, b"IIU\x00"), (0, b"FUJIFILM")),
    *((0, b"\x00MRM"), (0, b"FOVb"), (6, b"HEAPCCDR"), (4, b"ftypcrx"), (0, b"ARRI"), (0, b"IIII"), (0, b"MMMM")),
)


class ZoomError(ValueError):
    """A photograph that cannot be read, or an output that cannot be written; the message says what to do."""


class OutputError(ZoomError):
    """An output that cannot be written: a full disk, or no permission."""


@dataclass(frozen=True)
class Output:
    """How results are written."""

    format: str | None = None
    """png, tiff, jpg or dng; None: by -o's suffix, or else png."""
    bits: int | None = None
    """Per channel; None: 16 for tiff and dng, else 8."""
    quality: int = 95
    """Of jpg, 1 to 100."""
    scale: int | None = None
    """One of SCALES; None: the model's."""
    crop: tuple[int, int, int, int] | None = None
    """(left, top, width, height) in pixels of the upright photograph; None: all of it."""
    overwrite: bool = False
    """Whether existing outputs are replaced."""
    gps: bool = True
    """Whether the place is kept."""
    like_camera: bool = False
    """Whether a RAW gets the tones of its camera's JPG."""

    def chosen_format(self, out: Path) -> str:
        named = next((name for name, suffixes in FORMATS.items() if out.suffix.lower() in suffixes), None)
        return self.format or named or "png"

    def chosen_bits(self, out: Path) -> int:
        return self.bits or (16 if self.chosen_format(out) in ("tiff", "dng") else 8)


DEFAULTS = Output()


def parse_crop(text: str) -> tuple[int, int, int, int]:
    """X,Y,W,H. Raises ZoomError."""
    try:
        left, top, width, height = (int(part) for part in text.split(","))
    except ValueError:
        raise ZoomError(f"--crop: expected X,Y,W,H in pixels, got {text!r}; e.g. --crop 0,0,400,300") from None
    if min(left, top) < 0 or min(width, height) < 1:
        raise ZoomError(f"--crop: expected a corner from 0,0 on and a size of at least 1x1, got {text}")
    return left, top, width, height


def check_device(name: str) -> None:
    """Raise ZoomError for a name that no device has."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise ZoomError(f"--device: expected auto, cpu, cuda or cuda:N, got {name}")


def check_options(out: Path, output: Output) -> None:
    """Raise ZoomError for a value that can never work."""
    if output.format not in (None, *FORMATS):
        raise ZoomError(f"--format: expected png, tiff, jpg or dng, got {output.format}")
    kind = output.chosen_format(out)
    suffix = out.suffix.lower()
    known = [ending for suffixes in FORMATS.values() for ending in suffixes]
    if suffix in (*PICTURE_SUFFIXES, ".heic", ".dng") and not out.is_dir() and suffix not in FORMATS[kind]:
        what = f"a {suffix} file" if suffix in known else f"{suffix}, which sdan does not write"
        wanted = " or ".join(FORMATS[kind]) if output.format else ".png, .tif, .jpg or .dng"
        raise ZoomError(f"-o {shown(out)}: expected {wanted}, or a folder, got {what}; change -o or --format")
    if output.bits not in (None, 8, 16):
        raise ZoomError(f"--bits: expected 8 or 16, got {output.bits}")
    if kind == "jpg" and output.bits == 16:
        raise ZoomError("--bits: expected 8 for a JPG, got 16; use --format tiff or png")
    if kind == "dng" and output.bits == 8:
        raise ZoomError("--bits: expected 16 for a DNG, got 8; leave --bits out")
    if kind == "dng" and output.like_camera:
        raise ZoomError("--like-camera: expected png, tiff or jpg, got dng, which has no tones yet; use one of the two")
    if not 1 <= output.quality <= 100:
        raise ZoomError(f"--quality: expected 1 to 100, got {output.quality}")
    if output.scale not in (None, *SCALES):
        raise ZoomError(f"--scale: expected 2, 3, 4 or 8, got {output.scale}")


def existing_files(inputs: Sequence[Path]) -> list[Path]:
    """The files to zoom, each once. Raises ZoomError: no such file."""
    for path in inputs:
        if not path.exists():
            raise ZoomError(f"{shown(path)}: expected a photograph (RAW, JPG or PNG), got none; check the path")
    return list(dict.fromkeys(inputs))


def is_photograph_name(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES or is_raw_name(path)


def is_raw_name(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in RAW_SUFFIXES


def check_request(inputs: Sequence[Path], out: Path, output: Output) -> None:
    """Every check that needs no model. Raises ZoomError."""
    check_options(out, output)
    photos = existing_files(inputs)
    if len(photos) == 1:
        require_raw(photos[0], out, output)
    named = output.scale is not None or out.suffix.lower() in FORMATS[output.chosen_format(out)]
    # Without a scale the final names are known only after the model is; their length hardly differs.
    targets = output_paths(photos, out, output.scale or 4, output)
    check_outputs(targets, photos, output.overwrite or not named)


def is_batch(inputs: Sequence[str], out: str) -> bool:
    """Whether a folder or a bucket is among these; else they are single photographs."""
    return any("://" in one or Path(one).is_dir() for one in (*inputs, *([out] if "://" in out else [])))


def check_batch(out: str, output: Output) -> None:
    """Every check that needs neither a model nor a listing. Raises ZoomError."""
    check_options(Path(), output)
    suffix = Path(out).suffix.lower()
    if any(suffix in suffixes for suffixes in FORMATS.values()) and not Path(out).is_dir():
        raise ZoomError(f"-o {out}: expected a folder for a folder's photographs, got a {suffix} file; name a folder")


def without_twins(inputs: Sequence[Path], photos: Sequence[Path], raw: bool, say: Callable[[str], None]) -> list[Path]:
    """`photos` without the JPG (or, for a model with RGB input, the RAW) of a pair that lies in a named folder.

    Args:
        inputs: files that the user has named; they are all kept.
        raw: whether the model takes RAW.
    """
    stems = defaultdict(set)
    for photo in photos:
        stems[photo.parent, photo.stem.lower()].add(is_raw_name(photo))
    kept = [
        photo
        for photo in photos
        if photo in inputs or len(stems[photo.parent, photo.stem.lower()]) < 2 or is_raw_name(photo) == raw
    ]
    if len(kept) < len(photos):
        number = len(photos) - len(kept)
        used = "RAW" if raw else "camera JPG"
        say(f"{number} photographs are there as RAW and as JPG: only the {used} is zoomed")
    return kept


def output_paths(photos: Sequence[Path], out: Path, scale: int, output: Output = DEFAULTS) -> list[Path]:
    """The output path of each photograph: `out` itself if it names a picture file, else NAME_4x.png in the folder
    `out`. Where RAW and JPG have the same name, the RAW's is NAME_raw_4x.png; where two RAW or two pictures of
    one folder have it, they are told apart by their suffixes: NAME_jpg_4x.png, NAME_png_4x.png.

    Raises:
        ZoomError: several photographs for one file, or two photographs of one name.
    """
    check_options(out, output)
    suffix = FORMATS[output.chosen_format(out)][0]
    if out.suffix.lower() in FORMATS[output.chosen_format(out)] and not out.is_dir():
        if len(photos) > 1:
            raise ZoomError(
                f"-o {shown(out)}: expected a folder for several photographs, got one {out.suffix} file; name a folder"
            )
        return [out]
    kinds = {photo: is_raw_name(photo) for photo in photos}
    alike = Counter((photo.parent, photo.stem, raw) for photo, raw in kinds.items())
    pictures = {photo.stem for photo, raw in kinds.items() if not raw}
    targets = []
    for photo, raw in kinds.items():
        several = alike[photo.parent, photo.stem, raw] > 1
        added = f"_{photo.suffix[1:].lower()}" if several else "_raw" if raw and photo.stem in pictures else ""
        targets.append(out / f"{photo.stem}{added}_{scale}x{suffix}")
    for number, target in enumerate(targets):
        if target in targets[:number]:
            first = photos[targets.index(target)]
            raise ZoomError(
                f"{shown(photos[number])}: expected a unique file name, got that of {shown(first)}; use two folders"
            )
    return targets


def check_outputs(targets: Iterable[Path], photos: Iterable[Path], overwrite: bool) -> None:
    """Check, before the work starts, that results can be written and replace nothing that they must not."""
    targets, inputs = list(targets), [photo for photo in photos if photo.exists()]
    for target in targets:
        check_output(target)
    existing = [target for target in targets if os.path.lexists(target)]
    for target in existing:
        same = next((photo for photo in inputs if target.exists() and photo.samefile(target)), None)
        if same is not None:
            raise ZoomError(f"-o {shown(target)}: expected a new file, got the photograph itself; choose another -o")
    if existing and not overwrite:
        others = f" and {len(existing) - 1} others" if len(existing) > 1 else ""
        raise ZoomError(
            f"-o {shown(existing[0])}: expected a new file, got an existing one{others}; "
            "choose another -o or add --overwrite"
        )


def check_output(path: Path) -> None:
    """Check that a file of this name can be written."""
    try:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ZoomError(f"-o {shown(path)}: expected a writable folder, got {shown(folder)}; choose another -o")
        longest = os.pathconf(folder, "PC_NAME_MAX")
        for part in path.absolute().relative_to(folder).parts:
            if len(os.fsencode(part)) > longest:
                raise OSError(36, "File name too long")
        if path.is_dir():
            raise ZoomError(f"-o {shown(path)}: expected a file name, got a folder of that name; choose another -o")
    except OSError as error:
        raise ZoomError(
            f"-o {shown(path)[:80]}...: expected a name that can be written, got {error.strerror}; choose another -o"
        ) from error


def kind_of_photo(path: Path) -> str:
    """Tell "picture" from "raw" by the first bytes and, for TIFF-like files, the name. Raises ZoomError for others."""
    try:
        if not path.is_file():
            raise ZoomError(f"{shown(path)}: expected a photograph, got no file; check the path")
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise ZoomError(
            f"{shown(path)}: expected a readable photograph, got {error.strerror}; check its permissions"
        ) from error
    kind = kind_of(head)
    if not head:
        raise ZoomError(f"{shown(path)}: expected a photograph, got an empty file; copy it again")
    if kind in ("JPG", "PNG", "WebP", "AVIF", "BigTIFF"):
        return "picture"
    if kind in _OTHERS:
        raise ZoomError(f"{shown(path)}: expected RAW, JPG, PNG, TIFF, WebP or AVIF, got {kind}; export it as JPG")
    if path.suffix.lower() in PICTURE_SUFFIXES and kind == "TIFF or RAW":
        return "picture"
    if path.suffix.lower() == ".gpr":
        raise ZoomError(f"{shown(path)}: expected RAW that LibRaw decodes, got GoPro's GPR; convert it to DNG")
    if any(head[at:].startswith(magic) for at, magic in _RAW_MAGIC):
        return "raw"
    if path.suffix.lower() in PICTURE_SUFFIXES or _is_text(head) or not is_raw_name(path):
        what = "text" if _is_text(head) else "other data"
        raise ZoomError(f"{shown(path)}: expected a photograph (RAW, JPG or PNG), got {what}: not a photograph")
    return "raw"


def require_raw(photo: Path, out: Path, output: Output) -> None:
    """Raise ZoomError for a picture where only RAW has what the output needs, and for what is no photograph."""
    kind = kind_of_photo(photo)
    if kind == "picture" and output.chosen_format(out) == "dng":
        raise ZoomError(
            f"{shown(photo)}: expected RAW for a DNG, got a finished picture, which has no camera light; "
            "use --format tiff"
        )
    if kind == "picture" and output.like_camera:
        raise ZoomError(
            f"{shown(photo)}: expected RAW for --like-camera, got a picture, which has its camera's tones; "
            "leave out --like-camera"
        )


def _is_text(head: bytes) -> bool:
    return bool(head) and not any(byte < 9 or 13 < byte < 32 for byte in head)


def available_memory() -> int | None:
    """Bytes that this process can still take, of the machine or of its control group; None if unknown."""
    limits = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limits.append(most - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass
    return min(limits) if limits else None


def shown(path: Path) -> str:
    """The path for messages, in one line; bytes that are not UTF-8 as \\xNN, control characters escaped."""
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(
        char if char.isprintable() or char == " " else char.encode("unicode_escape").decode() for char in name
    )
