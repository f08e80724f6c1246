"""Plan a run: list RAW, read the frames' tags, pair them, and fingerprint each pair's inputs.

Reads only the first and last 64 KB of most files; no picture is decoded.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

from preprocessing.colour import RenderingCurve
from preprocessing.frames import (
    KNOWN_BAD,
    MAX_ZOOM_EXCESS,
    File,
    Frame,
    Sequence,
    Shot,
    discover,
    is_excluded,
    is_jpg,
    pair,
    ratio,
)
from preprocessing.raw.exif import Exif, read_exif
from preprocessing.raw.libraw_tags import libraw_exif
from preprocessing.raw.picture import colour_space, picture_tags
from preprocessing.schema import SCHEMA_VERSION
from preprocessing.shard_folder.names import QUARANTINE
from preprocessing.storage import Folder
from preprocessing.without_raw.names import by_scene
from preprocessing.without_raw.pairing import UnpairedError, pair_pictures

_READERS = 16
"""Threads that read tags."""
ZOOMS = (1.1, 32.0)
"""Least and largest value of --zoom."""
_MORE_TAGS_BYTES = 1 << 20
"""Bytes searched for tags if the first 64 KB hold none."""


class PreprocessError(ValueError):
    """An error that ends the whole run. The message is one line and says what to do."""


@dataclass(frozen=True)
class PreprocessOptions:
    """How pairs become tiles. Raises PreprocessError for a wrong value."""

    scale: int = 4
    """Zoom from the LR mosaic to the target, 2 to 16."""
    align: str = "scale"
    """"scale": by the focal lengths alone; "ecc": refined by registration."""
    tile_px: int = 96
    """Tile side, packed pixels."""
    stride_px: int = 64
    """Largest distance between the starts of neighbouring tiles, packed pixels; at most tile_px, to leave no gaps."""
    missing_jpg: str = "quarantine"
    """For a RAW without a JPG: "quarantine" the frame, or "render" a picture from the RAW with LibRaw."""
    exclude: tuple[str, ...] = ()
    """Sequences ("00350") and frames ("00350/00001") to leave out, in addition to `frames.KNOWN_BAD`."""
    val: tuple[str, ...] = ()
    """Sequences to put into the val split; this overrides the folder layout and the hash."""
    curve: RenderingCurve | None = None
    """Curve of the renderings (colour.RenderingCurve). None: that of the shards in SHARDS, srgb if there are none."""

    keep_unaligned: bool = False
    """Keep pairs that neither correlate nor register, flagged "unaligned". They are otherwise quarantined."""
    zoom: float | None = None
    """HR focal length / LR focal length of pictures without RAW and without focal lengths in EXIF."""
    pictures: bool = False
    """Whether the sequences are pictures without RAW; `preprocess` finds out."""

    def __post_init__(self) -> None:
        limits = (("--scale", self.scale, 2, 16), ("--tile", self.tile_px, 8, 2048),
                  ("--stride", self.stride_px, 1, self.tile_px))  # fmt: skip
        for name, value, low, high in limits:
            if type(value) is not int or not low <= value <= high:
                raise PreprocessError(f"{name}: expected a whole number from {low} to {high}, got {value!r}")
        if self.zoom is not None and not ZOOMS[0] <= self.zoom <= ZOOMS[1]:
            raise PreprocessError(f"--zoom: expected a number from {ZOOMS[0]:g} to {ZOOMS[1]:g}, got {self.zoom:g}")
        if self.align not in ("scale", "ecc"):
            raise PreprocessError(f"--align: expected scale or ecc, got {self.align!r}")
        if self.missing_jpg not in ("quarantine", "render"):
            raise PreprocessError(f"--missing-jpg: expected quarantine or render, got {self.missing_jpg!r}")
        if self.curve not in (None, *get_args(RenderingCurve)):
            raise PreprocessError(f"--curve: expected {' or '.join(get_args(RenderingCurve))}, got {self.curve!r}")

    @property
    def rendering_curve(self) -> RenderingCurve:
        """`curve`, where None has become the default. Pictures are sRGB."""
        return "srgb" if self.pictures else self.curve or "srgb"

    @property
    def shard_options(self) -> dict[str, int | float | str]:
        """The options that all shards of a folder must share.

        bt709, RAW and no zoom are not named: shards of versions that knew nothing else keep their fingerprints.
        """
        names = ("scale", "align", "tile_px", "stride_px", "missing_jpg")
        shared = {name: getattr(self, name) for name in names}
        if self.zoom is not None:
            shared["zoom"] = self.zoom
        if self.pictures:
            shared["raw"] = "none"
        return shared if self.rendering_curve == "bt709" else shared | {"curve": self.rendering_curve}


@dataclass(frozen=True)
class QuarantineEntry:
    """Something that could not be used, and why."""

    sequence: str
    pair: str
    """A pair ("00006-00002"), a frame ("00002") or the whole sequence ("-")."""
    reason: str


@dataclass(frozen=True)
class PairJob:
    """One pair to turn into one shard. Frames are named by stem, files by path below RAW."""

    sequence: str
    lr: str
    hr: str
    split: str
    fingerprint: str
    """Hash of the input files, the options and the schema version; part of the shard's name."""
    lr_raw: str | None
    """None: a pair of pictures without RAW, lr_jpg and hr_jpg, which may be PNG or TIFF, too."""
    lr_jpg: str | None
    """None: use LibRaw's rendering of lr_raw."""
    hr_jpg: str | None
    hr_raw: str | None
    """Set only if hr_jpg is None: use LibRaw's rendering of it."""
    lr_exif: Exif
    hr_exif: Exif
    zoom: float
    """HR focal length / LR focal length (frames.ratio)."""
    folder: str
    """The sequence's folder below RAW."""
    has_truth: bool
    pixels: int
    """Approximate size of the pair's largest picture; a task's memory depends on it."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "PairJob":
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**fields, "lr_exif": Exif(**fields["lr_exif"]), "hr_exif": Exif(**fields["hr_exif"])})

    @property
    def pair(self) -> str:
        return f"{self.lr}-{self.hr}"

    @property
    def input(self) -> str:
        """The file that the network's input comes from, for messages."""
        return self.lr_raw or self.lr_jpg or ""

    @property
    def key(self) -> str:
        """Identifies the pair in SHARDS; its files' names start with it."""
        return f"{self.sequence}_{self.pair}"

    @property
    def shard(self) -> str:
        """Path of the shard in SHARDS."""
        return f"split={self.split}/{self.key}_{self.fingerprint}.parquet"

    @property
    def quarantine(self) -> str:
        """Path of the pair's quarantine note in SHARDS."""
        return f"{QUARANTINE}/{self.key}.json"


