"""What a SHARDS folder holds: its options, finished pairs and quarantine; read before a run, kept true during it.

SHARDS/dataset.json                                                   options, splits, and the sequences forced to val
SHARDS/split=train|val|test/<sequence>_<pair>_<fingerprint>.parquet   one finished pair
SHARDS/quarantine/<sequence>_<pair>.json                              why a pair, frame or sequence is not among them
SHARDS/rate.json                                                      what the last run took (estimate.py)
"""

import contextlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from preprocessing.pairs import PairResult
from preprocessing.plan import PairJob, Plan, PreprocessError, PreprocessOptions, QuarantineEntry
from preprocessing.schema import SCHEMA_VERSION, SPLITS, is_shard
from preprocessing.storage import Folder

_DATASET = "dataset.json"


@dataclass
class Ledger:
    """The state of one SHARDS folder."""

    target: Folder
    dataset: dict[str, Any] = field(default_factory=dict)
    """dataset.json; {} for a new folder."""
    shards: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Paths in SHARDS by the pair's key."""
    quarantine: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Content by path in SHARDS."""

    @classmethod
    def read(cls, target: Folder, options: PreprocessOptions) -> "Ledger":
        """Raises PreprocessError when the shards were made with other options, OSError when they cannot be read."""
        ledger = cls(target)
        if target.exists(_DATASET):
            ledger.dataset = _checked(target, target.read(_DATASET), options)
        ledger.shards = ledger._listed()
        for entry in target.files("quarantine"):
            if entry.base_name.endswith(".json") and not entry.base_name.startswith("."):
                path = target.relative(entry.path)
                # A damaged note is written anew; one that is gone was mended by a run beside us.
                with contextlib.suppress(json.JSONDecodeError, FileNotFoundError):
                    ledger.quarantine[path] = json.loads(target.read(path))
        return ledger

    @property
    def splits(self) -> Mapping[str, str]:
        """Where earlier runs put each sequence."""
        return self.dataset.get("splits", {})

    @property
    def val(self) -> tuple[str, ...]:
        """What `--val` of earlier runs named."""
        return tuple(self.dataset.get("val", ()))

    def sort_out(self, plan: Plan) -> tuple[list[PairJob], list[PairJob], list[QuarantineEntry]]:
        """(to do, done, given up by an earlier run with the same inputs)."""
        todo, done, given_up = [], [], []
        for job in plan.jobs:
            note = self.quarantine.get(job.quarantine, {})
            if any(path.endswith(f"_{job.fingerprint}.parquet") for path in self.shards[job.key]):
                done.append(job)
            elif note.get("fingerprint") == job.fingerprint:
                given_up.append(QuarantineEntry(job.sequence, job.pair, note["reason"]))
            else:
                todo.append(job)
        return todo, done, given_up

    def prepare(self, plan: Plan, options: PreprocessOptions) -> None:
        """Write dataset.json; remove leftovers of killed runs and the shards of what is excluded or paired anew now."""

        def merge(stored: bytes | None) -> bytes:
            # Another run may have begun since we read it: what it holds out must stay held out.
            self.dataset = _checked(self.target, stored, options) if stored else {}
            val = sorted({*self.val, *options.val})
            splits = {**self.splits, **{job.sequence: job.split for job in plan.jobs}}
            dataset = {
                "schema_version": SCHEMA_VERSION,
                "options": options.of_shards,
                "val": val,
                "splits": {name: "val" if name in val else split for name, split in sorted(splits.items())},
            }
            return json.dumps(dataset, indent=1).encode()

        self.target.update(_DATASET, merge)
        self._sweep()
        for key in self._outdated(plan):
            self._delete(self.shards.pop(key))

    def _outdated(self, plan: Plan) -> list[str]:
        """Keys of shards with a frame that is excluded now, or whose long frame has another short frame now."""
        excluded = defaultdict(set)
        for name in plan.excluded:
            sequence, _, stem = name.partition("/")
            excluded[sequence].add(stem)
        planned = {job.key for job in plan.jobs}
        targets = {(job.sequence, job.hr) for job in plan.jobs}
        known = {*self.splits, *plan.sequences}
        found = []
        for key in self.shards.keys() - planned:
            sequence = _sequence_of(key, known)
            pair = key.removeprefix(f"{sequence}_")
            is_excluded = any(pair.startswith(f"{stem}-") or pair.endswith(f"-{stem}") for stem in excluded[sequence])
            if is_excluded or (sequence, pair.rpartition("-")[2]) in targets:
                found.append(key)
        return found

    def settle(self, job: PairJob, result: PairResult) -> QuarantineEntry | None:
        """Keep the folder true to what became of a pair; its entry if it is quarantined."""
        if result.status == "written":
            self.tidy(job, [*self.shards[job.key], job.shard])
            return None
        note = {"sequence": job.sequence, "pair": job.pair, "fingerprint": None, "reason": result.reason}
        if result.status == "quarantined":
            self._delete(self.shards[job.key])  # made from inputs that are no longer there
            note["fingerprint"] = job.fingerprint  # not tried again while its inputs stay the same
        self._write(job.quarantine, note)
        return QuarantineEntry(job.sequence, job.pair, result.reason)

    def tidy(self, job: PairJob, paths: Iterable[str] | None = None) -> None:
        """Leave one finished file of a pair, in its split (`--val` may have moved it), without older siblings."""
        found = list(self.shards[job.key] if paths is None else paths)
        if job.shard not in found:
            same = next(path for path in found if path.endswith(f"_{job.fingerprint}.parquet"))
            self.target.move(same, job.shard)
            found.remove(same)
        self._delete([path for path in found if path != job.shard])

    def finish(self, plan: Plan) -> None:
        """Once more one file a pair and no leftovers: a killed run, or one beside us, may have written late."""
        self.shards = self._listed()
        for job in plan.jobs:
            if any(path.endswith(f"_{job.fingerprint}.parquet") for path in self.shards[job.key]):
                self.tidy(job)
        self._sweep()

    def quarantine_only(self, entries: Iterable[QuarantineEntry], plan: Plan) -> None:
        """Keep notes about the plan's sequences for `entries` alone: new faults come, what is mended goes."""
        current = {(entry.sequence, entry.pair) for entry in entries}
        for fault in plan.faults:
            path = f"quarantine/{fault.sequence}_{fault.pair}.json"
            if self.quarantine.get(path) != asdict(fault):
                self._write(path, asdict(fault))
        for path, note in self.quarantine.items():
            if note.get("sequence") in plan.sequences and (note["sequence"], note.get("pair")) not in current:
                self.target.delete(path)

    def count(self) -> dict[str, int]:
        """Finished pairs by split, as they are now."""
        return {
            split: sum(is_shard(file.base_name) for file in self.target.files(f"split={split}")) for split in SPLITS
        }

    def _listed(self) -> dict[str, list[str]]:
        shards: dict[str, list[str]] = defaultdict(list)
        for split in SPLITS:
            for entry in self.target.files(f"split={split}"):
                if is_shard(entry.base_name):
                    shards[entry.base_name.rpartition("_")[0]].append(self.target.relative(entry.path))
        return shards

    def _sweep(self) -> None:
        for folder in ("", "quarantine", *(f"split={split}" for split in SPLITS)):
            self.target.sweep(folder)

    def _write(self, path: str, content: Mapping[str, Any]) -> None:
        self.target.put(path, json.dumps(content, indent=1).encode())

    def _delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            self.target.delete(path)


