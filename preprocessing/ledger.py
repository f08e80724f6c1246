"""The state of a SHARDS folder: options, finished pairs and quarantine. Read before a run and updated during it.

SHARDS/_dataset.json                                                  options, splits, and the sequences forced to val
SHARDS/split=train|val|test/<sequence>_<pair>_<fingerprint>.parquet   one finished pair
SHARDS/_quarantine/<sequence>_<pair>.json                             why a pair, frame or sequence could not be used
SHARDS/_rate.json                                                     time and size of the last run (estimate.py)
"""

import contextlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NotRequired

import pyarrow as pa
from typing_extensions import TypedDict  # pydantic refuses typing.TypedDict on Python 3.11

from preprocessing.colour import RenderingCurve
from preprocessing.pairs import PairResult
from preprocessing.plan import PairJob, Plan, PreprocessError, PreprocessOptions, QuarantineEntry
from preprocessing.schema import SCHEMA_VERSION, SPLITS, is_shard, stated_curve
from preprocessing.shard_folder.names import DATASET, QUARANTINE, move_older, note_files, read_stored
from preprocessing.shard_folder.set_aside import Note, parse_note
from preprocessing.shard_folder.small_json import SmallJsonError, parse_json
from preprocessing.storage import Folder, open_folder


class _Dataset(TypedDict):
    """_dataset.json"""

    schema_version: int
    options: dict[str, int | float | str]
    val: NotRequired[list[str]]
    splits: NotRequired[dict[str, str]]