@dataclass
class Plan:
    """Everything that a run may have to do."""

    jobs: list[PairJob] = field(default_factory=list)
    faults: list[QuarantineEntry] = field(default_factory=list)
    """Frames, pairs and sequences that cannot be used."""
    notes: list[str] = field(default_factory=list)
    """One line for the user per excluded frame."""
    sequences: set[str] = field(default_factory=set)
    """Names of all sequences in RAW."""
    excluded: set[str] = field(default_factory=set)
    """Excluded frames, as "sequence/frame"."""


@dataclass(frozen=True)
class Listing:
    """The sequences in RAW."""

    sequences: list[Sequence]
    not_utf_8: list[str]
    """Paths of pictures whose names are not UTF-8."""

    @property
    def pictures(self) -> bool:
        """Whether no frame has a RAW file."""
        return bool(self.sequences) and not any(frame.raws for sequence in self.sequences for frame in sequence.frames)


def list_sequences(raw: Folder) -> Listing:
    """List RAW. Raises OSError if it cannot be read."""
    not_utf_8: list[str] = []
    listing = Listing(discover(raw, not_utf_8), not_utf_8)
    return replace(listing, sequences=by_scene(listing.sequences)) if listing.pictures else listing


def make_plan(
    raw: Folder, options: PreprocessOptions, splits: Mapping[str, str], listing: Listing | None = None
) -> Plan:
    """Read the frames' tags and pair them. `splits`: the split that earlier runs gave each sequence.

    Raises PreprocessError if RAW holds no sequence, or if two sequences or two pairs would get the same shard names.
    """
    listing = listing or list_sequences(raw)
    options = replace(options, pictures=listing.pictures)
    sequences, not_utf_8 = listing.sequences, listing.not_utf_8
    if not sequences:
        got = "no zoom sequence" if raw.exists() else "none"
        if not_utf_8:
            got = f"{len(not_utf_8)} files whose names are not UTF-8, e.g. {not_utf_8[0]}"
        raise PreprocessError(f"{raw.label}: expected folders like 00001/00001.ARW + 00001.JPG, got {got}")
    plan = Plan(sequences={sequence.name for sequence in sequences})
    plan.faults += [_misnamed(raw, path) for path in not_utf_8]
    plan.sequences |= {fault.sequence for fault in plan.faults}
    seen: dict[str, str] = {}
    for sequence in sequences:
        if sequence.name in seen:
            got = f"{seen[sequence.name]} and {sequence.folder}"
            raise PreprocessError(f"{raw.label}: expected one folder {sequence.name}, got {got}; rename one of them")
        seen[sequence.name] = sequence.folder
    with ThreadPoolExecutor(_READERS) as readers:
        for part in readers.map(lambda sequence: _plan_sequence(raw, sequence, options, splits), sequences):
            plan.jobs += part.jobs
            plan.faults += part.faults
            plan.notes += part.notes
            plan.excluded |= part.excluded
    keys: dict[str, PairJob] = {}
    for job in plan.jobs:
        other = keys.setdefault(job.key, job)
        if other is not job:
            raise PreprocessError(
                f"{raw.label}: expected distinct shard names, got {job.key} for sequence {other.sequence} and for "
                f"sequence {job.sequence}; rename one of them"
            )
    return plan


