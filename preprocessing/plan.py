"""What there is to do: pairs with their inputs' fingerprint, and what cannot become a pair, from listings and the
files' ends alone. No picture is decoded here."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from preprocessing.frames import (
    KNOWN_BAD,
    MAX_ZOOM_EXCESS,
    File,
    Frame,
    Sequence,
    Shot,
    discover,
    is_excluded,
    pair,
    ratio,
)
from preprocessing.raw.exif import Exif, read_exif
from preprocessing.schema import SCHEMA_VERSION
from preprocessing.storage import Folder

_READERS = 16
_MORE_TAGS_BYTES = 1 << 20


class PreprocessError(ValueError):
    """A fault of the whole run (not of one pair); the message is one line: expected, got, what to do."""


@dataclass(frozen=True)
class PreprocessOptions:
    """How pairs become tiles. Checked when constructed (PreprocessError)."""

    scale: int = 4
    """Zoom from the LR mosaic to the target, 2 to 16."""
    align: str = "scale"
    """"scale": by the focal lengths alone; "ecc": refined by registration."""
    tile_px: int = 96
    """Tile side, packed pixels."""
    stride_px: int = 64
    """At most so far from tile to tile, packed pixels; at most tile_px, or pixels between tiles would be lost."""
    missing_jpg: str = "quarantine"
    """What becomes of a RAW without a JPG beside it: "quarantine", or "render": LibRaw's rendering stands in."""
    exclude: tuple[str, ...] = ()
    """Sequences ("00350") and frames ("00350/00001") to leave out, beside SR-RAW's known bad ones."""
    val: tuple[str, ...] = ()
    """Sequences that go to val whatever their hash says."""

    def __post_init__(self) -> None:
        for name, low, high in (("scale", 2, 16), ("tile_px", 8, 2048), ("stride_px", 1, self.tile_px)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise PreprocessError(f"{name}={value!r}, expected a whole number from {low} to {high}")
        if self.align not in ("scale", "ecc"):
            raise PreprocessError(f"align={self.align!r}, expected scale or ecc")
        if self.missing_jpg not in ("quarantine", "render"):
            raise PreprocessError(f"missing_jpg={self.missing_jpg!r}, expected quarantine or render")

    @property
    def of_shards(self) -> dict[str, int | str]:
        """Those that all shards of a folder share."""
        names = ("scale", "align", "tile_px", "stride_px", "missing_jpg")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class QuarantineEntry:
    """Something that could not be used: a pair ("00006-00002"), a frame ("00002") or a whole sequence ("-")."""

    sequence: str
    pair: str
    reason: str


@dataclass(frozen=True)
class PairJob:
    """All that a task needs to know to turn one pair into one shard."""

    sequence: str
    lr: str
    hr: str
    split: str
    fingerprint: str
    lr_raw: str
    lr_jpg: str | None
    """None: the rendering of lr_raw stands in."""
    hr_jpg: str | None
    hr_raw: str | None
    """Only where there is no hr_jpg: its rendering stands in."""
    lr_exif: Exif
    hr_exif: Exif
    zoom: float
    folder: str
    has_truth: bool
    pixels: int
    """Of the largest of its pictures, about: what a task's memory depends on."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "PairJob":
        """The way back from `dataclasses.asdict`."""
        return cls(**{**fields, "lr_exif": Exif(**fields["lr_exif"]), "hr_exif": Exif(**fields["hr_exif"])})

    @property
    def pair(self) -> str:
        return f"{self.lr}-{self.hr}"

    @property
    def key(self) -> str:
        """What the pair's files are called, without the fingerprint."""
        return f"{self.sequence}_{self.pair}"

    @property
    def shard(self) -> str:
        """The shard's path in SHARDS."""
        return f"split={self.split}/{self.key}_{self.fingerprint}.parquet"

    @property
    def quarantine(self) -> str:
        return f"quarantine/{self.key}.json"


@dataclass
class Plan:
    jobs: list[PairJob] = field(default_factory=list)
    faults: list[QuarantineEntry] = field(default_factory=list)
    """Frames and sequences that no pair could be made of."""
    notes: list[str] = field(default_factory=list)
    """What was left out on purpose."""
    sequences: set[str] = field(default_factory=set)
    excluded: set[str] = field(default_factory=set)
    """Sequences and sequence/frame names that were left out."""


def make_plan(raw: Folder, options: PreprocessOptions, splits: Mapping[str, str]) -> Plan:
    """List RAW, read the frames' tags, pair them. `splits`: where earlier runs put a sequence.

    Raises PreprocessError when RAW holds no sequence at all, or two sequences or pairs that would share a file name.
    """
    sequences = discover(raw)
    if not sequences:
        state = "holds no zoom sequence" if raw.exists() else "does not exist"
        raise PreprocessError(f"{raw.label}: {state}; expected folders like 00001/00001.ARW + 00001.JPG")
    plan = Plan(sequences={sequence.name for sequence in sequences})
    seen: dict[str, str] = {}
    for sequence in sequences:
        if sequence.name in seen:
            where = f"{seen[sequence.name]} and {sequence.folder}"
            raise PreprocessError(f"{raw.label}: sequence {sequence.name} is in both {where}; rename one of them")
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
                f"{raw.label}: {other.pair} of sequence {other.sequence} and {job.pair} of {job.sequence} would share "
                "a file name; rename one of the sequences"
            )
    return plan