@dataclass
class Ledger:
    """The state of one SHARDS folder."""

    target: Folder
    dataset: dict[str, Any] = field(default_factory=dict)
    """_dataset.json; {} for a new folder."""
    shards: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Paths of the shards in SHARDS, by the pair's key."""
    quarantine: dict[str, Note] = field(default_factory=dict)
    """Content of the quarantine notes, by path in SHARDS."""

    @classmethod
    def read(cls, target: Folder, options: PreprocessOptions) -> "Ledger":
        """Options bind once there is a shard.

        Raises PreprocessError if the shards were made with other options, OSError if SHARDS cannot be read.
        """
        ledger = cls(target)
        ledger.shards = ledger._listed()
        stored = read_stored(target, DATASET)
        if stored is not None:
            ledger.dataset = ledger._checked(stored, options)
        for name, path in note_files(target).items():
            # A damaged note will be rewritten. A missing one was removed by a concurrent run.
            with contextlib.suppress(SmallJsonError, FileNotFoundError):
                ledger.quarantine[f"{QUARANTINE}/{name}"] = parse_note(target, path)
        return ledger

    @property
    def splits(self) -> Mapping[str, str]:
        """The split that earlier runs gave each sequence."""
        return self.dataset.get("splits", {})

    @property
    def curve(self) -> RenderingCurve | None:
        """The curve of the renderings in SHARDS; None for a folder without shards."""
        return stated_curve(self.dataset["options"]) if self.dataset and self.has_shards else None

    @property
    def zoom(self) -> float | None:
        """The zoom stated for the pictures without EXIF in SHARDS; None if it is not stated or there are no shards."""
        return self.dataset["options"].get("zoom") if self.dataset and self.has_shards else None

    @property
    def has_shards(self) -> bool:
        return any(self.shards.values())

    @property
    def val(self) -> tuple[str, ...]:
        """The sequences named by `--val` in this or earlier runs."""
        return tuple(self.dataset.get("val", ()))

    def classify(
        self, plan: Plan, *, keep_unaligned: bool = False
    ) -> tuple[list[PairJob], list[PairJob], list[QuarantineEntry]]:
        """Sort the plan's pairs into (to do, done, quarantined by an earlier run with the same inputs).

        keep_unaligned: pairs that were quarantined because their pictures do not show the same thing are to do.
        """
        todo, done, quarantined = [], [], []
        for job in plan.jobs:
            note = self.quarantine.get(job.quarantine)
            if any(path.endswith(f"_{job.fingerprint}.parquet") for path in self.shards[job.key]):
                done.append(job)
            elif not note or note.get("fingerprint") != job.fingerprint or (keep_unaligned and note.get("unaligned")):
                todo.append(job)
            else:
                quarantined.append(QuarantineEntry(job.sequence, job.pair, note["reason"]))
        return todo, done, quarantined

    def prepare(self, plan: Plan, options: PreprocessOptions) -> None:
        """Write _dataset.json. Remove temporary files of killed runs, and shards that the plan makes obsolete."""

        def merge(stored: bytes | None) -> bytes:
            # Keep the sequences that a concurrent run has added to `val` since we read the file.
            self.dataset = self._checked(stored, options) if stored else {}
            val = sorted({*self.val, *options.val})
            splits = {**self.splits, **{job.sequence: job.split for job in plan.jobs}}
            dataset = {
                "schema_version": SCHEMA_VERSION,
                "options": options.shard_options,
                "val": val,
                "splits": {name: "val" if name in val else split for name, split in sorted(splits.items())},
            }
            return json.dumps(dataset, indent=1).encode()

        move_older(self.target)
        self.target.update(DATASET, merge)
        self._sweep()
        for key in self._outdated(plan):
            self._delete(self.shards.pop(key))

    def _outdated(self, plan: Plan) -> list[str]:
        """Keys of shards with a frame that is now excluded, or whose HR frame is now paired with another LR frame."""
        excluded = defaultdict(set)
        for name in plan.excluded:
            sequence, _, stem = name.partition("/")
            excluded[sequence].add(stem)
        planned = {job.key for job in plan.jobs}
        targets = {(job.sequence, job.hr) for job in plan.jobs}
        known = {*self.splits, *plan.sequences}
        found = []
        for key in self.shards.keys() - planned:
            sequence = sequence_of(key, known)
            pair = key.removeprefix(f"{sequence}_")
            is_excluded = any(pair.startswith(f"{stem}-") or pair.endswith(f"-{stem}") for stem in excluded[sequence])
            if is_excluded or (sequence, pair.rpartition("-")[2]) in targets:
                found.append(key)
        return found

    def record(self, job: PairJob, result: PairResult) -> QuarantineEntry | None:
        """Update SHARDS with a pair's result. Returns an entry if the pair was not written."""
        if result.status == "written":
            self.keep_one_shard(job, [*self.shards[job.key], job.shard])
            return None
        note: dict[str, Any] = {
            "sequence": job.sequence,
            "pair": job.pair,
            "fingerprint": None,
            "reason": result.reason,
        }
        if result.status == "quarantined":
            self._delete(self.shards[job.key])  # older versions of the pair, from inputs that have changed
            note["fingerprint"] = job.fingerprint  # skip the pair until its inputs change
            if result.aligned_by == "unaligned":
                note["unaligned"] = True
        self._write(job.quarantine, note)
        return QuarantineEntry(job.sequence, job.pair, result.reason)

    def keep_one_shard(self, job: PairJob, paths: Iterable[str] | None = None) -> None:
        """Keep only the pair's current shard, and move it to its split if `--val` has changed that.

        `paths`: all shards of the pair; by default those listed in `shards`.
        """
        found = list(self.shards[job.key] if paths is None else paths)
        if job.shard not in found:
            same = next(path for path in found if path.endswith(f"_{job.fingerprint}.parquet"))
            self.target.move(same, job.shard)
            found.remove(same)
        self._delete([path for path in found if path != job.shard])

    def finish(self, plan: Plan, options: PreprocessOptions) -> None:
        """Clean up again at the end: a concurrent or killed run may have written files since `prepare`.

        Raises PreprocessError if a concurrent run has started with other options, before there were shards.
        """
        self.shards = self._listed()
        stored = read_stored(self.target, DATASET)
        if stored is not None:
            self._checked(stored, options)
        for job in plan.jobs:
            if any(path.endswith(f"_{job.fingerprint}.parquet") for path in self.shards[job.key]):
                self.keep_one_shard(job)
        self._sweep()

    def update_quarantine(self, entries: Iterable[QuarantineEntry], plan: Plan) -> None:
        """Write notes for the plan's faults, and remove notes of its sequences that are not among `entries`."""
        current = {(entry.sequence, entry.pair) for entry in entries}
        for fault in plan.faults:
            path = f"{QUARANTINE}/{fault.sequence}_{fault.pair}.json"
            if self.quarantine.get(path) != asdict(fault):
                self._write(path, asdict(fault))
        for path, note in self.quarantine.items():
            if note["sequence"] in plan.sequences and (note["sequence"], note["pair"]) not in current:
                self.target.delete(path)

    def count(self) -> dict[str, int]:
        """Number of shards now in each split."""
        return {
            split: sum(is_shard(file.base_name) for file in self.target.files(f"split={split}")) for split in SPLITS
        }

    def _checked(self, stored: bytes, options: PreprocessOptions) -> dict[str, Any]:
        """Parse _dataset.json. Raises PreprocessError if it is damaged or was made with other options."""
        try:
            dataset: dict[str, Any] = {**parse_json(stored, f"{self.target.label}/{DATASET}", _Dataset)}
        except SmallJsonError as error:
            raise PreprocessError(f"{error}; restore it or use another SHARDS folder") from error
        if dataset["schema_version"] != SCHEMA_VERSION:
            raise PreprocessError(
                f"{self.target.label}: expected schema version {SCHEMA_VERSION}, got {dataset['schema_version']}; "
                "preprocess into another (empty) SHARDS folder"
            )
        if self.has_shards:
            _require_same_options(self.target, dataset, options)
        return dataset

    def _listed(self) -> dict[str, list[str]]:
        shards: dict[str, list[str]] = defaultdict(list)
        for split in SPLITS:
            for entry in self.target.files(f"split={split}"):
                if is_shard(entry.base_name):
                    shards[entry.base_name.rpartition("_")[0]].append(self.target.relative(entry.path))
        return shards

    def _sweep(self) -> None:
        for folder in ("", QUARANTINE, *(f"split={split}" for split in SPLITS)):
            self.target.sweep(folder)

    def _write(self, path: str, content: Mapping[str, Any]) -> None:
        self.target.put(path, json.dumps(content, indent=1).encode())

    def _delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            self.target.delete(path)


