"""One retraining at a time on a data folder, and what becomes of a first model."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import retrain as verb
from pipelines.retrain import LOCK, RetrainRunning
from preprocessing.shards import PreprocessOptions

HOLD = """
import sys, time
from pathlib import Path
from pipelines.retrain import _only_one
with _only_one(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_retraining_names_the_first_and_ends(tmp_path):
    def retrain():
        return verb.retrain(str(tmp_path / "raw"), str(tmp_path / "shards"), data=tmp_path, options=PreprocessOptions())

    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        began = time.monotonic()
        with pytest.raises(RetrainRunning, match=rf"a retraining is running \(process {holder.pid} on \S+ since 20"):
            retrain()
        assert time.monotonic() - began < 5
    finally:
        holder.kill()
        holder.wait()
    # The killed one left its file but not its lock; the next one gets as far as its own mistake.
    assert (tmp_path / LOCK).read_text().startswith(f"process {holder.pid}")
    with pytest.raises(ValueError, match=r"expected folders like 00001/00001\.ARW"):
        retrain()
    assert (tmp_path / LOCK).read_text() == ""


def test_the_command_says_so_and_exits_with_0(tmp_path, monkeypatch, capsys):
    def running(*arguments: object, **options: object) -> None:
        raise RetrainRunning(f"{tmp_path / LOCK}: a retraining is running (process 1 on here since now); this one ends")

    monkeypatch.setattr(verb, "retrain", running)
    from typer.testing import CliRunner

    from pipelines.cli import app

    done = CliRunner().invoke(app, ["--data", str(tmp_path), "retrain", "RAW", "SHARDS"])
    assert done.exit_code == 0 and "a retraining is running" in done.output


def test_raw_that_is_missing_is_named_before_a_database_is_made(tmp_path):
    with pytest.raises(ValueError, match="expected folders like"):
        verb.retrain(str(tmp_path / "raw"), str(tmp_path / "s"), data=tmp_path / "data", options=PreprocessOptions())
    assert [path.name for path in Path(tmp_path / "data").iterdir()] == [LOCK]