def split_of(name: str) -> str:
    """80/10/10 by the name's SHA-256: new sequences never move old ones."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "train" if place < 0.8 else "val" if place < 0.9 else "test"


def _plan_sequence(raw: Folder, sequence: Sequence, options: PreprocessOptions, splits: Mapping[str, str]) -> Plan:
    plan = Plan()
    shots = []
    digests: dict[str, str] = {}
    for frame in sequence.frames:
        name = f"{sequence.name}/{frame.stem}"
        if is_excluded(sequence.name, frame.stem, (*KNOWN_BAD, *options.exclude)):
            plan.excluded.add(name)
            plan.notes.append(f"{name}: excluded")
            continue
        try:
            shot = _look(raw, frame, digests)
        except OSError as error:
            if not raw.is_local:
                raise  # after all retries: the bucket's fault rather than the frame's
            plan.faults.append(QuarantineEntry(sequence.name, frame.stem, f"cannot be read: {error}"))
            continue
        reasons = list(_faults(shot, render_missing=options.missing_jpg == "render"))
        if reasons:
            plan.faults.append(QuarantineEntry(sequence.name, frame.stem, "; ".join(reasons)))
        shots.append(shot)
    if sequence.name in options.val:
        split = "val"
    else:
        split = splits.get(sequence.name) or sequence.split or split_of(sequence.name)
    pairs = pair(shots, options.scale, render_missing=options.missing_jpg == "render")
    if not pairs and shots:
        plan.faults.append(QuarantineEntry(sequence.name, "-", _why_no_pair(shots, options.scale)))
    for lr, hr in pairs:
        try:
            plan.jobs.append(_job(raw, sequence, lr, hr, split, options, digests))
        except OSError as error:
            if not raw.is_local:
                raise
            name = f"{lr.frame.stem}-{hr.frame.stem}"
            plan.faults.append(QuarantineEntry(sequence.name, name, f"cannot be read: {error}"))
    return plan


def _look(raw: Folder, frame: Frame, digests: dict[str, str]) -> Shot:
    """The frame's tags: the JPG's, what it lacks from the RAW's. What was read on the way goes into `digests`."""
    found = Exif()
    for file in (*frame.jpgs, *frame.raws):
        if found.focal_mm is None:
            first, last = raw.read_ends(file.path)
            digests[file.path] = _digest(first, last)
            more = read_exif(first)
            if more.focal_mm is None and file.size > len(first):
                # Without a JPG the RAW is all there is, and some writers put their tags behind the picture.
                more = read_exif(raw.read(file.path, _MORE_TAGS_BYTES if frame.jpgs else None))
            known = {name: value for name, value in asdict(found).items() if value is not None}
            found = replace(more, **known)
    return Shot(frame, found)


