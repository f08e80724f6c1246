"""sweep.html from stand-in trials: what it says, and that it is self-contained. Ray is not started."""

import re

import numpy as np
import pytest
from PIL import Image

from tuning import page
from tuning.folder import Record, Refused
from tuning.importance import importance, pareto_front
from tuning.search import optuna_space
from tuning.space import choice, describe, loguniform
from tuning.tracking import SECONDS, TrialRow
from tuning.winners import Verdict

SPACE = {"loss.align_weight": loguniform(0.03, 3.0), "model.packing_kernel": choice([2, 4, 8, 16])}
COST = "ms_per_megapixel"
DEFAULT = {"loss.align_weight": 1.0, "model.packing_kernel": 8}


def trial(number, weight, kernel, score, status="finished", reason="", repeat_of="", epochs=6):
    history = tuple((epoch, score - 1.5 / epoch) for epoch in range(1, epochs + 1)) if score else ()
    score = history[-1][1] if history else None
    values = {SECONDS: 60.0 + 10 * number, COST: 500.0 / kernel + 10 * number} if status == "finished" else {}
    overrides = {"loss.align_weight": weight, "model.packing_kernel": kernel}
    name = f"{repeat_of}-r1" if repeat_of else f"1f2a_{number:05}"
    return TrialRow(
        name, f"r{name}", overrides, status, score, epochs if score else 0, history, reason, int(bool(repeat_of)),
        repeat_of, values,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    crops = tmp_path_factory.mktemp("crops")
    random = np.random.default_rng(0)
    for number in (3, 0):
        picture = random.integers(0, 255, (280, 800, 3), dtype=np.uint8)
        Image.fromarray(picture).resize((800, 280)).save(crops / f"1f2a_{number:05}.jpg", quality=50)
    rows = [trial(0, 1.0, 8, 28.5), trial(1, 0.25, 16, 28.3), trial(2, 2.0, 4, 28.6), trial(3, 0.3, 4, 29.0)]
    rows += [trial(n, 0.05 * 1.6 ** (n - 3), 2, 27.0, "stopped", epochs=2) for n in range(4, 9)]
    rows += [trial(9, 0.5, 16, None, "failed", "TrainError: run sweep-1f2a_00009: out of memory <b>")]
    rows += [trial(10, 0.3, 4, 29.1, repeat_of="1f2a_00003"), trial(11, 1.0, 8, 28.4, repeat_of="1f2a_00000")]
    rows.sort(key=lambda row: -(row.score or 0))
    verdict = Verdict(
        (
            "packing_kernel=4 is better than 8 by 0.51 dB (0.32 to 0.70, 2 seeds, 12 sequences).",
            "The best is better than the default setting by 0.51 dB (0.32 to 0.70).",
        ),
        "1f2a_00003",
        0.19,
    )
    record = Record("kernel", "x", "p", describe(SPACE), "val_psnr", "max", 10, 6, 2, 0, repeats=2)
    refused = Refused({"loss.align_weight=0.2, model.packing_kernel=16": "packing_kernel: expected a divisor of 24"})
    command = "sdan train shards --config demo --set loss.align_weight=0.3 --set model.packing_kernel=4"
    objectives = {"val_psnr": "max", COST: "min"}
    return page.Report("kernel", objectives, rows, verdict, refused, SPACE, DEFAULT, command, crops, record, "")


def test_the_page_shows_finding_trials_reasons_and_command(report):
    html = page.render(report)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    assert f"<h1>{report.verdict.sentences[0]}</h1>" in html and report.command in html
    for row in report.searched:
        assert row.score is None or row.trial_id in text
    assert "out of memory &lt;b&gt;" in html and "out of memory <b>" not in html
    assert "never started: packing_kernel: expected a divisor of 24" in text
    assert html.count('class="crops"') == 2 and "best : " in text and "default, worst : " not in text
    for part in ("What matters", "Each value against the score", "Pareto front", "Learning curves", "other seeds"):
        assert part in text
    assert html.count("data:image/svg+xml") == 5 and html.count("data:image/jpeg") == 2


def test_the_page_is_self_contained(report):
    html = page.render(report)
    assert "<script" not in html and not re.search(r"""(src|href)=["'](?!data:)""", html)
    assert "default-src 'none'; img-src data:" in html
    assert len(html) < 2_000_000 and html == page.render(report)


def test_a_page_of_failures_only_is_written(report, tmp_path):
    lost = [row for row in report.trials if row.status == "failed"]
    verdict = Verdict(("Nothing to compare.",), None, None)
    empty = page.Report(
        "x", {"val_psnr": "max"}, lost, verdict, Refused(), SPACE, None, "", tmp_path, report.record, "time is up"
    )
    path = page.write(empty, tmp_path)
    assert path.name == "sweep.html" and "time is up" in path.read_text() and "out of memory" in path.read_text()


def test_importance_finds_the_parameter_that_matters():
    random = np.random.default_rng(0)
    rows = []
    for number in range(12):
        weight, kernel = float(random.uniform(0.03, 3)), int(random.choice([2, 4, 8, 16]))
        score = 28 + 2 * (kernel == 8) + random.normal(0, 0.05)
        overrides = {"loss.align_weight": weight, "model.packing_kernel": kernel}
        rows.append(TrialRow(str(number), "", overrides, "finished", score, 1, ((1, score),), ""))
    shares = importance(rows, optuna_space(SPACE), mode="max")
    assert next(iter(shares)) == "model.packing_kernel" and shares["model.packing_kernel"] > 0.7
    assert importance(rows[:5], optuna_space(SPACE), mode="max") == {}


def test_importance_of_many_trials_uses_some_of_all_ranks(monkeypatch):
    def trial(number):
        overrides = {"loss.align_weight": 1.0, "model.packing_kernel": 8 if number % 2 else 4}
        return TrialRow(str(number), "", overrides, "finished", 28 + number % 2, 1, ((1, 28.0),), "")

    added = []
    monkeypatch.setattr("optuna.study.Study.add_trial", lambda self, each: added.append(each.value))
    monkeypatch.setattr("tuning.importance.MOST_TRIALS", 10)
    importance([trial(number) for number in range(1000)], optuna_space(SPACE), mode="max")
    assert len(added) == 10 and set(added) == {28, 29}


def test_the_front_has_what_no_other_beats(report):
    objectives = {"val_psnr": "max", COST: "min"}
    front = pareto_front(report.trials, objectives)
    assert front[0].trial_id == "1f2a_00003"  # the best score is always on it
    for row in report.searched:
        if row.status == "finished" and row not in front:
            assert any(other.score >= row.score and other.values[COST] <= row.values[COST] for other in front)
    assert all(row.status == "finished" and not row.repeat for row in front)