def _checked(target: Folder, stored: bytes, options: PreprocessOptions) -> dict[str, Any]:
    """The content of dataset.json. Raises PreprocessError when it is damaged or was made with other options."""
    try:
        dataset = json.loads(stored)
    except json.JSONDecodeError as error:
        where = f"{target.label}/{_DATASET}"
        raise PreprocessError(f"{where}: damaged ({error}); restore it or use another SHARDS folder") from error
    _require_same_options(target, dataset, options)
    return dataset


def _require_same_options(target: Folder, made: Mapping[str, Any], options: PreprocessOptions) -> None:
    if made.get("schema_version") != SCHEMA_VERSION:
        raise PreprocessError(
            f"{target.label}: its shards have schema version {made.get('schema_version')}, this sdan writes "
            f"{SCHEMA_VERSION}; preprocess into another (empty) SHARDS folder"
        )
    was, now = made.get("options", {}), options.of_shards
    different = [name for name in now if was.get(name) != now[name]]
    if different:
        raise PreprocessError(
            f"{target.label}: its shards were made with {', '.join(f'{name}={was.get(name)}' for name in different)}, "
            f"this run asks for {', '.join(f'{name}={now[name]}' for name in different)}; "
            "use the same options, or another (empty) SHARDS folder"
        )


def _sequence_of(key: str, known: Collection[str]) -> str:
    """The longest known sequence whose name the key begins with: "a_1_x-y" is of "a_1" where that is one, else "a"."""
    parts = key.split("_")
    names = ("_".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
    return next((name for name in names if name in known), "")
