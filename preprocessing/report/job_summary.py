"""What `sdan preprocess` and `sdan retrain` print about a preprocessing run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from preprocessing.estimate import Estimate
from preprocessing.shard_folder.names import QUARANTINE

if TYPE_CHECKING:
    from preprocessing.shards import PreprocessReport

_LISTED = 20


def job_summary(report: PreprocessReport, shards: str, *, dry_run: bool) -> str:
    """Counts, the estimate of a dry run, the first pairs that were set aside, and notes: one per line."""
    done = f"{report.todo} would be written" if dry_run else f"{report.written} written ({report.rows} tiles)"
    lines = [
        f"{report.pairs} pairs: {done}, {report.skipped} finished earlier, {len(report.quarantined)} set aside, "
        f"{report.seconds:.1f} s"
    ]
    for number, what in (
        (report.fallbacks, "could not be registered and fell back to the focal lengths (scale_fallback)"),
        (report.unaligned, "neither correlate nor register, and were kept by --keep-unaligned (unaligned)"),
    ):
        if number:
            lines.append(f"  {number} of the pairs written {what}")
    lines += [f"  {number} of the pairs written: {remark}" for remark, number in sorted(report.remarks.items())]
    if report.estimate and report.todo:
        lines.append(f"  {estimate_line(report.estimate)}")
    lines += [f"  set aside: {entry.sequence} {entry.pair}: {entry.reason}" for entry in report.quarantined[:_LISTED]]
    if len(report.quarantined) > _LISTED:
        where = "" if dry_run else f" in {shards}/{QUARANTINE}/"
        lines.append(f"  ... {len(report.quarantined) - _LISTED} more{where}")
    return "\n".join([*lines, *(f"  {note}" for note in report.notes)])


def estimate_line(estimate: Estimate) -> str:
    """E.g. "about 40 tiles, 58 MB, 2.0 hours on 16 CPUs at the last run's rate"."""
    large = estimate.bytes >= 1e9
    size = f"about {estimate.tiles} tiles, {estimate.bytes / (1e9 if large else 1e6):.3g} {'GB' if large else 'MB'}"
    if estimate.seconds is None:
        return f"{size}; the time is unknown before a first run into these SHARDS"
    minutes = estimate.seconds / 60
    span = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{max(minutes, 0.1):.1f} minutes"
    return f"{size}, {span} on {estimate.cpus:g} CPUs at the last run's rate"
