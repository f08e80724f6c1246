"""Colour spaces that a picture states by numbers instead of a profile: cICP, gAMA and cHRM of PNG, nclx of AVIF.

The numbers of cICP and nclx are those of ITU-T H.273, tables 2 and 3.
"""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preprocessing.colour import srgb_to_linear
from preprocessing.raw.profiles.icc import MatrixProfile, gamma_curve

_PNG_HEAD = b"\x89PNG\r\n\x1a\n"
_HEAD_BYTES = 1 << 16
"""Where AVIF keeps its boxes of properties: before the coded picture."""
_D65, _D50_XYZ = (0.3127, 0.3290), np.array([0.9642, 1.0, 0.8249])
_SRGB = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
_PRIMARIES = {
    1: ("sRGB", _SRGB),
    9: ("BT.2020", ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))),
    12: ("Display P3", ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))),
}
_AS_SRGB = (1, 2, 6, 13, 14, 15)
"""Curves: sRGB's (13), and those of video, which writers of still pictures mean as sRGB's; 2 is not stated."""
_GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0}
_HDR = {16: "PQ", 18: "HLG"}
_GAMMA_OF_SRGB = (0.45, 0.46)
"""Writers state sRGB's curve as this gAMA, which has room for a power only."""
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])

Primaries = tuple[tuple[float, float], ...]
"""(x, y) of red, green and blue."""


class HighDynamicRange(ValueError):
    """A picture whose values are not relative to a white: PQ or HLG. The message names the curve."""


def stated_space(data: bytes) -> tuple[str, MatrixProfile] | None:
    """(name, matrix and curves) of the space that a PNG or AVIF states by numbers; None for sRGB or if none is stated.

    A PNG's profile or sRGB chunk outranks gAMA and cHRM; cICP outranks all, as the PNG specification (3rd edition) has
    it. Raises HighDynamicRange.
    """
    if not data.startswith(_PNG_HEAD):
        at = data.find(b"colrnclx", 0, _HEAD_BYTES) + 8
        return _by_numbers(*struct.unpack_from(">HH", data, at)) if 8 <= at <= len(data) - 4 else None
    chunks = _chunks_before_pixels(data)
    if len(chunks.get(b"cICP", b"")) == 4:
        return _by_numbers(*chunks[b"cICP"][:2])
    if b"iCCP" in chunks or b"sRGB" in chunks:
        return None
    return _by_gamma(chunks.get(b"gAMA", b""), chunks.get(b"cHRM", b""))


def outranks_profile(data: bytes) -> bool:
    """Whether the numbers count although there is a profile."""
    return data.startswith(_PNG_HEAD) and len(_chunks_before_pixels(data).get(b"cICP", b"")) == 4


def _chunks_before_pixels(data: bytes) -> dict[bytes, bytes]:
    """The colour chunks of a PNG. Its other chunks are not copied."""
    found, at = {}, len(_PNG_HEAD)
    while at + 12 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"IDAT":
            break
        if kind in (b"cICP", b"gAMA", b"cHRM", b"iCCP", b"sRGB"):
            found[kind] = data[at + 8 : at + 8 + min(size, 32)]
        at += 12 + size
    return found


def _by_numbers(primaries: int, transfer: int) -> tuple[str, MatrixProfile] | None:
    if transfer in _HDR:
        raise HighDynamicRange(_HDR[transfer])
    name, colours = _PRIMARIES.get(primaries, _PRIMARIES[1])
    if transfer in _GAMMAS:
        return f"{name}, gamma {_GAMMAS[transfer]:g}", _profile(colours, _D65, gamma_curve(_GAMMAS[transfer]))
    if transfer not in _AS_SRGB or colours == _SRGB:
        return None
    return name, _profile(colours, _D65, _srgb_curve())


def _by_gamma(gamma: bytes, chromaticities: bytes) -> tuple[str, MatrixProfile] | None:
    exponent = int.from_bytes(gamma[:4], "big") / 100_000 if len(gamma) == 4 else 0.0
    white, colours = _D65, _SRGB
    if len(chromaticities) == 32:
        pairs = [value / 100_000 for value in struct.unpack(">8I", chromaticities)]
        white, *rest = zip(pairs[::2], pairs[1::2], strict=True)
        colours = tuple(rest)  # type: ignore[assignment]
    same = np.allclose((white, *colours), (_D65, *_SRGB), atol=0.005)
    like_srgb = _GAMMA_OF_SRGB[0] <= exponent <= _GAMMA_OF_SRGB[1]
    if (same and (like_srgb or not exponent)) or not (exponent == 0 or 0.1 <= exponent <= 10):
        return None
    curve = gamma_curve(1 / exponent) if exponent and not (same and like_srgb) else _srgb_curve()
    try:
        profile = _profile(colours, white, curve)
    except (np.linalg.LinAlgError, ZeroDivisionError):
        return None  # no colours can be made from such primaries
    return "the PNG's own primaries and gamma", profile


def _srgb_curve() -> NDArray[np.float64]:
    return np.asarray(srgb_to_linear(gamma_curve(1)), np.float64)


def _profile(colours: Primaries, white: tuple[float, float], curve: NDArray[np.float64]) -> MatrixProfile:
    """Primaries and white to the matrix to XYZ, adapted to D50 by Bradford's transform."""
    columns = np.stack([_xyz(*colour) for colour in colours], 1)
    matrix: NDArray[Any] = columns * np.linalg.solve(columns, _xyz(*white))
    cone = (_BRADFORD @ _D50_XYZ) / (_BRADFORD @ _xyz(*white))
    adapted = np.linalg.inv(_BRADFORD) @ np.diag(cone) @ _BRADFORD @ matrix
    if not np.isfinite(adapted).all():
        raise ZeroDivisionError
    return MatrixProfile(adapted, (curve,) * 3)


def _xyz(x: float, y: float) -> NDArray[np.float64]:
    """A chromaticity as XYZ with Y = 1."""
    return np.array([x / y, 1.0, (1 - x - y) / y])