def _faults(shot: Shot, *, render_missing: bool) -> Iterator[str]:
    frame = shot.frame
    for kind, files in (("RAW", frame.raws), ("JPG", frame.jpgs)):
        if not files and not (kind == "JPG" and render_missing):
            remedy = "add it, or exclude the frame" + (", or use --missing-jpg render" if kind == "JPG" else "")
            yield f"no {kind} file beside {(frame.raws + frame.jpgs)[0].name}; {remedy}"
        elif len(files) > 1:
            yield f"{len(files)} {kind} files ({', '.join(file.name for file in files)}), expected one; keep one"
    if shot.exif.focal_mm is None:
        yield "no focal length in the tags of JPG or RAW (EXIF FocalLength); restore the tags or exclude the frame"


def _why_no_pair(shots: list[Shot], scale: int) -> str:
    if len(shots) == 1:
        return "only one frame, expected at least two of different focal lengths"
    known = [shot for shot in shots if shot.exif.focal_mm]
    if len(known) < 2:
        return f"{len(known)} of {len(shots)} frames have a focal length, expected at least two"
    focals = ", ".join(f"{value:g}" for value in sorted({shot.exif.focal_mm or 0.0 for shot in known}))
    return (
        f"no two usable frames {scale} to {MAX_ZOOM_EXCESS * scale:g} times apart (focal lengths: {focals} mm); "
        "use another --scale"
    )


def _job(
    raw: Folder,
    sequence: Sequence,
    lr: Shot,
    hr: Shot,
    split: str,
    options: PreprocessOptions,
    digests: dict[str, str],
) -> PairJob:
    inputs = (*lr.frame.raws, *lr.frame.jpgs, *(hr.frame.jpgs or hr.frame.raws))
    identity = {
        "schema": SCHEMA_VERSION,
        "options": options.of_shards,
        "sequence": sequence.name,
        "pair": [lr.frame.stem, hr.frame.stem],
        "focal_mm": [lr.exif.focal_mm, hr.exif.focal_mm],
        "inputs": [_identity(raw, file, digests) for file in inputs],
        "truth": [_identity(raw, file, digests) for file in _truth_of(sequence, lr.frame.stem, hr.frame.stem)],
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return PairJob(
        sequence=sequence.name,
        lr=lr.frame.stem,
        hr=hr.frame.stem,
        split=split,
        fingerprint=digest,
        lr_raw=lr.frame.raws[0].path,
        lr_jpg=lr.frame.jpgs[0].path if lr.frame.jpgs else None,
        hr_jpg=hr.frame.jpgs[0].path if hr.frame.jpgs else None,
        hr_raw=None if hr.frame.jpgs else hr.frame.raws[0].path,
        lr_exif=lr.exif,
        hr_exif=hr.exif,
        zoom=ratio(lr, hr),
        folder=sequence.folder,
        has_truth=bool(sequence.truth),
        pixels=max(_pixels(lr), _pixels(hr)),
    )


def _truth_of(sequence: Sequence, *stems: str) -> list[File]:
    """The truth files of these frames, and those that belong to no frame."""
    others = {frame.stem for frame in sequence.frames} - set(stems)
    return [file for file in sequence.truth if file.name.partition(".")[0] not in others]


def _identity(raw: Folder, file: File, digests: dict[str, str]) -> list[str | int]:
    if file.path not in digests:
        digests[file.path] = _digest(*raw.read_ends(file.path))
    return [file.name, file.size, digests[file.path]]


def _digest(first: bytes, last: bytes) -> str:
    return hashlib.sha256(first + last).hexdigest()


def _pixels(shot: Shot) -> int:
    """Of a frame: its JPG's, or what its RAW can hold (two bytes each as a rule, one where nothing else is known)."""
    from_raw = max((file.size for file in shot.frame.raws), default=0)
    return max(math.prod(shot.exif.size), from_raw // 2) if shot.exif.size else from_raw
