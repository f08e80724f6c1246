"""What a preprocessing run prints at its end."""

from collections import Counter

from preprocessing.report.job_summary import job_summary
from preprocessing.shards import PreprocessReport


def test_remarks_are_counted():
    report = PreprocessReport(written=9, remarks=Counter({"camera JPG: colours converted from P3 to sRGB": 7}))
    lines = job_summary(report, "SHARDS", dry_run=False).splitlines()
    assert lines[1:] == ["  7 of the pairs written: camera JPG: colours converted from P3 to sRGB"]


def test_pairs_without_registration_are_counted():
    report = PreprocessReport(pairs=9, todo=9, written=9, rows=30, fallbacks=2, unaligned=1)
    lines = job_summary(report, "SHARDS", dry_run=False).splitlines()
    assert (
        lines[1]
        == "  2 of the pairs written could not be registered and fell back to the focal lengths (scale_fallback)"
    )
    assert lines[2].startswith("  1 of the pairs written neither correlate nor register, and were kept by --keep-unal")
    assert len(job_summary(PreprocessReport(written=9), "SHARDS", dry_run=False).splitlines()) == 1
