"""What a run has to zoom: which photographs there are, what their outputs are called, and which outputs are whole.

OUT/.zoomed/ holds options.json (the models and options of everything in OUT) and one empty file per finished
photograph, named KEY.FINGERPRINT.BYTES: KEY is a digest of the output's name, FINGERPRINT one of the photograph (name,
size, time of its last change), the models and the options, and BYTES the output's size. It is written after the output.
So two listings tell what is there and whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.zoom_folder.places import Entry, LocalPlace, Place, PlaceError, open_place
from pipelines.zooming.request import (
    FORMATS,
    Output,
    ZoomError,
    check_output,
    is_photograph_name,
    is_raw_name,
    shown,
    without_twins,
)
from preprocessing.storage import one_line

RECORDS = ".zoomed"
OPTIONS = f"{RECORDS}/options.json"
_VERSION = 1
_RECORD = re.compile(rf"{re.escape(RECORDS)}/([0-9a-f]{{32}})\.([0-9a-f]{{16}})\.(\d+)")


@dataclass(frozen=True)
class Job:
    """One photograph to zoom."""

    source: str
    """URI of the place that it lies in."""
    path: str
    """In that place."""
    label: str
    """For messages."""
    output: str
    """In OUT."""
    fingerprint: str

    def record(self, size: int) -> str:
        """The name in OUT of the file that says that an output of `size` bytes is whole."""
        return f"{RECORDS}/{_key(self.output)}.{self.fingerprint}.{size}"


@dataclass
class Plan:
    """The photographs of a run."""

    todo: list[Job] = field(default_factory=list)
    there: int = 0
    """Photographs whose outputs are whole."""
    set_aside: list[tuple[str, str]] = field(default_factory=list)
    """(photograph, reason) of what cannot even be tried."""
    notes: list[str] = field(default_factory=list)
    """One line each, for the user."""
    stale: dict[str, list[str]] = field(default_factory=dict)
    """Output -> its records of other photographs or options."""


@dataclass(frozen=True)
class Source:
    """A folder or bucket of the command line, or one file of it."""

    place: Place
    path: str = ""
    """One file in the place; "": all of it."""
    prefix: str = ""
    """Folder in OUT."""


@dataclass(frozen=True)
class _Found:
    source: Source
    entry: Entry
    name: str
    """In OUT, with the photograph's suffix."""

    @property
    def label(self) -> str:
        return self.source.place.label(self.entry.path)


def open_sources(inputs: Sequence[str], target: Place) -> list[Source]:
    """One folder's photographs keep their places below OUT. Of several folders each gets one of its own name in OUT.

    Raises ZoomError: nothing there, two folders of one name, or one that is the output folder.
    """
    several = len(inputs) > 1
    sources: list[Source] = []
    for given in dict.fromkeys(inputs):
        place = open_place(given)
        parent, _, name = place.uri.rstrip("/").rpartition("/")
        if isinstance(place, LocalPlace) and not place.root.exists():
            raise ZoomError(f"{place.label()}: expected photographs, got no such file or folder; check the path")
        if _is_file(place):
            folder = open_place(str(Path(given).parent) if isinstance(place, LocalPlace) else parent)
            sources.append(Source(folder, path=name))
            continue
        if place.contains(target) == "":
            raise ZoomError(
                f"-o {target.label()}: expected another folder than that of the photographs, got the same; choose one"
            )
        if several and any(source.prefix == name for source in sources):
            raise ZoomError(f"{place.label()}: expected folders of different names, got two {name}; run sdan twice")
        sources.append(Source(place, prefix=name if several else ""))
    return sources


def listed(sources: Sequence[Source], target: Place) -> list[str]:
    """The names in OUT, with the photographs' suffixes, of all photographs; RAW and the JPG beside it count once.

    Raises ZoomError: no photographs.
    """
    found = _photographs(sources, target, Plan())
    if not found:
        labels = ", ".join(source.place.label(source.path) for source in sources)
        raise ZoomError(f"{labels}: expected photographs in this folder, got none; check the path")
    single = [Path(one.name) for one in found if one.source.path]
    kept = without_twins(single, [Path(one.name) for one in found], True, lambda note: None)
    return sorted(str(name) for name in kept)


