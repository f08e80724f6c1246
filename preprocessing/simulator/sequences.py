"""Simulates zoom sequences in SR-RAW's layout and writes the truth beside them.

    OUT/00001/00001.dng 00001.JPG ... 00007.dng 00007.JPG     240, 150, 100, 70, 50, 35, 24 mm
    OUT/00001/truth/                                          see preprocessing.truth.reader

Seed and index determine a sequence bit for bit, independent of the number of sequences. A sequence is written as
NNNNN.partial and renamed when complete. A complete sequence with the same parameters is kept.
"""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from preprocessing.frames import TRUTH_FOLDER
from preprocessing.raw import dng
from preprocessing.simulator import camera_jpg, sensor, truth_files, wide
from preprocessing.simulator.optics import FOCALS_MM, PRESETS, draw_exposures, draw_geometries
from preprocessing.simulator.scenery.canvas import Box
from preprocessing.simulator.scenery.photographs import find_photographs, fingerprint
from preprocessing.simulator.scenes import NUM_LEVELS, Scene, build_scene, level_of
from preprocessing.simulator.wide_sensor import WideCamera
from preprocessing.storage import held
from preprocessing.truth.frame import FAR, NEAR, Exposure, FrameGeometry, Window
from preprocessing.truth.reader import GEOMETRY_FILE

_LOG = logging.getLogger(__name__)

VERSION = 2
MIN_WIDTH_PX = 384
MAX_WIDTH_PX = 8192
RAW_FORMATS = {"dng": ".dng", "arw": ".ARW"}
WIDE = "wide"
CAMERAS = {"dng": ("SDAN", "Simulated"), "arw": ("SONY", "ILCE-7SM2")}


class SimulateError(ValueError):
    """A wrong input to the simulator; the message is one line."""


@dataclass(frozen=True)
class _Job:
    """All parameters that determine a sequence; stored with it."""

    seed: int
    index: int
    width_px: int
    preset: str
    raw_format: str
    photos: tuple[str, ...]
    """Fingerprints of the photographs; empty for procedural scenes."""
    version: int = VERSION


