"""The preprocessing job: RAW sequences -> one Parquet file per pair, through Ray Data.

SHARDS/dataset.json                                            options, and the sequences forced to val
SHARDS/split=train|val|test/<sequence>_<pair>_<fingerprint>.parquet
SHARDS/quarantine/<sequence>_<pair>.json                       why a pair, frame or sequence is not among the shards

A pair's file is named by what it was made from and put in place in one step, so a run that is killed and started again
redoes nothing that was finished, and runs side by side overwrite each other with the same bytes.
"""

import contextlib
import functools
import json
import logging
import os
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from tqdm import tqdm

from preprocessing import raw as raw_files
from preprocessing.exif import Exif
from preprocessing.plan import PairJob, Plan, PreprocessError, PreprocessOptions, QuarantineEntry, make_plan
from preprocessing.schema import SCHEMA_VERSION, SPLITS, ShardInfo, encode, is_shard
from preprocessing.storage import Folder, open_folder
from preprocessing.tiles import TileError, cut, decode_jpg

__all__ = ["PreprocessError", "PreprocessOptions", "PreprocessReport", "QuarantineEntry", "preprocess"]

_DATASET = "dataset.json"
_RETRIES = 2
_DIED_RUNS = 2
"""A pair whose process died in this many runs is not tried again until its inputs change."""
_ROW_GROUP = 1
"""A tile a row group: training reads single tiles at random."""


@dataclass
class PreprocessReport:
    """What one run did, and what SHARDS holds after it."""

    pairs: int = 0
    """Pairs found in RAW."""
    todo: int = 0
    """Those that were neither finished nor quarantined by an earlier run."""
    written: int = 0
    skipped: int = 0
    """Pairs already finished by an earlier run."""
    rows: int = 0
    """Tiles written by this run."""
    bytes: int = 0
    """Size of the files written by this run."""
    quarantined: list[QuarantineEntry] = field(default_factory=list)
    """All that could not be used, of this and of earlier runs."""
    notes: list[str] = field(default_factory=list)
    """Left out on purpose, and what else a user should know."""
    new_sequences: list[str] = field(default_factory=list)
    """Sequences that had no shard before this run and have one now."""
    splits: dict[str, int] = field(default_factory=dict)
    """Shards in SHARDS by split, train, val and test."""
    seconds: float = 0.0


@dataclass
class _Existing:
    """What SHARDS held before the run."""

    dataset: dict[str, Any] = field(default_factory=dict)
    """dataset.json; {} for a new folder."""
    shards: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """By pair key: paths in SHARDS."""
    quarantine: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By path in SHARDS: the file's content."""


def preprocess(
    raw: str, shards: str, options: PreprocessOptions, *, dry_run: bool = False, progress: bool = True
) -> PreprocessReport:
    """Turn the zoom sequences below `raw` into shards below `shards` (local folders or `s3://` URIs).

    Pairs already finished are skipped; what cannot be used is quarantined with the reason, reported, and skipped while
    its inputs stay the same. `dry_run` writes nothing. Uses the running Ray, or starts one and stops it again.
    Raises PreprocessError, one line, when the run as a whole cannot be done.
    """
    began = time.monotonic()
    source, target = _open(raw), _open(shards)
    existing = _look(target, options)
    # What --val held out once must not slip into training in a later run that does not repeat it.
    options = replace(options, val=tuple(sorted({*options.val, *existing.dataset.get("val", ())})))
    try:
        plan = make_plan(source, options, existing.dataset.get("splits", {}))
    except (OSError, pa.ArrowInvalid) as error:
        raise PreprocessError(f"{raw}: cannot be listed ({_one_line(error)})") from error
    todo, done, given_up = _sort_out(plan, existing)
    report = PreprocessReport(pairs=len(plan.jobs), todo=len(todo), skipped=len(done), notes=list(plan.notes))
    report.quarantined = [*plan.faults, *given_up]
    if not dry_run:
        with _unwritable(target):
            _prepare(target, plan, options, existing)
            for job in done:
                _tidy(target, job, existing.shards[job.key])
        results = _run(source, target, todo, options, progress=progress) if todo else []
        with _unwritable(target):
            _settle(target, todo, results, report, existing)
            _clear_quarantine(target, plan, report, existing)
    report.splits = _count_shards(target)
    report.notes += _advice(report, plan, options, dry_run=dry_run)
    report.seconds = time.monotonic() - began
    return report


def _open(uri: str) -> Folder:
    try:
        return open_folder(uri)
    except (OSError, pa.ArrowInvalid) as error:
        raise PreprocessError(f"{uri}: {_one_line(error)}; expected a folder or an s3:// URI") from error


