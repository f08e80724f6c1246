"""Simulated zoom sequences in SR-RAW's layout, with the truth beside them.

    OUT/00001/00001.dng 00001.JPG ... 00007.dng 00007.JPG     240, 150, 100, 70, 50, 35, 24 mm; the longest first
    OUT/00001/truth/geometry.json                             parameters, every frame's exact geometry and exposure
    OUT/00001/truth/00005_4x.png                              the ideal picture in a short frame's view
    OUT/00001/truth/00001_near.png                            which parts of a frame show the near plane

Sequence i of a seed is the same, bit for bit, whatever else is simulated with it. A sequence is written as
NNNNN.partial and renamed when complete; one that is there with the same parameters is kept.
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

from preprocessing.raw import dng
from preprocessing.simulator import sensor, truth_files
from preprocessing.simulator.optics import FOCALS_MM, PRESETS, Preset, draw_geometries
from preprocessing.simulator.scenery.painter import Box
from preprocessing.simulator.scenery.photographs import find_photographs, fingerprint
from preprocessing.simulator.scenes import NUM_LEVELS, Scene, build_scene, level_of
from preprocessing.truth.frame import FAR, NEAR, Exposure, FrameGeometry

_LOG = logging.getLogger(__name__)

VERSION = 2
MIN_WIDTH_PX = 384
MAX_WIDTH_PX = 8192
RAW_FORMATS = {"dng": ".dng", "arw": ".ARW"}
CAMERAS = {"dng": ("SDAN", "Simulated"), "arw": ("SONY", "ILCE-7SM2")}


class SimulateError(ValueError):
    """A wrong input to the simulator, in one line."""


@dataclass(frozen=True)
class _Job:
    """Everything that one sequence depends on."""

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

    scenes      a folder of photographs (JPG, PNG) to build the scenes from; None draws procedural ones
    width_px    width of the camera JPG, even; the height is two thirds (2832 at 4240, as the ILCE-7SM2). The RAW is as
                large, or 16 in 4240 px larger for raw_format "arw", as that camera's
    preset      "perfect" (an ideal lens on a rock: nothing moves, no distortion, exact focal lengths, even exposure;
                noise, Bayer sampling and JPEG as ever), "tripod", "default" or "handheld"
    progress    called with (sequences done, sequences in all)
    Raises SimulateError for a wrong value, an empty scenes folder, an `out` that cannot be written or that holds
    something else under a sequence's name.
    """
    out = Path(out)
    _check(sequences, width_px, preset, raw_format, seed)
    photos = _photographs(scenes)
    marks = tuple(fingerprint(path) for path in photos)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SimulateError(f"{out}: cannot be written ({error.strerror}); choose another output folder") from error
    folders = []
    for index in range(1, sequences + 1):
        job = _Job(seed, index, width_px, preset, raw_format, marks)
        folder = out / f"{index:05d}"
        if not _is_done(folder, job):
            try:
                _write_sequence(folder, job, photos)
            except OSError as error:
                raise SimulateError(
                    f"{folder}: cannot be written ({error.strerror}); check space and rights"
                ) from error
        folders.append(folder)
        if progress:
            progress(index, sequences)
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
        raise SimulateError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    if raw_format not in RAW_FORMATS:
        raise SimulateError(f"RAW format {raw_format!r}: expected one of {', '.join(RAW_FORMATS)}")
    if width_px % 2 or not MIN_WIDTH_PX <= width_px <= MAX_WIDTH_PX:
        raise SimulateError(f"width {width_px} px: expected an even number from {MIN_WIDTH_PX} to {MAX_WIDTH_PX}")
    if sequences < 1:
        raise SimulateError(f"sequences {sequences}: expected at least 1")
    if seed < 0:
        raise SimulateError(f"seed {seed}: expected 0 or more")


def _photographs(scenes: Path | str | None) -> list[Path]:
    if scenes is None:
        return []
    folder = Path(scenes)
    if not folder.is_dir():
        raise SimulateError(f"{folder}: expected a folder of photographs (JPG or PNG), found none of that name")
    readable, unreadable = find_photographs(folder)
    if not readable:
        bad = f" ({unreadable} unreadable)" if unreadable else ""
        raise SimulateError(f"{folder}: no readable JPG or PNG photograph in it{bad}; add some or leave --scenes out")
    if unreadable:
        _LOG.warning("%s: %d unreadable photographs left out, %d used", folder, unreadable, len(readable))
    return readable


def _is_done(folder: Path, job: _Job) -> bool:
    if not folder.exists():
        return False
    try:
        stored = json.loads((folder / "truth" / "geometry.json").read_text())["job"]
    except (OSError, ValueError, KeyError):
        raise SimulateError(f"{folder}: exists and was not simulated; choose another output folder") from None
    wanted = json.loads(json.dumps(asdict(job)))
    if stored == wanted:
        return True
    changed = [key for key in wanted if stored.get(key) != wanted[key] and key != "photos"]
    differing = ", ".join(f"{key} {stored.get(key)!r}" for key in changed)
    raise SimulateError(
        f"{folder}: was simulated with {differing or 'other photographs'}; remove it or choose another folder"
    )


