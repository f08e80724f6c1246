"""What a comparison found, in words."""

from __future__ import annotations

import math

from pipelines.scoring.bootstrap import LEVEL, Interval


def gain_sentence(label: str, baseline: str, target: str, found: Interval) -> str:
    """E.g. "SDAN (self) is 0.52 dB above bicubic of the camera JPG (95 % interval +0.31 to +0.77, 8 sequences)."

    Args:
        target: the target of the scores, for the text.
        found: the PSNR of `label` minus that of `baseline`, dB.
    """
    against = f"against the {target} target"
    if math.isnan(found.mean):
        return f"{label} has no score {against}."
    side = "above" if found.mean >= 0 else "below"
    what = f"{label} is {abs(found.mean):.2f} dB {side} {baseline} {against}"
    if math.isnan(found.low):
        return f"{what}; one sequence only, so that nobody knows how far this holds for others."
    interval = f"{100 * LEVEL:.0f} % interval {found.low:+.2f} to {found.high:+.2f}, {found.sequences} sequences"
    if found.certain:
        return f"{what} ({interval})."
    return f"No difference larger than the noise: {what} ({interval})."