def _look(target: Folder, options: PreprocessOptions) -> _Existing:
    """What SHARDS holds. Raises PreprocessError when it was made with other options."""
    existing = _Existing()
    try:
        if target.exists(_DATASET):
            existing.dataset = json.loads(target.read(_DATASET))
            _require_same_options(target, existing.dataset, options)
        for split in SPLITS:
            for entry in target.files(f"split={split}"):
                if is_shard(entry.base_name):
                    existing.shards[entry.base_name.rpartition("_")[0]].append(target.relative(entry.path))
        for entry in target.files("quarantine"):
            if entry.base_name.endswith(".json") and not entry.base_name.startswith("."):
                path = target.relative(entry.path)
                with contextlib.suppress(json.JSONDecodeError):  # a damaged note is written anew
                    existing.quarantine[path] = json.loads(target.read(path))
    except (OSError, pa.ArrowInvalid, json.JSONDecodeError) as error:
        raise PreprocessError(f"{target.label}: cannot be read ({_one_line(error)})") from error
    return existing


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


def _sort_out(plan: Plan, existing: _Existing) -> tuple[list[PairJob], list[PairJob], list[QuarantineEntry]]:
    """(to do, done, given up by an earlier run with the same inputs)."""
    todo, done, given_up = [], [], []
    for job in plan.jobs:
        note = existing.quarantine.get(job.quarantine, {})
        if any(path.endswith(f"_{job.fingerprint}.parquet") for path in existing.shards[job.key]):
            done.append(job)
        elif note.get("fingerprint") == job.fingerprint and note.get("died_in_runs", _DIED_RUNS) >= _DIED_RUNS:
            given_up.append(QuarantineEntry(job.sequence, job.pair, note["reason"]))
        else:
            todo.append(job)
    return todo, done, given_up


def _prepare(target: Folder, plan: Plan, options: PreprocessOptions, existing: _Existing) -> None:
    """dataset.json, and no leftovers of killed runs."""
    splits = {**existing.dataset.get("splits", {}), **{job.sequence: job.split for job in plan.jobs}}
    dataset = {
        "schema_version": SCHEMA_VERSION,
        "options": options.of_shards,
        "val": list(options.val),
        "splits": dict(sorted(splits.items())),
    }
    if dataset != existing.dataset:
        target.put(_DATASET, json.dumps(dataset, indent=1).encode())
    for folder in ("", "quarantine", *(f"split={split}" for split in SPLITS)):
        target.sweep(folder)


def _tidy(target: Folder, job: PairJob, paths: list[str]) -> None:
    """Leave one finished file of a pair: in its split (--val may have moved it), without older siblings."""
    if job.shard not in paths:
        same = next(path for path in paths if path.endswith(f"_{job.fingerprint}.parquet"))
        target.move(same, job.shard)
        paths = [path for path in paths if path != same]
    for path in paths:
        if path != job.shard:
            target.delete(path)


def _run(
    source: Folder, target: Folder, todo: list[PairJob], options: PreprocessOptions, *, progress: bool
) -> list[dict[str, Any]]:
    """One task per pair; a result for each pair whose process lived. A process that dies is retried twice."""
    results = []
    with _ray(), _quiet_ray_data() as context:
        context.max_errored_blocks = -1  # a dead task costs its pair, not the run
        jobs = ray.data.from_items([{"job": json.dumps(asdict(job))} for job in todo], override_num_blocks=len(todo))
        with warnings.catch_warnings():
            # Ray 2.64 drops max_retries here without naming a successor; without it a crashing decoder runs for ever.
            warnings.simplefilter("ignore")
            work = functools.partial(_process, source=source, target=target, options=options)
            done = jobs.map(work, max_retries=_RETRIES)
        with tqdm(total=len(todo), desc="preprocess", unit="pair", disable=not progress) as bar:
            for result in done.iter_rows():
                results.append(result)
                bar.update()
                if result["status"] == "unwritable":
                    raise PreprocessError(
                        f"{target.label}: cannot be written ({result['reason']}); what is finished stays, "
                        "make room or set the rights and run again"
                    )
            bar.update(len(todo) - len(results))
    return results


def _process(row: dict[str, Any], source: Folder, target: Folder, options: PreprocessOptions) -> dict[str, Any]:
    """A task: one pair from its files to its shard. Never raises for a fault of the pair."""
    cv2.setNumThreads(1)
    fields = json.loads(row["job"])
    job = PairJob(**{**fields, "lr_exif": Exif(**fields["lr_exif"]), "hr_exif": Exif(**fields["hr_exif"])})
    result = {"key": job.key, "status": "quarantined", "reason": "", "rows": 0, "bytes": 0}
    try:
        table = encode(pair_rows(source, job, options), ShardInfo(options.tile_px, options.scale, options.of_shards))
        data = _parquet(table)
    except (raw_files.RawError, TileError) as error:
        return result | {"reason": _one_line(error)}
    except Exception as error:  # whatever a damaged file provokes in a decoder costs this pair alone
        return result | {"reason": f"{type(error).__name__}: {_one_line(error)}"}
    try:
        target.put(job.shard, data)
    except (OSError, pa.ArrowException) as error:
        return result | {"status": "unwritable", "reason": _one_line(error)}
    return result | {"status": "written", "rows": table.num_rows, "bytes": data.size}