def stored_options(shards: str) -> Mapping[str, int | float | str]:
    """The options of the shards in the folder or URI `shards`.

    {} if it holds no shards, and for what Ledger.read will refuse: a folder that cannot be read, a damaged file.
    """
    try:
        target = open_folder(shards)
        if not any(is_shard(entry.base_name) for split in SPLITS for entry in target.files(f"split={split}")):
            return {}
        stored = read_stored(target, DATASET)
        return parse_json(stored, DATASET, _Dataset)["options"] if stored else {}
    except (OSError, pa.ArrowException, SmallJsonError):
        return {}


def _require_same_options(target: Folder, made: Mapping[str, Any], options: PreprocessOptions) -> None:
    was, now = (
        {"curve": stated_curve(each), "raw": "files"} | each
        for each in (made.get("options", {}), options.shard_options)
    )
    asked = [name for name in now if name != "curve" or options.curve is not None]
    different = [name for name in asked if was.get(name) != now[name]]
    if different:
        raise PreprocessError(
            f"{target.label}: expected the options of its shards, "
            f"{', '.join(f'{name}={was.get(name)}' for name in different)}, "
            f"got {', '.join(f'{name}={now[name]}' for name in different)}; "
            "use the same options, or another (empty) SHARDS folder"
        )


def sequence_of(key: str, known: Collection[str]) -> str:
    """The longest known sequence name that the key starts with, or "". "a_1_x-y" belongs to "a_1" if that is known."""
    parts = key.split("_")
    names = ("_".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
    return next((name for name in names if name in known), "")
