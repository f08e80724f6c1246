"""Rejects RAW files that do not hold an intact Bayer mosaic, with one line that says why."""

from pathlib import Path
from typing import Any

import numpy as np
import rawpy
from numpy.typing import NDArray

_RAW_NAMES = (
    "3fr ari arw bay cr2 cr3 crw dcr dng erf fff gpr iiq k25 kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf"
    " srw x3f"
)
RAW_SUFFIXES = frozenset(_RAW_NAMES.split())
BLOCK = ((0, 0), (0, 1), (1, 0), (1, 1))
"""(row, col) of R, G1, G2, B in an RGGB block."""
COPY_OR_EXCLUDE = "copy it again or exclude it"
_MAX_PIXELS = 400_000_000
_MAX_PIXELS_PER_BYTE = 32
"""Sensor noise does not compress below a quarter of a bit per pixel, so a file that declares more pixels is damaged."""


class RawError(ValueError):
    """A RAW file that cannot be used; the message is one line that says why."""


def require_plausible_size(raw: Any, label: str, source: str | Path | bytes) -> None:
    """Check the declared size before memory is allocated for it."""
    width, height = raw.sizes.raw_width, raw.sizes.raw_height
    size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    limit = min(_MAX_PIXELS, _MAX_PIXELS_PER_BYTE * size)
    if width * height > limit:
        raise RawError(
            f"{label}: expected at most {limit} pixels in {size} bytes, got {width}x{height} declared; "
            f"{COPY_OR_EXCLUDE}"
        )


def require_bayer(raw: Any, label: str) -> None:
    """Check that the open rawpy.RawPy holds one 2x2 mosaic of square pixels."""
    if raw.raw_type != rawpy.RawType.Flat or raw.raw_image is None:
        raise _not_bayer(label, "demosaiced or layered data (linear DNG, Foveon)")
    try:
        pattern = raw.raw_pattern
    except NotImplementedError as error:  # rawpy does not know the number that LibRaw gives for the pattern
        raise _not_bayer(label, f"colour pattern unknown ({error})") from error
    if pattern is None or raw.num_colors == 1:
        raise _not_bayer(label, "monochrome sensor")
    if pattern.shape != (2, 2):
        kind = "X-Trans" if pattern.shape == (6, 6) else f"{pattern.shape[0]}x{pattern.shape[1]}"
        raise _not_bayer(label, f"colour pattern {kind}")
    if raw.sizes.pixel_aspect != 1.0 or (raw.sizes.iheight, raw.sizes.iwidth) != (raw.sizes.height, raw.sizes.width):
        raise _not_bayer(label, "non-square pixels or a diagonal grid")


def rggb_origin(pattern: NDArray[Any], colour_names: bytes, label: str) -> tuple[int, int]:
    """(row, col), 0 or 1 each, of the first red pixel whose 2x2 block is RGGB."""
    letters = np.array([[chr(colour_names[channel]) for channel in row] for row in pattern])
    for row, col in BLOCK:
        if "".join(np.roll(letters, (-row, -col), (0, 1)).ravel()) == "RGGB":
            return row, col
    raise _not_bayer(label, f"colour pattern {''.join(letters.ravel())}")


def whole_blocks(mosaic: NDArray[Any], origin: tuple[int, int], label: str) -> NDArray[Any]:
    """The part of the visible area with whole RGGB blocks."""
    height, width = ((length - start) // 2 * 2 for length, start in zip(mosaic.shape, origin, strict=True))
    if min(height, width) < 2:
        raise RawError(
            f"{label}: expected a visible area of at least 4x4 pixels, got {mosaic.shape[1]}x{mosaic.shape[0]}; "
            "exclude it"
        )
    return mosaic[origin[0] : origin[0] + height, origin[1] : origin[1] + width]


def require_complete(mosaic: NDArray[Any], label: str) -> None:
    """LibRaw silently fills the missing rows of a truncated file with zeros; a working sensor has no all-zero row."""
    if mosaic[-2:].any():
        return
    filled = np.flatnonzero(mosaic.any(axis=1))
    last = int(filled[-1]) + 1 if filled.size else 0
    raise RawError(f"{label}: expected {len(mosaic)} rows of data, got {last} (half-written?); {COPY_OR_EXCLUDE}")


def _not_bayer(label: str, got: str) -> RawError:
    return RawError(f"{label}: expected counts of a 2x2 Bayer sensor, got {got}; exclude it")