def pair_rows(source: Folder, job: PairJob, options: PreprocessOptions) -> list[dict[str, Any]]:
    """All rows of one pair. Raises RawError, TileError or OSError when it cannot be used."""
    raw = raw_files.load(source.read(job.lr_raw), name=job.lr_raw)
    lr_jpg = decode_jpg(source.read(job.lr_jpg), job.lr_jpg)
    hr_jpg = decode_jpg(source.read(job.hr_jpg), job.hr_jpg)
    tiles = cut(
        raw,
        lr_jpg,
        hr_jpg,
        job.zoom,
        scale=options.scale,
        tile_px=options.tile_px,
        stride_px=options.stride_px,
        ecc=options.align == "ecc",
    )
    of_pair = {
        "sequence": job.sequence,
        "pair": job.pair,
        "focal_lr_mm": job.lr_exif.focal_mm,
        "focal_hr_mm": job.hr_exif.focal_mm,
        "iso_lr": raw.iso or job.lr_exif.iso,
        "iso_hr": job.hr_exif.iso,
        "exposure_lr_s": raw.exposure_s or job.lr_exif.exposure_s,
        "exposure_hr_s": job.hr_exif.exposure_s,
        "true_rgb": None,
        "true_flow": None,
    }
    camera = {"camera": job.lr_exif.camera} if raw.camera == "unknown" and job.lr_exif.camera else {}
    return [tile | of_pair | camera for tile in tiles]


def _parquet(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=_ROW_GROUP,
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        write_statistics=False,
    )
    return sink.getvalue()


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    """The Ray that is running (or that RAY_ADDRESS names); else one of our own, stopped at the end."""
    if ray.is_initialized():
        yield
        return
    own: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **own)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[ray.data.DataContext]:
    """One bar and our own report instead of Ray Data's bars, plans and tracebacks; the caller's settings come back."""
    context = ray.data.DataContext.get_current()
    names = ("enable_progress_bars", "print_on_execution_start", "max_errored_blocks")
    before = {name: getattr(context, name) for name in names}
    logger = logging.getLogger("ray.data")
    level = logger.level
    context.enable_progress_bars = context.print_on_execution_start = False
    logger.setLevel(logging.CRITICAL)
    try:
        yield context
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)


def _settle(
    target: Folder,
    todo: Sequence[PairJob],
    results: list[dict[str, Any]],
    report: PreprocessReport,
    existing: _Existing,
) -> None:
    """Count the results, remove older siblings of what was written, quarantine the rest."""
    by_key = {result["key"]: result for result in results}
    had_shards = {job.sequence for job in todo if existing.shards[job.key]}
    written = set()
    for job in todo:
        result = by_key.get(job.key)
        if result is not None and result["status"] == "written":
            report.written += 1
            report.rows += result["rows"]
            report.bytes += result["bytes"]
            written.add(job.sequence)
            _tidy(target, job, [*existing.shards[job.key], job.shard])
            continue
        note: dict[str, Any] = {"sequence": job.sequence, "pair": job.pair, "fingerprint": job.fingerprint}
        if result is None:
            earlier = existing.quarantine.get(job.quarantine, {})
            same = earlier.get("fingerprint") == job.fingerprint
            note["died_in_runs"] = (earlier.get("died_in_runs", 0) if same else 0) + 1
            note["reason"] = (
                f"{job.lr_raw}: the process that worked on this pair died {_RETRIES + 1} times (a decoder crash, or "
                "too little memory); copy the files again or exclude them"
            )
        else:
            note["reason"] = result["reason"]
        target.put(job.quarantine, json.dumps(note, indent=1).encode())
        report.quarantined.append(QuarantineEntry(job.sequence, job.pair, note["reason"]))
    report.new_sequences = sorted(written - had_shards)


def _clear_quarantine(target: Folder, plan: Plan, report: PreprocessReport, existing: _Existing) -> None:
    """Quarantine holds what this run could not use: faults found while planning are added, what is mended goes."""
    for fault in plan.faults:
        path, note = f"quarantine/{fault.sequence}_{fault.pair}.json", asdict(fault)
        if existing.quarantine.get(path) != note:
            target.put(path, json.dumps(note, indent=1).encode())
    current = {(entry.sequence, entry.pair) for entry in report.quarantined}
    for path, note in existing.quarantine.items():
        if note.get("sequence") in plan.sequences and (note["sequence"], note.get("pair")) not in current:
            target.delete(path)


def _count_shards(target: Folder) -> dict[str, int]:
    return {split: sum(is_shard(file.base_name) for file in target.files(f"split={split}")) for split in SPLITS}


def _advice(report: PreprocessReport, plan: Plan, options: PreprocessOptions, *, dry_run: bool) -> list[str]:
    notes = [f"--val {name}: no such sequence in RAW" for name in options.val if name not in plan.sequences]
    splits = Counter(job.split for job in plan.jobs) if dry_run else Counter(report.splits)
    if splits["val"] == 0 and splits["train"] > 0:
        names = sorted({job.sequence for job in plan.jobs if job.split == "train"})
        notes.append(f"no sequence fell into val; name some to hold out, e.g. --val {names[0] if names else 'SEQ'}")
    return notes


@contextlib.contextmanager
def _unwritable(target: Folder) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise PreprocessError(
            f"{target.label}: cannot be written ({_one_line(error)}); choose another folder"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
