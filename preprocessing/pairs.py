"""Turn one pair's files into one shard: a task of the preprocessing job."""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from preprocessing.frames import TRUTH_FOLDER
from preprocessing.plan import PairJob, PreprocessOptions
from preprocessing.raw import decode as raw_files
from preprocessing.registration.lens import LensMap
from preprocessing.schema import ShardInfo, encode
from preprocessing.storage import Folder, one_line
from preprocessing.tiles import Cutting, Jpg, TileError, UnalignedError, cut_tiles, decode_jpg
from preprocessing.truth.reader import Truth, load_truth
from preprocessing.without_raw.picture_tiles import cut_picture_tiles, read_colour


class _Unreadable(Exception):
    """A file could not be read from storage; the file itself may be fine."""


@dataclass(frozen=True)
class PairResult:
    """The outcome of one pair."""

    key: str
    status: str
    """
    written
    quarantined: its files are at fault; not tried again until they change
    unreadable: its files could not be read from storage; the next run tries again
    died: its process was killed, took too long or ran out of memory; the next run tries again
    unwritable: SHARDS could not be written; ends the run
    """
    reason: str = ""
    """One line, unless written."""
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0
    """If written: rows and size of the shard, and the time taken."""
    aligned_by: str = ""
    """If written: the rows' column aligned_by. "unaligned" also for a pair that was quarantined because its pictures
    do not show the same thing."""
    notes: str = ""
    """If written: remarks on its files, one per line."""


def process(job: PairJob, source: Folder, target: Folder, options: PreprocessOptions) -> PairResult:
    """Turn one pair into its shard and write it to `target`. Errors of the pair are returned, not raised."""
    began = time.monotonic()
    cv2.setNumThreads(1)  # a task has one CPU; OpenCV would use all
    try:
        info = ShardInfo(options.tile_px, options.scale, options.shard_options)
        notes: list[str] = []
        rows = pair_rows(source, job, options, notes)
        data = _parquet(rows, info)
    except UnalignedError as error:
        names = " and ".join(filter(None, (job.lr_jpg or job.lr_raw, job.hr_jpg or job.hr_raw)))
        return PairResult(job.key, "quarantined", f"{names}: {one_line(error)}", aligned_by="unaligned")
    except (raw_files.RawError, TileError) as error:
        return PairResult(job.key, "quarantined", one_line(error))
    except _Unreadable as error:
        return PairResult(job.key, "unreadable", one_line(error))
    except MemoryError:
        return PairResult(job.key, "died", f"{job.input}: out of memory; run again with more memory")
    except Exception as error:  # damaged files raise all kinds of errors in decoders
        return PairResult(job.key, "quarantined", f"{job.input}: {type(error).__name__}: {one_line(error)}")
    try:
        target.put(job.shard, data)
    except (OSError, pa.ArrowException) as error:
        return PairResult(job.key, "unwritable", one_line(error))
    seconds = time.monotonic() - began
    return PairResult(
        job.key,
        "written",
        rows=len(rows),
        bytes=data.size,
        seconds=seconds,
        aligned_by=rows[0]["aligned_by"],
        notes="\n".join(notes),
    )


def pair_rows(
    source: Folder, job: PairJob, options: PreprocessOptions, notes: list[str] | None = None
) -> list[dict[str, Any]]:
    """All rows of one pair. `notes` receives one line per remark on its files.

    Raises RawError or TileError if the pair cannot be used, _Unreadable if storage fails.
    """
    cut = _cut_pictures if job.lr_raw is None else _cut_raw
    tiles, measured = cut(source, job, options, [] if notes is None else notes)
    of_pair = {
        "sequence": job.sequence,
        "pair": job.pair,
        "focal_lr_mm": job.lr_exif.focal_mm,
        "focal_hr_mm": job.hr_exif.focal_mm,
        "iso_lr": job.lr_exif.iso,
        "iso_hr": job.hr_exif.iso,
        "exposure_lr_s": job.lr_exif.exposure_s,
        "exposure_hr_s": job.hr_exif.exposure_s,
        "f_number_lr": job.lr_exif.f_number,
        "f_number_hr": job.hr_exif.f_number,
    } | measured
    of_pair["exposure_ratio_exif"] = _exposure_ratio(of_pair)
    truth = _truth(source, job) if job.has_truth else None
    return [tile | of_pair | _true_columns(truth, job, tile, options) for tile in tiles]


