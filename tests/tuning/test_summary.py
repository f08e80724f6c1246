import pytest

from tuning import summary
from tuning.tracking import TrialRow, best_trial

TRIALS = [
    TrialRow("t3", "r3", {"a.rate": 0.003, "b": "x"}, "finished", 27.5, 3, ((1, 25.0), (2, 27.5), (3, 27.0)), ""),
    TrialRow("t1", "r1", {"a.rate": 0.3, "b": "y"}, "stopped", 21.0, 1, ((1, 21.0),), ""),
    TrialRow("t2", "r2", {"a.rate": 0.1, "b": "x"}, "failed", None, 0, (), "ValueError: diverged"),
]


def test_table_shows_every_trial_in_order_with_its_reason():
    lines = summary.table(TRIALS, metric="val_psnr").splitlines()
    assert lines[0].split() == ["trial", "a.rate", "b", "val_psnr", "epochs", "status", "reason"]
    assert lines[1].split() == ["*", "t3", "0.003", "x", "27.5000", "3", "finished"]
    assert lines[2].split() == ["t1", "0.3", "y", "21.0000", "1", "stopped"]
    assert lines[3].split() == ["t2", "0.1", "x", "-", "0", "failed", "ValueError:", "diverged"]


def test_plots_show_every_trial(tmp_path):
    epochs = summary.plot_epochs(TRIALS, metric="val_psnr").axes[0]
    assert [list(line.get_ydata()) for line in epochs.lines] == [[21.0], [25.0, 27.5, 27.0]]
    options = {"metric": "val_psnr", "band": 0.5, "mode": "max"}
    rate, name = (summary.plot_parameter(TRIALS, each, **options).axes[0] for each in ("a.rate", "b"))
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in rate.lines if len(line.get_xdata())] == [
        (0.3, 21.0),
        (0.003, 27.5),
    ]
    assert rate.get_xscale() == "log" and name.get_xlabel() == "b"
    assert [label.get_text() for label in name.get_xticklabels()] == ["x", "y"]
    band = rate.patches[0].get_extents().transformed(rate.transData.inverted())
    assert (band.y0, band.y1) == pytest.approx((27.0, 27.5))
    assert summary.write(TRIALS, tmp_path, metric="val_psnr").read_text().count("\n") == 4
    assert summary.svg(name.figure).startswith(b"<?xml")


def test_a_sweep_of_failures_still_has_a_summary(tmp_path):
    assert best_trial(TRIALS[2:]) is None
    assert "ValueError: diverged" in summary.write(TRIALS[2:], tmp_path, metric="m").read_text()


@pytest.mark.parametrize("status", ["failed", "abandoned", "running"])
def test_only_trials_that_ended_well_can_be_best(status):
    broken = TrialRow("t0", "r0", {"a.rate": 1.0}, status, 99.0, 1, ((1, 99.0),), "")
    assert best_trial([broken, *TRIALS]).trial_id == "t3"
