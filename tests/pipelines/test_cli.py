"""The command line: one clear line and exit code 2 for what cannot work, and never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import cli

SDAN = str(Path(sys.executable).with_name("sdan"))


def run_here(monkeypatch, *arguments, data):
    """The command in this process, which has imported torch and Ray already; returns the exit code."""
    monkeypatch.setenv("SDAN_DATA", str(data))
    monkeypatch.setattr(sys, "argv", ["sdan", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "SHARDS", "--config", "nosuch"], "srraw_4x"),
        (["train", "SHARDS", "--set", "model.packing=4"], "did you mean model.packing_kernel"),
        (["train", "SHARDS", "--set", "model.packing_kernel=7"], "must divide"),
        (["train", "nosuch"], "no shards"),
        (["train", "SHARDS", "--config", "smoke", "--resume"], "start one without --resume"),
        (["evaluate", "SHARDS"], "train a model first"),
        (["evaluate", "SHARDS", "--model", "nosuch"], "no such checkpoint folder"),
        (["evaluate", "SHARDS", "--protocol", "psychic"], "self or oracle expected"),
        (["zoom", "nosuch.dng", "-o", "out.png", "--model", "nosuch"], "no such checkpoint folder"),
        (["rollback"], "no champion"),
        (["preprocess", "nosuch", "out"], "nosuch"),
        (["preprocess", "EMPTY", "out"], "EMPTY"),
        (["simulate", "OUT", "--preset", "earthquake"], "handheld"),
    ],
)
def test_wrong_input_ends_in_one_line(arguments, said, tiny_shards, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    places = {"SHARDS": tiny_shards, "EMPTY": tmp_path / "empty", "OUT": tmp_path / "sim", "out": tmp_path / "out"}
    code = run_here(monkeypatch, *(places.get(word, word) for word in arguments), data=tmp_path / "data")
    written = capsys.readouterr().err
    assert code == 2, written
    assert "Traceback" not in written
    lines = [line for line in written.splitlines() if line.startswith("sdan: ")]
    assert len(lines) == 1, written
    assert said.replace("EMPTY", str(tmp_path / "empty")) in lines[0]


def test_the_installed_command_says_the_same():
    done = subprocess.run([SDAN, "train", "x", "--config", "nosuch"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sdan: --config: one of paper_4x")
    assert done.stderr.count("\n") == 1


def test_help_names_every_verb():
    done = subprocess.run([SDAN, "--help"], capture_output=True, text=True, timeout=60)
    for verb in (
        "demo",
        "simulate",
        "preprocess",
        "train",
        "evaluate",
        "tune",
        "retrain",
        "zoom",
        "rollback",
        "doctor",
    ):
        assert f"  {verb}" in done.stdout
