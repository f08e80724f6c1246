"""Find zoom sequences in a directory listing, and pair their frames by focal length.

Layout, as in SR-RAW: RAW/NNNNN/NNNNN.ARW + NNNNN.JPG, or the same below RAW/train, RAW/val and RAW/test. Any RAW suffix
in upper or lower case. Other files (e.g. tform.txt) are ignored. Where no sequence has a RAW file, frames are JPG, PNG
or TIFF pictures alone (without_raw/).
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from preprocessing.raw.checks import RAW_SUFFIXES
from preprocessing.raw.exif import Exif
from preprocessing.schema import SPLITS
from preprocessing.storage import Folder

JPG_SUFFIXES = frozenset({"jpg", "jpeg"})
PICTURE_SUFFIXES = JPG_SUFFIXES | {"png", "tif", "tiff"}
"""Of frames without RAW."""
TRUTH_FOLDER = "truth"

MAX_ZOOM_EXCESS = 1.3
"""The largest focal ratio of a pair, as a multiple of the scale (SR-RAW's 240/50 is 1.2 times 4)."""

_CROP_FACTOR_SLACK = 0.05
"""Relative difference of two frames' crop factors that is still rounding, if their tags do not name two lenses."""

KNOWN_BAD = ("00350/00001", "00350/00002", "00350/00003", "00560/00003", "00267/00003")
"""SR-RAW's frames with a broken JPG, as sequence/frame."""


@dataclass(frozen=True)
class File:
    """A file by its path below the RAW folder, and its size in bytes."""

    path: str
    size: int

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Frame:
    """One exposure: the files that share a stem. With more than one RAW, or more than one JPG, it is unusable."""

    stem: str
    raws: tuple[File, ...]
    jpgs: tuple[File, ...]
    """In a folder without RAW also PNG and TIFF."""


@dataclass(frozen=True)
class Sequence:
    """One scene at several focal lengths."""

    name: str
    folder: str
    """Path below the RAW folder; "" if RAW itself is the sequence."""
    split: str | None
    """train, val or test if the sequence is in a folder of that name, else None."""
    frames: tuple[Frame, ...]
    truth: tuple[File, ...] = ()
    """The simulator's ground truth, in the sequence's truth/ folder."""


@dataclass(frozen=True)
class Shot:
    """A frame and its EXIF tags."""

    frame: Frame
    exif: Exif
    colour_space: str | None = None
    """That of its JPG; None for sRGB."""


@dataclass
class _Listing:
    files: dict[str, list[File]] = field(default_factory=lambda: defaultdict(list))
    truth: dict[str, list[File]] = field(default_factory=lambda: defaultdict(list))


def discover(raw: Folder, not_utf_8: list[str] | None = None) -> list[Sequence]:
    """All sequences below `raw`, sorted by folder. Uses one recursive listing and opens no file.

    PNG and TIFF are frames only where no sequence has a RAW file.

    `not_utf_8` receives the paths of pictures whose names are not UTF-8, the foreign bytes as \\xNN; they are left out.
    """
    listing = _Listing()
    skipped: list[str] = []
    entries = raw.files(recursive=True, not_utf_8=skipped)
    if not_utf_8 is not None:
        not_utf_8 += sorted(path for path in skipped if _is_picture(path))
    for entry in entries:
        folder, _, name = raw.relative(entry.path).rpartition("/")
        if name.startswith("."):
            continue
        file = File(f"{folder}/{name}".lstrip("/"), entry.size)
        if _is_sequence_folder(folder):
            listing.files[folder].append(file)
        elif folder.rpartition("/")[2] == TRUTH_FOLDER:
            listing.truth[folder.rpartition("/")[0]].append(file)
    found = []
    has_raw = any(_suffix(file.name) in RAW_SUFFIXES for files in listing.files.values() for file in files)
    for folder, files in sorted(listing.files.items()):
        frames = _frames(files, JPG_SUFFIXES if has_raw else PICTURE_SUFFIXES)
        if frames:
            name = (folder or raw.root).rpartition("/")[2]
            split = folder.partition("/")[0] if "/" in folder else None
            truth = tuple(sorted(listing.truth[folder], key=lambda file: file.path))
            found.append(Sequence(name, folder, split, frames, truth))
    return found


def pair(shots: Iterable[Shot], scale: int, *, render_missing: bool = False) -> list[tuple[Shot, Shot]]:
    """(LR, HR) pairs. Each HR frame gets the LR frame with the smallest focal ratio in [1, MAX_ZOOM_EXCESS] x scale.

    An LR frame needs a RAW and a JPG, an HR frame a JPG; with `render_missing` a missing JPG is rendered from the RAW.
    Of several LR frames with equal focal lengths, the first by name is used. Shots without a focal length are ignored.
    """
    known = sorted((shot for shot in shots if shot.exif.focal_mm), key=lambda shot: shot.frame.stem)
    pairs = []
    for hr in known:
        candidates = [
            (ratio(lr, hr), index)
            for index, lr in enumerate(known)
            if len(lr.frame.raws) == 1 and _has_picture(lr, render_missing) and _fits(ratio(lr, hr), scale)
        ]
        if _has_picture(hr, render_missing) and candidates:
            pairs.append((known[min(candidates)[1]], hr))
    return pairs


def _has_picture(shot: Shot, render_missing: bool) -> bool:
    rendered = render_missing and not shot.frame.jpgs and len(shot.frame.raws) == 1
    return len(shot.frame.jpgs) == 1 or rendered


def ratio(lr: Shot, hr: Shot) -> float:
    """HR focal length / LR focal length; both must be known.

    Phones have a sensor of its own behind each lens. The ratio is then that of the 35 mm equivalents.
    """
    assert lr.exif.focal_mm and hr.exif.focal_mm
    if _other_sensor(lr.exif, hr.exif):
        assert lr.exif.focal_35mm and hr.exif.focal_35mm
        return hr.exif.focal_35mm / lr.exif.focal_35mm
    return hr.exif.focal_mm / lr.exif.focal_mm


def _other_sensor(lr: Exif, hr: Exif) -> bool:
    """Whether the frames' crop factors differ by more than the rounding of the 35 mm equivalents to whole mm.

    A zoom lens's crop factor is constant, but cameras round generously: allow more unless the tags name two lenses.
    """
    if not (lr.focal_mm and hr.focal_mm and lr.focal_35mm and hr.focal_35mm):
        return False
    slack = 1.0 if lr.lens and hr.lens and lr.lens != hr.lens else 1 + _CROP_FACTOR_SLACK
    (low_lr, high_lr), (low_hr, high_hr) = (
        ((full - 0.5) / focal, (full + 0.5) / focal)
        for full, focal in ((lr.focal_35mm, lr.focal_mm), (hr.focal_35mm, hr.focal_mm))
    )
    return low_lr > high_hr * slack or low_hr > high_lr * slack


def is_excluded(sequence: str, stem: str, excluded: Iterable[str]) -> bool:
    """Whether "sequence/frame" or the whole "sequence" is among `excluded`."""
    names = set(excluded)
    return sequence in names or f"{sequence}/{stem}" in names


def read_exclusions(path: str | Path) -> tuple[str, ...]:
    """Read names to exclude, one per line: a sequence ("00350") or a frame ("00350/00001", with or without suffix).

    "#" starts a comment. Raises OSError if the file cannot be read, ValueError for a malformed line.
    """
    names = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        text = line.partition("#")[0].strip().strip("/")
        if not text:
            continue
        sequence, _, frame = text.partition("/")
        if not sequence or "/" in frame:
            raise ValueError(f"{path}, line {number}: expected SEQUENCE or SEQUENCE/FRAME (00350/00001), got {text!r}")
        stem = frame.rpartition(".")[0] if _suffix(frame) in RAW_SUFFIXES | PICTURE_SUFFIXES else frame
        names.append(f"{sequence}/{stem}" if stem else sequence)
    return tuple(names)


def is_jpg(file: File) -> bool:
    """Whether the file is a JPG by its name."""
    return _suffix(file.name) in JPG_SUFFIXES


def _is_sequence_folder(folder: str) -> bool:
    parts = folder.split("/") if folder else []
    if parts[:1] and parts[0] in SPLITS and len(parts) == 2:
        return parts[1] != TRUTH_FOLDER
    return len(parts) <= 1 and parts != [TRUTH_FOLDER]


def _is_picture(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    return _is_sequence_folder(folder) and not name.startswith(".") and _suffix(name) in RAW_SUFFIXES | PICTURE_SUFFIXES


def _frames(files: list[File], picture_suffixes: frozenset[str]) -> tuple[Frame, ...]:
    raws: dict[str, list[File]] = defaultdict(list)
    jpgs: dict[str, list[File]] = defaultdict(list)
    for file in sorted(files, key=lambda file: file.path):
        stem = file.name.rpartition(".")[0]
        if _suffix(file.name) in RAW_SUFFIXES:
            raws[stem].append(file)
        elif _suffix(file.name) in picture_suffixes:
            jpgs[stem].append(file)
    stems = sorted(raws.keys() | jpgs.keys())
    return tuple(Frame(stem, tuple(raws[stem]), tuple(jpgs[stem])) for stem in stems)


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def _fits(value: float, scale: int) -> bool:
    # EXIF focal lengths are rationals: 4.0 may arrive as 3.9999999.
    return scale * (1 - 1e-6) <= value <= scale * MAX_ZOOM_EXCESS * (1 + 1e-6)
