"""What the names of pictures say where there is no RAW: which scene one shows, and at which focal length.

002H.PNG, 002L.PNG                       City100: the long and the short focal length of scene 002
Canon_001_HR.png, Canon_001_LR4.png      RealSR
DSC_1282_x1.png, DSC_1282_x4.png         DRealSR: x1 is the long focal length
yard_tele.jpg, yard_wide.jpg             also long and short, high and low
yard_26mm.jpg, yard_77mm.jpg             focal lengths
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from preprocessing.frames import Frame, Sequence
from preprocessing.schema import SPLITS

EXAMPLES = "_H and _L, _HR and _LR, _tele and _wide, or _26mm and _77mm"
_LONG = r"hr?|high|long|tele|x1"
_SHORT = r"l|lr(?:[ _-]?x?[2-9])?|low|short|wide|x[2-9]"
_NAME = re.compile(
    rf"(?P<scene>.*?)(?:^|[ _.-]+|(?<=\d))(?:(?P<long>{_LONG})|(?P<short>{_SHORT})|(?P<focal>\d+(?:\.\d+)?)mm)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Named:
    """What one picture's name says."""

    scene: str
    """The name without its last part; the whole name if that part says nothing."""
    role: str | None = None
    """long or short."""
    focal_mm: float | None = None


def read_name(stem: str) -> Named:
    """Read a file name without its suffix, e.g. "002H"."""
    found = _NAME.fullmatch(stem)
    if found is None:
        return Named(stem)
    role = next((role for role in ("long", "short") if found[role]), None)
    return Named(found["scene"], role, float(found["focal"]) if found["focal"] else None)


def by_scene(sequences: Iterable[Sequence]) -> list[Sequence]:
    """The sequences, where a folder that holds several scenes by its files' names becomes a sequence for each.

    The scenes of RAW itself and of RAW/train, val and test keep their names; in another folder they are named
    FOLDER-SCENE.
    """
    return [part for sequence in sequences for part in _scenes(sequence)]


def _scenes(sequence: Sequence) -> list[Sequence]:
    groups: dict[str, list[Frame]] = defaultdict(list)
    for frame in sequence.frames:
        groups[read_name(frame.stem).scene].append(frame)
    if sum(len(frames) > 1 for frames in groups.values()) < 2:
        return [sequence]
    top = sequence.folder in ("", *SPLITS)
    return [
        replace(
            sequence,
            name=scene if top else f"{sequence.name}-{scene}",
            split=sequence.folder if sequence.folder in SPLITS else sequence.split,
            frames=tuple(frames),
        )
        for scene, frames in sorted(groups.items())
    ]
