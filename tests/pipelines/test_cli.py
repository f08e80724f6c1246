"""The command line: one clear line and exit code 2 for what cannot work, and never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

SDAN = str(Path(sys.executable).with_name("sdan"))


def sdan(*arguments, data):
    return subprocess.run(
        [SDAN, "--data", str(data), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


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
def test_wrong_input_ends_in_one_line(arguments, said, tiny_shards, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"SHARDS": tiny_shards, "EMPTY": tmp_path / "empty", "OUT": tmp_path / "sim", "out": tmp_path / "out"}
    done = sdan(*(places.get(word, word) for word in arguments), data=tmp_path / "data")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("sdan: ")]
    assert len(lines) == 1, done.stderr
    assert said.replace("EMPTY", str(tmp_path / "empty")) in lines[0]


def test_help_names_every_verb(tmp_path):
    done = sdan("--help", data=tmp_path)
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
