"""LibRaw's own reading of a RAW file's tags: the last resort for CRW, CR3, RAF, MRW and others that are not TIFF files.

LibRaw is C++ and may crash on a damaged file, so it runs in a child process: `python -m preprocessing.raw.libraw_tags`
reads the file from its standard input and answers with JSON.
"""

import contextlib
import io
import json
import math
import subprocess
import sys
from typing import Any

import rawpy

from preprocessing.raw.exif import Exif

_LIMIT_S = 60.0


def libraw_exif(data: bytes) -> Exif:
    """Focal length, ISO, exposure time and f-number as LibRaw reads them from the whole file `data`.

    Never raises: an unreadable file has no tags.
    """
    command = [sys.executable, "-m", "preprocessing.raw.libraw_tags"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, TypeError):
        done = subprocess.run(command, input=data, capture_output=True, timeout=_LIMIT_S, check=True)
        return Exif(**json.loads(done.stdout))
    return Exif()


def _tags(data: bytes) -> dict[str, float | None]:
    with rawpy.imread(io.BytesIO(data)) as raw:
        other = raw.other
        return {
            "focal_mm": _positive(other.focal_length),
            "iso": _positive(other.iso_speed),
            "exposure_s": _positive(other.shutter_speed),
            "f_number": _positive(other.aperture),
        }


def _positive(value: Any) -> float | None:
    return float(value) if math.isfinite(value) and value > 0 else None


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_tags(sys.stdin.buffer.read())))
