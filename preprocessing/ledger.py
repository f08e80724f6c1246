"""What a SHARDS folder holds: its options, finished pairs and quarantine; read before a run, kept true during it.

SHARDS/dataset.json                                                   options, splits, and the sequences forced to val
SHARDS/split=train|val|test/<sequence>_<pair>_<fingerprint>.parquet   one finished pair
SHARDS/quarantine/<sequence>_<pair>.json                              why a pair, frame or sequence is not among them
"""

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from preprocessing.pairs import PairResult
from preprocessing.plan import PairJob, Plan, PreprocessError, PreprocessOptions, QuarantineEntry
from preprocessing.schema import SCHEMA_VERSION, SPLITS, is_shard
from preprocessing.storage import Folder

_DATASET = "dataset.json"
_DIED_RUNS = 2
"""A pair whose process died in this many runs is not tried again until its inputs change."""


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
            try:
                ledger.dataset = json.loads(target.read(_DATASET))
            except json.JSONDecodeError as error:
                where = f"{target.label}/{_DATASET}"
                raise PreprocessError(f"{where}: damaged ({error}); restore it or use another SHARDS folder") from error
            _require_same_options(target, ledger.dataset, options)
        for split in SPLITS:
            for entry in target.files(f"split={split}"):
                if is_shard(entry.base_name):
                    ledger.shards[entry.base_name.rpartition("_")[0]].append(target.relative(entry.path))
        for entry in target.files("quarantine"):
            if entry.base_name.endswith(".json") and not entry.base_name.startswith("."):
                path = target.relative(entry.path)
                with contextlib.suppress(json.JSONDecodeError):  # a damaged note is written anew
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
            elif note.get("fingerprint") == job.fingerprint and note.get("died_in_runs", _DIED_RUNS) >= _DIED_RUNS:
                given_up.append(QuarantineEntry(job.sequence, job.pair, note["reason"]))
            else:
                todo.append(job)
        return todo, done, given_up

    def prepare(self, plan: Plan, options: PreprocessOptions) -> None:
        """Write dataset.json; remove leftovers of killed runs and the shards of frames that are excluded now."""
        splits = {**self.splits, **{job.sequence: job.split for job in plan.jobs}}
        dataset = {
            "schema_version": SCHEMA_VERSION,
            "options": options.of_shards,
            "val": list(options.val),
            "splits": dict(sorted(splits.items())),
        }
        if dataset != self.dataset:
            self._write(_DATASET, dataset)
        for folder in ("", "quarantine", *(f"split={split}" for split in SPLITS)):
            self.target.sweep(folder)
        for name in plan.excluded:
            sequence, _, stem = name.partition("/")
            for key in [key for key in self.shards if _holds(key, sequence, stem)]:
                self._delete(self.shards.pop(key))

    def settle(self, job: PairJob, result: PairResult | None) -> QuarantineEntry | None:
        """Keep the folder true to what became of a pair (None: its process died); its entry if it is quarantined."""
        if result is not None and result.status == "written":
            self.tidy(job, [*self.shards[job.key], job.shard])
            return None
        note: dict[str, Any] = {"sequence": job.sequence, "pair": job.pair, "fingerprint": job.fingerprint}
        if result is None:
            earlier = self.quarantine.get(job.quarantine, {})
            same = earlier.get("fingerprint") == job.fingerprint
            note["died_in_runs"] = 1 + (earlier.get("died_in_runs", 0) if same else 0)
            note["reason"] = (
                f"{job.lr_raw}: the process that worked on it died, each time it was tried (a decoder crash, or too "
                "little memory); copy the files again or exclude them"
            )
        else:
            note["reason"] = result.reason
            if result.status == "unreadable":
                note["fingerprint"] = None  # another run may fare better
            else:
                self._delete(self.shards[job.key])  # made from inputs that are no longer there
        self._write(job.quarantine, note)
        return QuarantineEntry(job.sequence, job.pair, note["reason"])

    def tidy(self, job: PairJob, paths: Iterable[str] | None = None) -> None:
        """Leave one finished file of a pair, in its split (`--val` may have moved it), without older siblings."""
        found = list(self.shards[job.key] if paths is None else paths)
        if job.shard not in found:
            same = next(path for path in found if path.endswith(f"_{job.fingerprint}.parquet"))
            self.target.move(same, job.shard)
            found.remove(same)
        self._delete([path for path in found if path != job.shard])

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

    def _write(self, path: str, content: Mapping[str, Any]) -> None:
        self.target.put(path, json.dumps(content, indent=1).encode())

    def _delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            self.target.delete(path)


def _require_same_options(target: Folder, made: Mapping[str, Any], options: PreprocessOptions) -> None:
    was = {**made.get("options", {}), "schema_version": made.get("schema_version")}
    now = {**options.of_shards, "schema_version": SCHEMA_VERSION}
    different = [name for name in now if was.get(name) != now[name]]
    if different:
        raise PreprocessError(
            f"{target.label}: its shards were made with {', '.join(f'{name}={was.get(name)}' for name in different)}, "
            f"this run asks for {', '.join(f'{name}={now[name]}' for name in different)}; "
            "use the same options, or another (empty) SHARDS folder"
        )


def _holds(key: str, sequence: str, stem: str) -> bool:
    pair = key.removeprefix(f"{sequence}_")
    return pair != key and (pair.startswith(f"{stem}-") or pair.endswith(f"-{stem}"))
