"""Which models are registered: those that beat their start and bicubic."""

import json
import math

import pytest

from pipelines.training.run_folder import PROGRESS
from pipelines.training.verdict import judge


def run_of(folder, *reports):
    lines = [json.dumps({"epoch": epoch, "epochs": 4, **scores}) for epoch, scores in reports]
    (folder / PROGRESS).write_text("".join(f"{line}\n" for line in lines))


def scores(true=None, aligned=24.0, raw=23.0):
    found = {"val_self_raw_psnr": raw, "val_psnr": raw if math.isnan(aligned) else aligned}
    found["val_self_aligned_psnr"] = aligned
    return found | ({} if true is None else {"val_self_true_psnr": true})


def bicubic(true=None, aligned=23.5, raw=22.5):
    found = {"val_bicubic_raw_psnr": raw, "val_bicubic_aligned_psnr": aligned}
    return found | ({} if true is None else {"val_bicubic_true_psnr": true})


@pytest.mark.parametrize(
    ("start", "base", "best", "target", "fault"),
    [
        (scores(true=30.0), bicubic(true=28.0), scores(true=29.9, aligned=24.5), "true", None),
        (scores(true=30.0), bicubic(true=28.0), scores(true=31.0), "true", "before the first step (24.00 dB)"),
        (scores(true=20.0, aligned=20.0), bicubic(true=28.0), scores(true=27.0), "true", "bicubic (28.00 dB)"),
        # Real data has no true picture; SELECT_BY and the aligned target decide.
        (scores(aligned=20.0), bicubic(aligned=23.5), scores(aligned=24.0), "aligned", None),
        (scores(aligned=20.0), bicubic(aligned=24.0), scores(aligned=24.0), "aligned", "bicubic (24.00 dB)"),
        (scores(aligned=math.nan), bicubic(aligned=math.nan, raw=22.0), scores(aligned=math.nan), "raw", "first step"),
        # A run of an earlier version does not know bicubic's score.
        (scores(aligned=20.0), {}, scores(aligned=21.0), "aligned", None),
    ],
)
def test_a_model_must_beat_start_and_bicubic(start, base, best, target, fault, tmp_path):
    run_of(tmp_path, (0, start | base), (3, best))
    verdict = judge(tmp_path, {"epoch": 3, "epochs": 4, **best})
    assert (verdict.epoch, verdict.target) == (3, target)
    assert verdict.fault is None if fault is None else fault in (verdict.fault or "")


def test_the_line_names_epoch_score_and_gains(tmp_path):
    run_of(tmp_path, (0, scores(true=29.0) | bicubic(true=28.0)), (2, scores(true=30.5, aligned=25.0)))
    line = str(judge(tmp_path, {"epoch": 2, "epochs": 4, **scores(true=30.5, aligned=25.0)}))
    gains = "+2.50 dB over bicubic; +1.00 dB over the start (self, aligned)"
    assert line == f"30.50 dB (self, true), epoch 2 of 4; {gains}"


def test_without_an_aligned_crop_the_line_does_not_say_it(tmp_path):
    start, best = scores(true=29.0, aligned=math.nan, raw=22.0), scores(true=30.5, aligned=math.nan, raw=23.0)
    run_of(tmp_path, (0, start), (2, best))
    line = str(judge(tmp_path, {"epoch": 2, "epochs": 4, **best}))
    assert line == "30.50 dB (self, true), epoch 2 of 4; +1.00 dB over the start (self, raw)"


def test_a_log_without_its_first_line_has_no_start(tmp_path):
    run_of(tmp_path, (2, scores(true=30.5)))
    verdict = judge(tmp_path, {"epoch": 2, "epochs": 4, **scores(true=30.5)})
    assert verdict.start is None and verdict.bicubic is None and verdict.fault is None


def test_the_gains_for_mlflow_leave_out_what_is_unknown(tmp_path):
    run_of(tmp_path, (0, scores(true=29.0) | bicubic(true=28.0)), (2, scores(true=30.5, aligned=25.5)))
    gains = judge(tmp_path, {"epoch": 2, "epochs": 4, **scores(true=30.5, aligned=25.5)}).gains
    assert gains == {"best_psnr": 30.5, "gain_over_bicubic_db": 2.5, "gain_over_start_db": 1.5}
    run_of(tmp_path, (2, scores()))
    assert judge(tmp_path, {"epoch": 2, "epochs": 4, **scores()}).gains == {"best_psnr": 24.0}