def _misnamed(raw: Folder, path: str) -> QuarantineEntry:
    folder, _, name = path.rpartition("/")
    reason = f"{path}: expected a name in UTF-8, got other bytes; rename the file or its folder"
    return QuarantineEntry((folder or raw.root).rpartition("/")[2], name, reason)


def split_of(name: str) -> str:
    """Split 80/10/10 by the name's SHA-256, so that new sequences never change the split of old ones."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "train" if place < 0.8 else "val" if place < 0.9 else "test"


def _plan_sequence(raw: Folder, sequence: Sequence, options: PreprocessOptions, splits: Mapping[str, str]) -> Plan:
    plan = Plan()
    shots = []
    digests: dict[str, str] = {}
    render_missing = options.missing_jpg == "render"
    for frame in sequence.frames:
        name = f"{sequence.name}/{frame.stem}"
        if is_excluded(sequence.name, frame.stem, (*KNOWN_BAD, *options.exclude)):
            plan.excluded.add(name)
            plan.notes.append(f"{name}: excluded")
            continue
        try:
            shot = _read_tags(raw, frame, digests)
        except OSError as error:
            if not raw.is_local:
                raise  # all retries failed: the storage is at fault, not this frame
            plan.faults.append(QuarantineEntry(sequence.name, frame.stem, f"cannot be read: {error}"))
            continue
        reasons = list(_faults(shot, render_missing=render_missing, pictures=options.pictures))
        if reasons:
            plan.faults.append(QuarantineEntry(sequence.name, frame.stem, "; ".join(reasons)))
        shots.append(shot)
    if sequence.name in options.val:
        split = "val"
    else:
        split = splits.get(sequence.name) or sequence.split or split_of(sequence.name)
    try:
        pairs = _pairs(shots, options)
    except UnpairedError as error:
        plan.faults.append(QuarantineEntry(sequence.name, "-", str(error)))
        return plan
    for lr, hr, zoom in pairs:
        try:
            plan.jobs.append(_job(raw, sequence, lr, hr, zoom, split, options, digests))
        except OSError as error:
            if not raw.is_local:
                raise
            name = f"{lr.frame.stem}-{hr.frame.stem}"
            plan.faults.append(QuarantineEntry(sequence.name, name, f"cannot be read: {error}"))
    return plan


def _pairs(shots: list[Shot], options: PreprocessOptions) -> list[tuple[Shot, Shot, float]]:
    """(LR, HR, focal ratio) of one sequence. Raises UnpairedError if there are frames but no pair."""
    if options.pictures:
        return pair_pictures(shots, options.scale, options.zoom) if shots else []
    pairs = pair(shots, options.scale, render_missing=options.missing_jpg == "render")
    if not pairs and shots:
        raise UnpairedError(_why_no_pair(shots, options.scale))
    return [(lr, hr, ratio(lr, hr)) for lr, hr in pairs]


def _read_tags(raw: Folder, frame: Frame, digests: dict[str, str]) -> Shot:
    """Read the JPG's tags, and the RAW's if those have no focal length. Adds the files' digests to `digests`."""
    found, colours = Exif(), None
    for file in (*frame.jpgs, *frame.raws):
        if found.focal_mm is None:
            first, last = raw.read_ends(file.path)
            digests[file.path] = _digest(first, last)
            colours = colours or (colour_space(first) if file in frame.jpgs else None)
            if file in frame.jpgs and not is_jpg(file):
                found = _joined(found, picture_tags(first))
                if found.focal_mm is None and file.size > len(first):  # PNG and TIFF may have them at their ends
                    found = _joined(found, picture_tags(raw.read(file.path)))
                continue
            found = _joined(found, read_exif(first))
            if found.focal_mm is None and file.size > len(first):
                found = _joined(found, read_exif(raw.read(file.path, _MORE_TAGS_BYTES)))
    if found.focal_mm is None and len(frame.raws) == 1:
        # Some RAW files have their tags behind the picture, or in a form that only LibRaw knows.
        data = raw.read(frame.raws[0].path)
        found = _joined(found, read_exif(data))
        if found.focal_mm is None:
            found = _joined(found, libraw_exif(data))
    return Shot(frame, found, colours)


def _joined(found: Exif, more: Exif) -> Exif:
    """`found`, with its missing tags from `more`."""
    return replace(more, **{name: value for name, value in asdict(found).items() if value is not None})


