"""The command line: one clear line and exit code 2 for what cannot work, and never a traceback."""

import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import cli
from preprocessing.estimate import Estimate
from preprocessing.report.job_summary import estimate_line

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
        (["train", "SHARDS", "--set", "model.packing_kernel=7"], "expected to divide"),
        (["train", "nosuch"], "nosuch: expected shards"),
        (["train", "SHARDS", "--config", "smoke", "--resume"], "start one without --resume"),
        (["train", "SHARDS", "--workers", "4-1"], "the larger number last"),
        (["evaluate", "SHARDS"], "or use --model starter"),
        (["evaluate", "SHARDS", "--model", "nosuch"], "expected a checkpoint folder, got no such folder"),
        (["evaluate", "SHARDS", "--protocol", "psychic"], "--protocol: expected self or oracle"),
        (
            ["zoom", "nosuch.dng", "-o", "out.png", "--model", "nosuch"],
            "expected a checkpoint folder, got no such folder",
        ),
        (["rollback"], "expected a champion"),
        (["preprocess", "nosuch", "out"], "nosuch"),
        (["preprocess", "EMPTY", "out"], "EMPTY"),
        (["preprocess", "EMPTY", "out", "--missing-jpg", "maybe"], "quarantine or render"),
        (["inspect", "EMPTY", "-o", "OUT"], "EMPTY: expected shards or a quarantine, got neither"),
        (["inspect", "SHARDS", "-o", "EMPTY"], "report.html"),
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


@pytest.mark.parametrize("term", ["perceptual_weight", "contextual_weight", "cobi_vgg_weight"])
@pytest.mark.parametrize("verb", [["train"], ["train", "--vgg-weights", "nosuch.pth"], ["tune"]])
def test_a_loss_on_vgg_features_is_refused_without_their_weights_before_a_run_exists(
    verb, term, tiny_shards, tmp_path, monkeypatch, capsys
):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    arguments = [*verb, tiny_shards, "--config", "smoke", "--set", f"loss.{term}=0.1"]
    assert run_here(monkeypatch, *arguments, data=tmp_path / "data") == 2
    written = capsys.readouterr().err
    assert written.startswith("sdan: ") and written.count("\n") == 1, written
    assert "name the file with --vgg-weights PATH" in written
    assert ("nosuch.pth" in written) == ("nosuch.pth" in verb)
    assert not (tmp_path / "data").exists()


def test_the_installed_command_says_the_same():
    done = subprocess.run([SDAN, "train", "x", "--config", "nosuch"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sdan: --config: expected one of paper_4x")
    assert done.stderr.count("\n") == 1


def test_without_a_champion_zoom_takes_the_starter_model_and_says_so(tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (96, 80, 3), np.uint8)).save(tmp_path / "photo.png")
    arguments = ["zoom", tmp_path / "photo.png", "-o", tmp_path / "zoomed.png"]
    assert run_here(monkeypatch, *arguments, data=tmp_path / "data") in (0, None)
    assert Image.open(tmp_path / "zoomed.png").size == (320, 384)
    assert "starter model, which was trained only on simulated RAW" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()  # looking for a champion makes nothing


def test_the_champion_goes_before_the_starter_model(tmp_path, monkeypatch, capsys):
    from pipelines import registry

    uri = registry.default_tracking_uri(tmp_path / "data")
    registry.prepare_database(uri)
    run_id = registry.create_run(uri, "sdan", "seen")
    registry.set_champion(uri, registry.register_model(uri, run_id, registry.STARTER_FOLDER))
    Image.new("RGB", (64, 64), (90, 80, 70)).save(tmp_path / "photo.png")
    arguments = ["zoom", tmp_path / "photo.png", "-o", tmp_path / "zoomed.png"]
    assert run_here(monkeypatch, *arguments, data=tmp_path / "data") in (0, None)
    assert "starter" not in capsys.readouterr().out


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


def test_a_dry_run_says_how_much_and_how_long():
    line = estimate_line(Estimate(tiles=40, bytes=58_000_000, seconds=None, cpus=2))
    assert line == "about 40 tiles, 58 MB; the time is unknown before a first run into these SHARDS"
    line = estimate_line(Estimate(tiles=60_000, bytes=87_000_000_000, seconds=7200.0, cpus=16))
    assert line == "about 60000 tiles, 87 GB, 2.0 hours on 16 CPUs at the last run's rate"
