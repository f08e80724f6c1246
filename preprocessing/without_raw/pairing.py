"""Pairs pictures without RAW by their focal lengths: from EXIF, else from their names (names.py) and --zoom."""

import math
from collections.abc import Sequence
from dataclasses import replace

from preprocessing.frames import MAX_ZOOM_EXCESS, Shot, ratio
from preprocessing.without_raw.names import EXAMPLES, read_name

Pairs = list[tuple[Shot, Shot, float]]
"""(LR, HR, HR's focal length / LR's)"""


class UnpairedError(ValueError):
    """Pictures of one scene that make no pair; the message is one line."""


def pair_pictures(shots: Sequence[Shot], scale: int, zoom: float | None) -> Pairs:
    """Pair the pictures of one scene.

    With focal lengths, each HR frame gets the LR frame with the smallest ratio from `scale` to MAX_ZOOM_EXCESS x scale;
    if there is none, the one with the largest ratio down to scale / MAX_ZOOM_EXCESS, which is then reduced a little to
    fit. Names that say only long and short make one pair, whose ratio is `zoom`.

    Raises:
        UnpairedError: fewer than two pictures, no ratio that fits, or nothing that tells long from short.
    """
    usable = sorted((shot for shot in shots if len(shot.frame.jpgs) == 1), key=lambda shot: shot.frame.stem)
    if len(usable) < 2:
        raise UnpairedError(f"expected at least two pictures of the scene, got {_listed(usable) or 'none'}")
    with_focals = _with_focals(usable)
    if with_focals is not None:
        return _by_focals(with_focals, scale)
    roles = [read_name(shot.frame.stem).role for shot in usable]
    if sorted(filter(None, roles)) != ["long", "short"]:
        raise UnpairedError(
            f"expected focal lengths in EXIF, or one name each for the long and the short focal length ({EXAMPLES}), "
            f"got {_listed(usable)}; rename the files"
        )
    if zoom is None:
        raise UnpairedError(f"{_listed(usable)}: expected focal lengths in EXIF or --zoom, got neither; add --zoom")
    return [(usable[roles.index("short")], usable[roles.index("long")], zoom)]


def _with_focals(shots: list[Shot]) -> list[Shot] | None:
    """The shots, each with a focal length from its tags, or all with one from their names; None if some have none."""
    if all(shot.exif.focal_mm for shot in shots):
        return shots
    focals = [read_name(shot.frame.stem).focal_mm for shot in shots]
    if not all(focals):
        return None
    return [
        replace(shot, exif=replace(shot.exif, focal_mm=focal, focal_35mm=None))
        for shot, focal in zip(shots, focals, strict=True)
    ]


def _by_focals(shots: list[Shot], scale: int) -> Pairs:
    pairs: Pairs = []
    low, high = scale / MAX_ZOOM_EXCESS * (1 - 1e-6), scale * MAX_ZOOM_EXCESS * (1 + 1e-6)
    for hr in shots:
        ratios = [(lr, ratio(lr, hr)) for lr in shots]
        fitting = [(lr, value) for lr, value in ratios if low <= value <= high and value > 1]
        if fitting:
            lr, value = min(fitting, key=lambda pair: _distance(pair[1], scale))
            pairs.append((lr, hr, value))
    if not pairs:
        focals = ", ".join(f"{value:g}" for value in sorted({shot.exif.focal_mm or 0.0 for shot in shots}))
        raise UnpairedError(
            f"expected two pictures with a focal ratio of {scale / MAX_ZOOM_EXCESS:.2g} to "
            f"{scale * MAX_ZOOM_EXCESS:.2g}, got focal lengths {focals} mm; use another --scale"
        )
    return pairs


def _distance(ratio: float, scale: int) -> tuple[bool, float]:
    """Sorts ratios of at least `scale` first, the nearest first."""
    return ratio < scale * (1 - 1e-6), abs(math.log(ratio / scale))


def _listed(shots: Sequence[Shot]) -> str:
    return ", ".join(shot.frame.jpgs[0].name for shot in shots)