def _faults(shot: Shot, *, render_missing: bool, pictures: bool) -> Iterator[str]:
    """Reasons why the frame cannot be used, or can be used only in part."""
    frame = shot.frame
    if pictures:
        if len(frame.jpgs) > 1:
            yield f"expected one picture, got {', '.join(file.name for file in frame.jpgs)}; keep one"
        return
    for kind, files in (("RAW", frame.raws), ("JPG", frame.jpgs)):
        if not files and not (kind == "JPG" and render_missing):
            remedy = "add it, or exclude the frame" + (", or use --missing-jpg render" if kind == "JPG" else "")
            yield f"expected a {kind} file beside {(frame.raws + frame.jpgs)[0].name}, got none; {remedy}"
        elif len(files) > 1:
            yield f"expected one {kind} file, got {', '.join(file.name for file in files)}; keep one"
    if shot.exif.focal_mm is None:
        yield "expected EXIF FocalLength in JPG or RAW, got none; restore the tags or exclude the frame"


def _why_no_pair(shots: list[Shot], scale: int) -> str:
    if len(shots) == 1:
        return "expected at least two frames of different focal lengths, got one"
    known = [shot for shot in shots if shot.exif.focal_mm]
    if len(known) < 2:
        return f"expected a focal length in at least two frames, got {len(known)} of {len(shots)}"
    focals = ", ".join(f"{value:g}" for value in sorted({shot.exif.focal_mm or 0.0 for shot in known}))
    return (
        f"expected two usable frames with a focal ratio of {scale} to {MAX_ZOOM_EXCESS * scale:g}, got focal lengths "
        f"{focals} mm; use another --scale"
    )


def _job(
    raw: Folder,
    sequence: Sequence,
    lr: Shot,
    hr: Shot,
    zoom: float,
    split: str,
    options: PreprocessOptions,
    digests: dict[str, str],
) -> PairJob:
    inputs = (*lr.frame.raws, *lr.frame.jpgs, *(hr.frame.jpgs or hr.frame.raws))
    identity: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "options": options.shard_options,
        "sequence": sequence.name,
        "pair": [lr.frame.stem, hr.frame.stem],
        "focal_mm": [lr.exif.focal_mm, hr.exif.focal_mm],
        "inputs": [_identity(raw, file, digests) for file in inputs],
        "truth": [_identity(raw, file, digests) for file in _truth_of(sequence, lr.frame.stem, hr.frame.stem)],
    }
    if lr.colour_space or hr.colour_space:
        identity["colour_spaces"] = [lr.colour_space, hr.colour_space]  # version 0.2 took them for sRGB
    if not (lr.exif.focal_mm and hr.exif.focal_mm) or zoom != hr.exif.focal_mm / lr.exif.focal_mm:
        identity["zoom"] = zoom  # stated, or from the 35 mm equivalents
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return PairJob(
        sequence=sequence.name,
        lr=lr.frame.stem,
        hr=hr.frame.stem,
        split=split,
        fingerprint=digest,
        lr_raw=lr.frame.raws[0].path if lr.frame.raws else None,
        lr_jpg=lr.frame.jpgs[0].path if lr.frame.jpgs else None,
        hr_jpg=hr.frame.jpgs[0].path if hr.frame.jpgs else None,
        hr_raw=None if hr.frame.jpgs else hr.frame.raws[0].path,
        lr_exif=lr.exif,
        hr_exif=hr.exif,
        zoom=zoom,
        folder=sequence.folder,
        has_truth=bool(sequence.truth) and bool(lr.frame.raws),
        pixels=max(_pixels(lr), _pixels(hr)),
    )


def _truth_of(sequence: Sequence, *stems: str) -> list[File]:
    """The truth files of these frames, and those that belong to no single frame."""
    others = {frame.stem for frame in sequence.frames} - set(stems)
    return [file for file in sequence.truth if file.name.partition(".")[0] not in others]


def _identity(raw: Folder, file: File, digests: dict[str, str]) -> list[str | int]:
    """[name, size in bytes, digest of both ends]: changes if the file does."""
    if file.path not in digests:
        digests[file.path] = _digest(*raw.read_ends(file.path))
    return [file.name, file.size, digests[file.path]]


def _digest(first: bytes, last: bytes) -> str:
    return hashlib.sha256(first + last).hexdigest()


def _pixels(shot: Shot) -> int:
    """Upper estimate: the size in the tags or one pixel per two bytes of RAW; without a size, one pixel per byte."""
    from_raw = max((file.size for file in shot.frame.raws), default=0)
    if shot.exif.size:
        return max(math.prod(shot.exif.size), from_raw // 2)
    return from_raw or max((file.size for file in shot.frame.jpgs), default=0)