def simulate(
    out: Path | str,
    *,
    scenes: Path | str | None = None,
    sequences: int = 4,
    width_px: int = 1536,
    preset: str = "default",
    raw_format: str = "dng",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write `sequences` zoom sequences below `out` and return their folders.

    scenes      folder of photographs (JPG, PNG) to build the scenes from; None: procedural scenes
    width_px    width of the camera JPG, even; the height is two thirds of it (2832 at 4240, like the ILCE-7SM2). The
                RAW has the same size; with raw_format "arw" it is larger by 16 px at 4240, like that camera's
    preset      "tripod", "default", "handheld", or "perfect": no motion, no distortion, exact focal lengths, constant
                exposure, with noise, Bayer sampling and JPEG as in the others; "wide": another camera, lens and look
                of the JPG for each sequence (wide.py, camera_jpg.py), and scenes of thin lines among the others
    raw_format  "dng" or "arw"
    progress    called with (number of finished sequences, number of all), first with 0
    Raises SimulateError for a wrong value, a scenes folder without readable photographs, and an `out` that cannot be
    written or in which a sequence's name is already in use.
    """
    out = Path(out)
    _check(sequences, width_px, preset, raw_format, seed)
    photos = _photographs(scenes)
    marks = tuple(fingerprint(path) for path in photos)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SimulateError(
            f"{out}: expected a writable folder, got {error.strerror!r}; choose another output folder"
        ) from error
    jobs = [_Job(seed, index, width_px, preset, raw_format, marks) for index in range(1, sequences + 1)]
    with held(out) as ours:
        if not ours:
            raise SimulateError(
                f"{out}: expected a folder in which no other command works, got one in use; "
                "wait until that ends, or choose another output folder"
            )
        return _write_all(out, jobs, photos, progress or (lambda done, total: None))


def _write_all(
    out: Path, jobs: Sequence[_Job], photos: Sequence[Path], progress: Callable[[int, int], None]
) -> list[Path]:
    """Write the sequences that are not there yet; returns the folders of all."""
    folders = []
    progress(0, len(jobs))
    for job in jobs:
        folder = out / f"{job.index:05d}"
        if not _is_done(folder, job):
            try:
                _write_sequence(folder, job, photos)
            except OSError as error:
                raise SimulateError(
                    f"{folder}: expected a writable folder, got {error.strerror!r}; check free space and permissions"
                ) from error
        folders.append(folder)
        progress(job.index, len(jobs))
    return folders


def frame_size(width_px: int, raw_format: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """((JPG width, height), (RAW width, height)) in pixels."""
    height = 2832 if width_px == 4240 else 2 * round(width_px / 3)
    border = 2 * round(8 * width_px / 4240) if raw_format == "arw" else 0
    while width_px + border in dng.SONY_CROPPED_WIDTHS:
        border += 2
    return (width_px, height), (width_px + border, height + border)


def _check(sequences: int, width_px: int, preset: str, raw_format: str, seed: int) -> None:
    if preset not in PRESETS:
        raise SimulateError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    if raw_format not in RAW_FORMATS:
        raise SimulateError(f"RAW format: expected one of {', '.join(RAW_FORMATS)}, got {raw_format!r}")
    if width_px % 2 or not MIN_WIDTH_PX <= width_px <= MAX_WIDTH_PX:
        raise SimulateError(f"width: expected an even number from {MIN_WIDTH_PX} to {MAX_WIDTH_PX}, got {width_px} px")
    if sequences < 1:
        raise SimulateError(f"sequences: expected at least 1, got {sequences}")
    if seed < 0:
        raise SimulateError(f"seed: expected 0 or more, got {seed}")


def _photographs(scenes: Path | str | None) -> list[Path]:
    if scenes is None:
        return []
    folder = Path(scenes)
    if not folder.is_dir():
        raise SimulateError(f"{folder}: expected a folder of photographs (JPG or PNG), got none; check --scenes")
    readable, unreadable = find_photographs(folder)
    if not readable:
        found = f"{unreadable} unreadable ones" if unreadable else "none"
        raise SimulateError(f"{folder}: expected JPG or PNG photographs, got {found}; add some or omit --scenes")
    if unreadable:
        _LOG.warning("%s: skipped %d unreadable photographs, using %d", folder, unreadable, len(readable))
    return readable


def _is_done(folder: Path, job: _Job) -> bool:
    if not folder.exists():
        return False
    try:
        stored = dict(json.loads((folder / TRUTH_FOLDER / GEOMETRY_FILE).read_bytes())["job"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise SimulateError(
            f"{folder}: expected a simulated sequence, got other files; choose another output folder"
        ) from None
    wanted = json.loads(json.dumps(asdict(job)))
    if stored == wanted:
        return True
    changed = [key for key in wanted if stored.get(key) != wanted[key] and key != "photos"]
    expected = ", ".join(f"{key} {wanted[key]!r}" for key in changed) or "these photographs"
    found = ", ".join(f"{key} {stored.get(key)!r}" for key in changed) or "other photographs"
    raise SimulateError(
        f"{folder}: expected a sequence with {expected}, got {found}; remove it or choose another output folder"
    )


def _write_sequence(folder: Path, job: _Job, photos: Sequence[Path]) -> None:
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    (partial / TRUTH_FOLDER).mkdir(parents=True)
    cv2.setNumThreads(1)  # keeps the order of sums, and leaves other cores to other tasks
    scene_rng, motion_rng, camera_rng, *noise_rngs = np.random.default_rng([job.seed, job.index]).spawn(
        3 + len(FOCALS_MM)
    )
    jpg_size, raw_size = frame_size(job.width_px, job.raw_format)
    preset = PRESETS[job.preset]
    frames = draw_geometries(motion_rng, preset, jpg_size=jpg_size, raw_size=raw_size)
    camera = _draw_camera(camera_rng, job) if job.preset == WIDE else None
    exposures = wide.draw_exposures(camera_rng, preset, camera.model) if camera else draw_exposures(camera_rng, preset)
    ideals = truth_files.plan_ideals(frames)
    scene = build_scene(
        scene_rng,
        _views(frames, ideals),
        frame_width=job.width_px,
        photos=photos,
        first_photo=job.index - 1,
        thin=camera is not None,
    )
    for number, (frame, exposure) in enumerate(zip(frames, exposures, strict=True)):
        stem, rng = f"{number + 1:05d}", noise_rngs[number]
        if camera:
            used = next((ideal.window for ideal in ideals if ideal.frame == number), None)
            _write_wide_frame(partial, stem, job, scene, frame, exposure, rng, camera, used)
        else:
            _write_frame(partial, stem, job, scene, frame, exposure, rng)
    truth = partial / TRUTH_FOLDER
    if camera:
        drawn = {"camera": asdict(camera.model), "look": asdict(camera.look)}
        show = camera.ideal_picture
        truth_files.write(truth, asdict(job), scene, frames, exposures, ideals, ideal_picture=show, more=drawn)
    else:
        truth_files.write(truth, asdict(job), scene, frames, exposures, ideals)
    partial.rename(folder)


def _write_frame(
    folder: Path,
    stem: str,
    job: _Job,
    scene: Scene,
    frame: FrameGeometry,
    exposure: Exposure,
    rng: np.random.Generator,
) -> None:
    mosaic = sensor.expose(scene, frame, exposure, rng)
    picture = sensor.camera_picture(mosaic, frame, exposure)
    _write_files(folder / stem, job, mosaic, picture, frame, exposure, {}, {"white_level": sensor.WHITE_LEVEL})


def _write_files(
    stem: Path,
    job: _Job,
    mosaic: dng.Mosaic,
    picture: npt.NDArray[np.uint8],
    frame: FrameGeometry,
    exposure: Exposure,
    jpg_options: dict[str, Any],
    dng_options: dict[str, Any],
) -> None:
    """Write the JPG and the RAW of one frame; the options are sensor.encode_jpg's and dng.write_dng's."""
    make, model = CAMERAS[job.raw_format]
    stem.with_suffix(".JPG").write_bytes(sensor.encode_jpg(picture, frame, exposure, make, model, **jpg_options))
    path = stem.with_suffix(RAW_FORMATS[job.raw_format])
    shot = _shot(picture, frame, exposure, make, model)
    if job.raw_format == "arw":
        dng.write_arw(path, mosaic, wb=exposure.wb, make=make, model=model, shot=shot)
    else:
        dng.write_dng(path, mosaic, wb=exposure.wb, make=make, model=model, shot=shot, **dng_options)


def _shot(
    picture: npt.NDArray[np.uint8], frame: FrameGeometry, exposure: Exposure, make: str, model: str
) -> dng.ShotTags:
    small = cv2.resize(picture, (480, round(480 * picture.shape[0] / picture.shape[1])), interpolation=cv2.INTER_AREA)
    return dng.ShotTags(
        focal_mm=frame.focal_mm,
        iso=exposure.iso,
        exposure_s=exposure.exposure_s,
        f_number=exposure.f_number,
        thumbnail_jpg=sensor.encode_jpg(np.asarray(small, np.uint8), frame, exposure, make, model),
    )


def _draw_camera(rng: np.random.Generator, job: _Job) -> WideCamera:
    model = wide.draw_camera(rng)
    return WideCamera(wide.as_arw(model) if job.raw_format == "arw" else model, camera_jpg.draw_look(rng))


def _write_wide_frame(
    folder: Path,
    stem: str,
    job: _Job,
    scene: Scene,
    frame: FrameGeometry,
    exposure: Exposure,
    rng: np.random.Generator,
    camera: WideCamera,
    used: Window | None,
) -> None:
    """`used`: the part of the frame that 4x pairs use, None if it is the short frame of none."""
    mosaic = camera.expose(scene, frame, exposure, rng)
    picture = camera.picture(mosaic, scene, frame, exposure, rng, used)
    model = camera.model
    jpg_options = {"quality": camera.look.quality, "subsampling": camera.look.subsampling}
    dng_options = {
        "cfa": model.cfa,
        "black_level": (float(model.black_level),) * 4,
        "white_level": model.white_level,
        "xyz_to_camera_33": model.xyz_to_camera,
    }
    _write_files(folder / stem, job, mosaic, picture, frame, exposure, jpg_options, dng_options)


def _views(frames: Sequence[FrameGeometry], ideals: Sequence[truth_files.Ideal]) -> list[Box]:
    """The area that each canvas must cover: all frames and ideal pictures rendered from it, on both planes."""
    corners: list[list[np.ndarray]] = [[] for _ in range(NUM_LEVELS)]
    for frame in frames:
        window = (0, 0, frame.raw_height, frame.raw_width)
        corners[level_of(frame.focal_mm)] += _outline(frame, window)
    for ideal in ideals:
        frame = frames[ideal.frame]
        corners[level_of(frame.focal_mm * ideal.scale)] += _outline(frame, ideal.window)
    boxes: list[Box] = []
    for level, points in enumerate(corners):
        table = np.concatenate(points)
        # The blur and the cubic kernel read a few canvas pixels beyond the edge.
        margin = 12.0 * 2**level
        (x0, y0), (x1, y1) = table.min(axis=0) - margin, table.max(axis=0) + margin
        boxes.append((float(x0), float(y0), float(x1), float(y1)))
    return boxes


def _outline(frame: FrameGeometry, window: Window) -> list[np.ndarray]:
    """Scene coordinates [68, 2] of points on a window's border, for each plane."""
    top, left, height, width = window
    t = np.linspace(0, 1, 17)
    x, y = left + t * width, top + t * height
    edge = np.concatenate(
        [np.stack([x, np.full(17, side)], -1) for side in (top, top + height)]
        + [np.stack([np.full(17, side), y], -1) for side in (left, left + width)]
    )
    return [frame.to_scene(edge, plane) for plane in (FAR, NEAR)]