def recorded(names: Sequence[str], target: Place, scale: int) -> int:
    """How many of these have a record of a finished output in OUT, of whatever model, in any format."""
    keys = {match[1] for entry in target.entries(RECORDS) if (match := _RECORD.fullmatch(entry.path))}
    suffixes = [suffix for suffix, *_ in FORMATS.values()]
    outputs = [output_names(list(names), scale, suffix) for suffix in suffixes]
    return sum(any(_key(each[name]) in keys for each in outputs) for name in names)


def agree_on_options(
    target: Place, options: dict[str, Any], outputs: Iterable[str], *, finished: bool, overwrite: bool
) -> int:
    """Check that OUT is for these options, or make it so. Returns the round, which `overwrite` begins anew.

    Args:
        options: as `options_of`.
        outputs: of this run.
        finished: whether a run has finished any output.

    Raises ZoomError: other options, or outputs that no run has made.
    """
    stored = _stored(target)
    if stored is None:
        existing = sorted(target.sizes(outputs))
        if existing and not overwrite:
            others = f" and {len(existing) - 1} others" if len(existing) > 1 else ""
            raise ZoomError(
                f"-o {target.label(existing[0])}: expected a new file, got an existing one{others}; "
                "choose another -o or add --overwrite"
            )
        if target.create(OPTIONS, _as_json(options, 1)):
            return 1
        stored = _stored(target)  # that of another run, which began meanwhile
    assert stored is not None
    differing = [name for name, value in options.items() if stored["options"].get(name) != value]
    if overwrite or (differing and not finished):
        target.write(OPTIONS, _as_json(options, stored["round"] + 1))
        return int(stored["round"]) + 1
    if differing:
        name = differing[0]
        before, now = (_shown_value(values.get(name)) for values in (stored["options"], options))
        raise ZoomError(
            f"-o {target.label()}: expected the {name} of the run that made it ({before}), got {now}; "
            "choose another -o, or add --overwrite to zoom everything again"
        )
    return int(stored["round"])


def make_plan(
    sources: Sequence[Source],
    target: Place,
    output: Output,
    *,
    scale: int,
    takes_raw: bool,
    options: dict[str, Any],
) -> Plan:
    """List the photographs and what OUT has of them.

    Args:
        scale: of the outputs, for their names.
        takes_raw: of a RAW with a camera JPG the RAW is zoomed, and not the JPG.
        options: what decides about the outputs besides the photograph, JSON.

    Raises ZoomError: no photographs, or `agree_on_options`.
    """
    plan = Plan()
    found = _photographs(sources, target, plan)
    if not found and not plan.set_aside:
        labels = ", ".join(source.place.label(source.path) for source in sources)
        raise ZoomError(f"{labels}: expected photographs in this folder, got none; check the path")
    single = [Path(one.name) for one in found if one.source.path]
    kept = set(without_twins(single, [Path(one.name) for one in found], takes_raw, plan.notes.append))
    found = [one for one in found if Path(one.name) in kept]
    names = output_names([one.name for one in found], scale, FORMATS[output.chosen_format(Path())][0])
    writable = []
    for one in found:
        try:
            if isinstance(target, LocalPlace):
                check_output(Path(target.named) / names[one.name])
            writable.append(one)
        except ZoomError as error:
            plan.set_aside.append((one.label, str(error)))
    records: dict[str, list[str]] = {}
    for entry in target.entries(RECORDS):
        if match := _RECORD.fullmatch(entry.path):
            records.setdefault(match[1], []).append(entry.path)
    outputs = [names[one.name] for one in writable]
    number = agree_on_options(target, options, outputs, finished=bool(records), overwrite=output.overwrite)
    jobs = [_job(one, path, options, number) for one, path in zip(writable, outputs, strict=True)]
    sizes = target.sizes(job.output for job in jobs if _key(job.output) in records)
    for job in jobs:
        of_this = records.get(_key(job.output), [])
        if job.output in sizes and job.record(sizes[job.output]) in of_this:
            plan.there += 1
        else:
            plan.todo.append(job)
            plan.stale[job.output] = of_this
    return plan


