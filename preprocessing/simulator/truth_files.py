"""Writes the truth of a simulated sequence; `preprocessing.truth.reader` documents the files and reads them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from preprocessing.frames import MAX_ZOOM_EXCESS
from preprocessing.simulator import sensor
from preprocessing.simulator.optics import FOCALS_MM
from preprocessing.simulator.scenes import Scene
from preprocessing.truth.frame import FAR, NEAR, Exposure, FrameGeometry, Window, nominal_lr_to_hr
from preprocessing.truth.reader import GEOMETRY_FILE, NEAR_SHRINK, ideal_file, near_file

STORED_SCALES = (4, 8)

IdealPicture = Callable[[Scene, FrameGeometry, Exposure, int, Window], npt.NDArray[np.uint8]]
"""Renders the ideal picture of a window of a frame at a scale, as `sensor.ideal_picture` does."""


@dataclass(frozen=True)
class Ideal:
    """An ideal picture to store."""

    frame: int
    """Index of the frame; 0 has the longest focal length."""
    scale: int
    window: Window


def plan_ideals(frames: Sequence[FrameGeometry]) -> list[Ideal]:
    """The ideal pictures to store: one for each pair at each of STORED_SCALES."""
    ideals = []
    for scale in STORED_SCALES:
        for long, hr in enumerate(frames):
            ratios = [(FOCALS_MM[long] / FOCALS_MM[short], short) for short in range(len(frames))]
            fitting = [pair for pair in ratios if scale <= pair[0] <= MAX_ZOOM_EXCESS * scale]
            if fitting:
                short = min(fitting)[1]
                ideals.append(Ideal(short, scale, _window(frames[short], hr)))
    return ideals


def _window(lr: FrameGeometry, hr: FrameGeometry) -> Window:
    """The long frame's nominal and true footprints in the short frame, plus 4 px; even, clipped to the short frame."""
    nominal = nominal_lr_to_hr(lr, hr)
    corners = np.array([[x, y] for x in (0, hr.jpg_width) for y in (0, hr.jpg_height)], np.float64)
    points = [(corners - nominal[:, 2]) / nominal[0, 0]]
    edge = np.stack(np.meshgrid(np.linspace(0, hr.jpg_width, 9), np.linspace(0, hr.jpg_height, 9)), -1).reshape(-1, 2)
    points += [lr.from_scene(hr.to_scene(edge + hr.jpg_origin, plane), plane) for plane in (FAR, NEAR)]
    table = np.concatenate(points)
    left, top = (int(2 * np.floor(max(0.0, value - 4) / 2)) for value in table.min(axis=0))
    right, bottom = (
        int(min(size, 2 * np.ceil((value + 4) / 2)))
        for size, value in zip((lr.raw_width, lr.raw_height), table.max(axis=0), strict=True)
    )
    return top, left, bottom - top, right - left


def write(
    folder: Path,
    job: dict[str, Any],
    scene: Scene,
    frames: Sequence[FrameGeometry],
    exposures: Sequence[Exposure],
    ideals: Sequence[Ideal],
    *,
    ideal_picture: IdealPicture = sensor.ideal_picture,
    more: dict[str, Any] | None = None,
) -> None:
    """Write a sequence's truth into `folder` (SEQUENCE/truth); `job` holds the simulator's parameters, `more` what else
    to record."""
    stems = [f"{number + 1:05d}" for number in range(len(frames))]
    for ideal in ideals:
        picture = ideal_picture(scene, frames[ideal.frame], exposures[ideal.frame], ideal.scale, ideal.window)
        bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        _, png = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])
        (folder / ideal_file(stems[ideal.frame], ideal.scale)).write_bytes(png.tobytes())
    for stem, frame in zip(stems, frames, strict=True):
        covered = sensor.near_coverage(scene, frame, NEAR_SHRINK) > 0.5
        Image.fromarray(covered).save(folder / near_file(stem), optimize=True)
    stored = {
        "job": job,
        "subject": scene.subject,
        "frames": {
            stem: {"geometry": frame.to_json(), "exposure": exposure.to_json()}
            for stem, frame, exposure in zip(stems, frames, exposures, strict=True)
        },
        "ideals": [[stems[ideal.frame], ideal.scale, ideal.window] for ideal in ideals],
        **(more or {}),
    }
    (folder / GEOMETRY_FILE).write_text(json.dumps(stored, indent=1))
