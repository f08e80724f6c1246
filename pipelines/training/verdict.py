"""Whether a run's best checkpoint is worth registering: it must beat the run's start, and bicubic enlargement.

All scores are PSNR of the validation crops by the self protocol. The start is compared by SELECT_BY (against the
aligned target, or the raw one), which also selected the checkpoint; bicubic against the true picture where it is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.training.progress import SELECT_BY
from pipelines.training.run_folder import first_report

BICUBIC = "val_bicubic"
"""Prefix of bicubic's scores in the first report: `val_bicubic_true_psnr` and so on."""


@dataclass(frozen=True)
class Verdict:
    """The best checkpoint beside what it must beat; dB."""

    epoch: int
    epochs: int
    target: str
    """true, aligned or raw."""
    score: float
    selected: float
    """SELECT_BY, which is `score` unless the target is true."""
    start: float | None
    """SELECT_BY before the first step; None: the run does not know."""
    bicubic: float | None
    """None: the run does not know (it was begun by an earlier version)."""
    selected_by: str = "aligned"
    """The target of SELECT_BY: aligned, or raw if no crop could be aligned."""

    @property
    def fault(self) -> str | None:
        """Why the model is not worth registering; None if it is."""
        if self.start is not None and not self.selected > self.start:
            return f"it is not better than before the first step ({self.start:.2f} dB)"
        if self.bicubic is not None and not self.score > self.bicubic:
            return f"it is not better than bicubic ({self.bicubic:.2f} dB)"
        return None

    @property
    def gains(self) -> dict[str, float]:
        """What MLflow's table of runs shows: the score, and how far above bicubic and the start it is; dB."""
        known = {"best_psnr": self.score}
        if self.bicubic is not None:
            known["gain_over_bicubic_db"] = self.score - self.bicubic
        if self.start is not None:
            known["gain_over_start_db"] = self.selected - self.start
        return known

    def __str__(self) -> str:
        parts = [f"{self.score:.2f} dB (self, {self.target}), epoch {self.epoch} of {self.epochs}"]
        if self.bicubic is not None:
            parts.append(f"{self.score - self.bicubic:+.2f} dB over bicubic")
        if self.start is not None:
            by = f" (self, {self.selected_by})" if self.target == "true" else ""
            parts.append(f"{self.selected - self.start:+.2f} dB over the start{by}")
        return "; ".join(parts)


def judge(folder: Path, best: Mapping[str, float]) -> Verdict:
    """The verdict on a run's best checkpoint.

    Args:
        folder: the run's folder.
        best: the report of that checkpoint.
    """
    first = first_report(folder)
    if int(first.get("epoch", -1)) != 0:
        first = {}
    known = [target for target in ("true", "aligned") if _finite(best.get(f"val_self_{target}_psnr")) is not None]
    target = next(iter(known), "raw")
    name = "val_self_true_psnr" if target == "true" else SELECT_BY
    return Verdict(
        epoch=int(best["epoch"]),
        epochs=int(best["epochs"]),
        target=target,
        score=float(best[name]),
        selected=float(best[SELECT_BY]),
        start=_finite(first.get(SELECT_BY)),
        bicubic=_finite(first.get(f"{BICUBIC}_{target}_psnr")),
        selected_by="aligned" if "aligned" in known else "raw",
    )


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, float | int) and math.isfinite(value) else None