def output_names(names: Sequence[str], scale: int, suffix: str) -> dict[str, str]:
    """Photograph -> output: a/b.jpg -> a/b_4x.png.

    Of two that would have one name a RAW becomes b_raw_4x.png, and another keeps its suffix: b.jpg_4x.png.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in sorted(names, key=lambda one: (is_raw_name(Path(one)), one)):
        path = PurePosixPath(name)
        stems = [path.stem, *([f"{path.stem}_raw"] if is_raw_name(Path(name)) else []), path.name]
        of_each = [path.with_name(f"{stem}_{scale}x{suffix}").as_posix() for stem in stems]
        found[name] = next(one for one in of_each if one not in taken)
        taken.add(found[name])
    return found


def options_of(output: Output, models: Mapping[str, str], *, scale: int, strength: float) -> dict[str, Any]:
    """All that decides about an output besides the photograph, as JSON values.

    Args:
        models: what for -> digest.
    """
    kind = output.chosen_format(Path())
    chosen = replace(output, format=kind, bits=output.chosen_bits(Path()), scale=scale, overwrite=False)
    fields = {name: value for name, value in asdict(chosen).items() if name != "overwrite"}
    return json.loads(json.dumps({**models, **fields, "strength": strength}))


def _photographs(sources: Sequence[Source], target: Place, plan: Plan) -> list[_Found]:
    """Each once, sorted by name; without hidden ones, those in OUT, and those in output folders of other runs."""
    found: dict[str, _Found] = {}
    for source in sources:
        unreadable: list[OSError] = []
        entries = _entries(source, unreadable)
        plan.set_aside += [
            (name, f"{name}: expected a readable folder, got {error.strerror}; check its permissions")
            for error in unreadable
            for name in [shown(Path(str(error.filename)))]
        ]
        left_out = {entry.path.removesuffix(OPTIONS) for entry in entries if entry.path.endswith(f"/{OPTIONS}")}
        if inner := source.place.contains(target):
            left_out.discard(f"{inner}/")
        plan.notes += [
            f"{source.place.label(folder)}: made by sdan zoom, so it is left out" for folder in sorted(left_out)
        ]
        skipped = (*left_out, *([f"{inner}/"] if inner else []))
        for entry in entries:
            path = PurePosixPath(entry.path)
            hidden = any(part.startswith(".") for part in path.parts)
            if entry.path.startswith(skipped) or (not source.path and (hidden or not is_photograph_name(Path(path)))):
                continue
            name = (PurePosixPath(source.prefix) / path).as_posix()
            one = _Found(source, entry, name)
            other = found.setdefault(name, one)
            if (other.source.place.uri, other.entry.path) != (source.place.uri, entry.path):
                raise ZoomError(f"{one.label}: expected a unique file name, got that of {other.label}; run sdan twice")
    return [found[name] for name in sorted(found)]


def _is_file(place: Place) -> bool:
    try:
        return place.is_file()
    except OSError as error:
        raise _unreadable(place, error) from error


def _entries(source: Source, unreadable: list[OSError]) -> list[Entry]:
    try:
        return source.place.entries(source.path, unreadable)
    except OSError as error:
        raise _unreadable(source.place, error) from error


def _unreadable(place: Place, error: OSError) -> PlaceError:
    return PlaceError(f"{place.label()}: expected a readable place, got {error.strerror or one_line(error)}; check it")


def _job(one: _Found, output: str, options: dict[str, Any], number: int) -> Job:
    of_photo = [one.name, one.entry.bytes, one.entry.modified_ns]
    digest = hashlib.sha256(json.dumps([of_photo, options, number], sort_keys=True).encode()).hexdigest()
    return Job(one.source.place.uri, one.entry.path, one.label, output, digest[:16])


def _key(output: str) -> str:
    return hashlib.sha256(os.fsencode(output)).hexdigest()[:32]


def _stored(target: Place) -> dict[str, Any] | None:
    data = target.read(OPTIONS)
    if data is None:
        return None
    try:
        stored = json.loads(data)
        if stored["version"] > _VERSION:
            raise ZoomError(f"{target.label(OPTIONS)}: expected version {_VERSION}, got a newer one; upgrade sdan")
        return {"round": int(stored["round"]), "options": dict(stored["options"])}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, ZoomError):
            raise
        raise ZoomError(
            f"{target.label(OPTIONS)}: expected the options of this folder, got a damaged file; "
            "remove it and add --overwrite"
        ) from error


def _as_json(options: dict[str, Any], number: int) -> bytes:
    return json.dumps({"version": _VERSION, "round": number, "options": options}, indent=1).encode()


def _shown_value(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if re.fullmatch("[0-9a-f]{64}", text) else text