def _write_sequence(folder: Path, job: _Job, photos: Sequence[Path]) -> None:
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    (partial / "truth").mkdir(parents=True)
    cv2.setNumThreads(1)  # the same sums in the same order on every machine, and Ray's tasks share cores
    scene_rng, motion_rng, camera_rng, *noise_rngs = np.random.default_rng([job.seed, job.index]).spawn(
        3 + len(FOCALS_MM)
    )
    jpg_size, raw_size = frame_size(job.width_px, job.raw_format)
    frames = draw_geometries(motion_rng, PRESETS[job.preset], jpg_size=jpg_size, raw_size=raw_size)
    exposures = draw_exposures(camera_rng, PRESETS[job.preset])
    ideals = truth_files.plan_ideals(frames)
    scene = build_scene(
        scene_rng, _views(frames, ideals), frame_width=job.width_px, photos=photos, first_photo=job.index - 1
    )
    for number, (frame, exposure) in enumerate(zip(frames, exposures, strict=True)):
        _write_frame(partial, f"{number + 1:05d}", job, scene, frame, exposure, noise_rngs[number])
    truth_files.write(partial / "truth", asdict(job), scene, frames, exposures, ideals)
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
    make, model = CAMERAS[job.raw_format]
    (folder / f"{stem}.JPG").write_bytes(sensor.encode_jpg(picture, frame, exposure, make, model))
    small = cv2.resize(picture, (480, round(480 * picture.shape[0] / picture.shape[1])), interpolation=cv2.INTER_AREA)
    common: dict[str, Any] = {
        "wb": exposure.wb,
        "make": make,
        "model": model,
        "focal_mm": frame.focal_mm,
        "iso": exposure.iso,
        "exposure_s": exposure.exposure_s,
        "f_number": exposure.f_number,
        "thumbnail_jpg": sensor.encode_jpg(np.asarray(small, np.uint8), frame, exposure, make, model),
    }
    path = folder / f"{stem}{RAW_FORMATS[job.raw_format]}"
    if job.raw_format == "arw":
        dng.write_arw(path, mosaic, **common)
    else:
        dng.write_dng(path, mosaic, white_level=sensor.WHITE_LEVEL, **common)


def draw_exposures(rng: np.random.Generator, preset: Preset) -> list[Exposure]:
    """One light for the sequence, the meter's scatter from frame to frame."""
    iso = int(rng.choice([100, 200, 400, 800]))
    red, blue = rng.uniform(1.7, 2.4), rng.uniform(1.35, 1.9)
    gain, f_number = rng.uniform(0.72, 0.92), float(rng.choice([5.6, 6.3, 7.1, 8.0]))
    shutter = float(rng.choice([60, 100, 160, 250]))
    exposures = []
    for focal in FOCALS_MM:
        scatter, psf, falloff = rng.normal(), rng.uniform(0.5, 0.75), rng.uniform(0.85, 1.15)
        step = 2.0 ** (preset.exposure_ev * float(scatter))
        exposures.append(
            Exposure(
                iso=iso,
                exposure_s=1.0 / round(shutter / step),
                f_number=f_number,
                gain=float(gain) * step,
                # ARW stores gains in 1/1024.
                wb=(round(1024 * float(red)) / 1024, 1.0, round(1024 * float(blue)) / 1024),
                psf_px=float(psf),
                vignetting=float(falloff) * float(np.interp(focal, [24, 70, 240], [0.32, 0.16, 0.24])),
            )
        )
    return exposures


def _views(frames: Sequence[FrameGeometry], ideals: Sequence[truth_files.Ideal]) -> list[Box]:
    """What each canvas must cover: all frames and ideal pictures that are rendered from it, on both planes."""
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
        # The blur and the cubic kernel reach a few canvas pixels over the edge.
        margin = 12.0 * 2**level
        (x0, y0), (x1, y1) = table.min(axis=0) - margin, table.max(axis=0) + margin
        boxes.append((float(x0), float(y0), float(x1), float(y1)))
    return boxes


def _outline(frame: FrameGeometry, window: tuple[int, int, int, int]) -> list[np.ndarray]:
    """Scene coordinates of points round a window (top, left, height, width), on both planes."""
    top, left, height, width = window
    t = np.linspace(0, 1, 17)
    x, y = left + t * width, top + t * height
    edge = np.concatenate(
        [np.stack([x, np.full(17, side)], -1) for side in (top, top + height)]
        + [np.stack([np.full(17, side), y], -1) for side in (left, left + width)]
    )
    return [frame.to_scene(edge, plane) for plane in (FAR, NEAR)]
