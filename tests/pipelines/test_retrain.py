"""The verb `sdan retrain`: its checks, its exit codes, and what a second run at the same time does."""

import pytest
from typer.testing import CliRunner

from pipelines import retrain as verb
from pipelines.cli import app
from pipelines.retrain import RetrainError, RetrainRunning
from pipelines.retraining.lock import LOCK, hold
from preprocessing.shards import PreprocessOptions


def retrain(folder, **options):
    return verb.retrain(
        str(folder / "raw"), str(folder / "shards"), data=folder / "data", options=PreprocessOptions(), **options
    )


def test_a_second_retraining_ends_and_the_next_one_works(tmp_path):
    with hold(tmp_path / "data", "shards"), pytest.raises(RetrainRunning, match=r"a retraining is running \(process"):
        retrain(tmp_path)
    with pytest.raises(ValueError, match=r"expected folders like 00001/00001\.ARW"):
        retrain(tmp_path)
    assert (tmp_path / "data" / LOCK).read_text() == ""


def test_the_command_says_so_and_exits_with_0(tmp_path, monkeypatch, capsys):
    def running(*arguments: object, **options: object) -> None:
        raise RetrainRunning(f"{tmp_path / LOCK}: a retraining is running (process 1 on here since now); this one ends")

    monkeypatch.setattr(verb, "retrain", running)
    done = CliRunner().invoke(app, ["--data", str(tmp_path), "retrain", "RAW", "SHARDS"])
    assert done.exit_code == 0 and "a retraining is running" in done.output


def test_raw_that_is_missing_is_named_before_a_database_is_made(tmp_path):
    with pytest.raises(ValueError, match="expected folders like"):
        retrain(tmp_path)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["retrain.json", LOCK]
    shown = CliRunner().invoke(app, ["--data", str(tmp_path / "data"), "status"]).output
    assert "failed: " in shown and "expected folders like" in shown


@pytest.mark.parametrize(("name", "value"), [("margin_db", -0.1), ("margin_db", float("nan")), ("replay_share", 1.0)])
def test_wrong_values_are_one_line_before_anything_is_made(tmp_path, name, value):
    option = "--margin" if name == "margin_db" else "--replay"
    with pytest.raises(RetrainError, match=f"^{option}: expected .* got"):
        retrain(tmp_path, **{name: value})
    assert not (tmp_path / "data").exists()
