"""The tables on paper are rates times counts; the stand-in task is a task of the job."""

import json
from dataclasses import asdict

import pytest
import scale

from pipelines.costs import prices, rates
from preprocessing.pairs import PairResult
from preprocessing.plan import PairJob
from preprocessing.raw.exif import Exif


def rows():
    """Name of a row -> its cells."""
    found = {}
    for line in scale.on_paper():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| "):
            found[cells[0]] = cells[1:]
    return found


def test_counts_grow_with_the_sequences():
    assert rows()["pairs = tasks"] == ["1,500", "15,000", "150,000"]
    assert rows()["tiles"] == ["60,000", "600,000", "6,000,000"]


def test_hours_and_dollars_are_rates_times_counts():
    hours = 15_000 * rates.CPU_TASK_S.value / 3600
    assert rows()["CPU hours"][1] == f"{hours:.1f}"
    node = prices.INSTANCES["c6i.4xlarge"]
    assert rows()["4 x c6i.4xlarge"][1] == f"{60 * hours / 64:.1f} min, {hours / 64 * 4 * node.dollars:.2f} $"


def test_training_is_only_given_where_it_was_measured():
    training = [name for name in rows() if "H200" in name or "A10G" in name or "A100" in name]
    assert training == ["p5en.48xlarge, 8 x H200"]
    crops = 300 * 1500
    assert rows()[training[0]][1].startswith(f"{crops / (427 * 8) / 60:.1f} min")


def test_the_stand_in_answers_as_the_job_does():
    fields = dict.fromkeys(PairJob.__dataclass_fields__) | {"sequence": "00001", "lr": "00006", "hr": "00002"}
    job = PairJob(**fields | {"lr_exif": Exif(), "hr_exif": Exif(), "fingerprint": "0" * 16})
    answer = scale.stand_in({"job": json.dumps(asdict(job))})
    assert PairResult(**answer) == PairResult(job.key, "written", rows=40, bytes=60_000_000, seconds=1.6)


def test_memory_is_read_from_the_kernel():
    assert scale._peak_mb() >= scale._now_mb() * 0.9 > 10
    assert scale._status("VmNothing") == pytest.approx(0)
