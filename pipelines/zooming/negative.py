"""What a linear DNG needs to know of a RAW's camera."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.formats.dng import Camera
from preprocessing.colour import SRGB_TO_XYZ, srgb_to_camera
from preprocessing.raw.decode import RawImage
from preprocessing.raw.dng import D65, Tag
from preprocessing.raw.dng_colour import DngColour, dng_colour


def camera_of(path: Path, image: RawImage) -> Camera:
    """How the camera of this RAW measures colours, as its rendering takes them.

    The tags are those of a source that is a DNG itself. Else they are the matrix that LibRaw knows for the camera.
    Without one the camera's colours count as sRGB's, as in the rendering.
    """
    gains = image.wb[[0, 1, 3]].astype(np.float64)
    matrix = image.sensor.xyz_to_camera
    with path.open("rb") as file:
        colour = dng_colour(file) if image.matrix_source == "file" else DngColour()
    if Tag.COLOR_MATRIX_1 not in colour.numbers:
        stated = np.linalg.inv(SRGB_TO_XYZ) if matrix is None else matrix
        if image.matrix_source != "libraw":
            # These rows are for balanced colours, and a ColorMatrix is for measured ones: the light counts as daylight.
            stated = stated / gains[:, None]
        colour = DngColour(
            {int(Tag.COLOR_MATRIX_1): tuple(stated.ravel().tolist())}, {int(Tag.CALIBRATION_ILLUMINANT_1): D65}
        )
    return Camera(srgb_to_camera(matrix), gains / gains.min(), colour)