def _cut_raw(
    source: Folder, job: PairJob, options: PreprocessOptions, notes: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(the tiles' columns, columns of the pair that the RAW knows better than the tags) of a pair with RAW."""
    assert job.lr_raw is not None
    raw = raw_files.load(_read(source, job.lr_raw), name=job.lr_raw, curve=options.rendering_curve)
    lr_jpg = _picture(source, job.lr_jpg, job.lr_raw, options)
    hr_jpg = _picture(source, job.hr_jpg, job.hr_raw, options)
    notes += [f"RAW: {remark}" for remark in raw.remarks]
    notes += sorted({f"camera JPG: {note}" for note in (*lr_jpg.notes, *hr_jpg.notes)})
    tiles = cut_tiles(raw, lr_jpg, hr_jpg, job.zoom, _how(options))
    known: dict[str, Any] = {"iso_lr": raw.iso, "exposure_lr_s": raw.exposure_s}
    if raw.camera == "unknown":
        known["camera"] = job.lr_exif.camera
    return tiles, {name: value for name, value in known.items() if value}


def _cut_pictures(
    source: Folder, job: PairJob, options: PreprocessOptions, notes: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The same of a pair of pictures without RAW."""
    assert job.lr_jpg is not None and job.hr_jpg is not None
    lr, hr = (read_colour(_read(source, path), path) for path in (job.lr_jpg, job.hr_jpg))
    notes += sorted({f"pictures: {note}" for note in (*lr.notes, *hr.notes)})
    return cut_picture_tiles(lr, hr, job.zoom, _how(options)), {"camera": job.lr_exif.camera or "unknown"}


def _how(options: PreprocessOptions) -> Cutting:
    ecc = options.align == "ecc"
    return Cutting(options.scale, options.tile_px, options.stride_px, ecc, options.keep_unaligned)


def _read(source: Folder, path: str) -> bytes:
    try:
        return source.read(path)
    except OSError as error:
        raise _Unreadable(f"{path}: expected a readable file, got {one_line(error)}; run again") from error


def _picture(source: Folder, jpg: str | None, raw: str | None, options: PreprocessOptions) -> Jpg:
    """The camera's JPG; without one, LibRaw's rendering of the RAW."""
    if jpg is not None:
        return decode_jpg(_read(source, jpg), jpg)
    assert raw is not None
    rendering = raw_files.render(_read(source, raw), name=raw, curve=options.rendering_curve)
    return Jpg(rendering, None, "rendering")


def _exposure_ratio(columns: Mapping[str, Any]) -> float | None:
    """HR's light per pixel / LR's, from the EXIF tags; None if one is missing."""
    seconds, iso, f_number = (
        (columns[hr], columns[lr])
        for hr, lr in (("exposure_hr_s", "exposure_lr_s"), ("iso_hr", "iso_lr"), ("f_number_hr", "f_number_lr"))
    )
    if None in (*seconds, *iso, *f_number):
        return None
    return float(seconds[0] / seconds[1] * iso[0] / iso[1] * (f_number[1] / f_number[0]) ** 2)


def _truth(source: Folder, job: PairJob) -> Truth:
    """The simulator's ground truth for this sequence. Raises TileError if it is damaged or incomplete."""
    prefix = f"{job.folder}/" if job.folder else ""
    try:
        truth = load_truth(f"{source.label}/{job.folder}", read=lambda name: source.read(prefix + name))
    except (ValueError, OSError) as error:
        raise TileError(one_line(error)) from error
    if truth is None or not {job.lr, job.hr} <= truth.frames.keys():
        found = ", ".join(truth.frames) if truth else "none"
        raise TileError(
            f"{prefix}{TRUTH_FOLDER}: expected frames {job.lr} and {job.hr}, got {found}; "
            "simulate the sequence again or delete this folder"
        )
    return truth


def _true_columns(
    truth: Truth | None, job: PairJob, tile: Mapping[str, Any], options: PreprocessOptions
) -> dict[str, NDArray[Any] | None]:
    if truth is None:
        return {"true_rgb": None, "true_flow": None, "true_near": None}
    side = 2 * options.tile_px
    rect = (tile["origin_row"] + 2 * tile["row"], tile["origin_col"] + 2 * tile["col"], side, side)
    try:
        picture = truth.true_rgb(job.lr, rect, options.scale)
        lr_to_hr = LensMap.from_numbers(tile["lr_to_hr_lens"])
        flow = truth.true_flow(job.lr, job.hr, rect, lr_to_hr)
        near = truth.true_near(job.lr, job.hr, rect, lr_to_hr)
    except (ValueError, OSError) as error:
        where = f"{job.folder}/{TRUTH_FOLDER}".lstrip("/")
        raise TileError(
            f"{where}: expected a simulated sequence's truth, got {one_line(error)}; simulate it again, or delete it"
        ) from error
    rgb = None if picture is None else picture.transpose(2, 0, 1)
    return {"true_rgb": rgb, "true_flow": flow, "true_near": near}


def _parquet(rows: Sequence[Mapping[str, Any]], info: ShardInfo) -> pa.Buffer:
    """The shard as Parquet bytes.

    Each tile is a row group, because training reads single tiles at random. Tiles are encoded one at a time, because
    all of them at once would take most of the task's memory.
    """
    sink = pa.BufferOutputStream()
    tables = (encode([row], info) for row in rows)
    first = next(tables)
    with pq.ParquetWriter(
        sink, first.schema, compression="zstd", compression_level=1, use_dictionary=False, write_statistics=False
    ) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)
    return sink.getvalue()
