"""The command line: wrong input gets one line and exit code 2, never a traceback; the help covers every verb."""

import json
import os
import re
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sqlalchemy
import typer
from PIL import Image
from typer.testing import CliRunner

from pipelines import cli
from pipelines import config as configs
from preprocessing.estimate import Estimate
from preprocessing.plan import PreprocessError, PreprocessOptions
from preprocessing.report.job_summary import estimate_line
from preprocessing.schema import SCHEMA_VERSION
from sdan import starter_folder

SDAN = str(Path(sys.executable).with_name("sdan"))


def run_here(monkeypatch, *arguments, data):
    """Run the command in this process, which has already imported torch and Ray; returns the exit code."""
    monkeypatch.setenv("SDAN_DATA", str(data))
    monkeypatch.setattr(sys, "argv", ["sdan", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize("verb", [["status"], ["train", "shards", "--show-config"], ["rollback"]])
@pytest.mark.parametrize(("name", "got"), [("file", "a file"), ("link", "a link to nothing"), ("file/below", "a file")])
def test_data_that_is_no_folder_gets_one_line(verb, name, got, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert run_here(monkeypatch, *verb, data=tmp_path / name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sdan: --data {tmp_path / name}: expected a folder, or a new name, got {got}")
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


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
        (["evaluate", "SHARDS", "--model", "nosuch"], "expected a checkpoint folder, got none"),
        (["evaluate", "SHARDS", "--protocol", "psychic"], "--protocol: expected self or oracle"),
        (
            ["zoom", "nosuch.dng", "-o", "out.png", "--model", "nosuch"],
            "nosuch.dng: expected a photograph (RAW, JPG or PNG), got none",
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
def test_wrong_input_gets_one_line(arguments, said, tiny_shards, tmp_path, monkeypatch, capsys):
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
def test_a_vgg_loss_is_refused_without_weights(verb, term, tiny_shards, tmp_path, monkeypatch, capsys):
    """It is refused before the run exists, so nothing is written."""

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("sdan.perceptual.st_lpips.find_spec", lambda name: None)  # no VGG16 either
    arguments = [*verb, tiny_shards, "--config", "smoke", "--set", f"loss.{term}=0.1"]
    assert run_here(monkeypatch, *arguments, data=tmp_path / "data") == 2
    written = capsys.readouterr().err
    assert written.startswith("sdan: ") and written.count("\n") == 1, written
    assert "--vgg-weights PATH" in written
    assert ("nosuch.pth" in written) == ("nosuch.pth" in verb)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("verb", ["train", "tune"])
def test_an_st_lpips_loss_is_refused_without_weights(verb, tiny_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sdan.perceptual.st_lpips.find_spec", lambda name: None)
    arguments = [verb, tiny_shards, "--config", "smoke", "--set", "loss.st_lpips_weight=0.1"]
    assert run_here(monkeypatch, *arguments, data=tmp_path / "data") == 2
    assert capsys.readouterr().err == (
        "sdan: ST-LPIPS: expected the package stlpips-pytorch, got none; pip install stlpips-pytorch==0.0.2\n"
    )
    assert not (tmp_path / "data").exists()


def test_the_installed_command_prints_the_same_line():
    done = subprocess.run([SDAN, "train", "x", "--config", "nosuch"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sdan: --config: expected one of paper_4x")
    assert done.stderr.count("\n") == 1


def test_the_version_is_printed():
    from importlib.metadata import version

    shown = CliRunner().invoke(cli.app, ["--version"])
    assert (shown.exit_code, shown.stdout) == (0, f"sdan {version('sdan')}\n")


def test_show_config_trains_nothing(tmp_path, monkeypatch, capsys):
    arguments = ["train", "nosuch", "--config", "smoke", "--epochs", "7", "--set", "train.seed=3", "--show-config"]
    assert run_here(monkeypatch, *arguments, data=tmp_path / "data") in (0, None)
    shown = dict(line.split("=", 1) for line in capsys.readouterr().out.splitlines())
    expected = configs.flatten(configs.override(configs.smoke(), {"train.epochs": 7, "train.seed": 3}))
    assert shown == {key: str(value) for key, value in expected.items()}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {"scale": 4, "align": "ecc", "tile_px": 48, "stride_px": 40}),
        (["--align", "scale"], {"scale": 4, "align": "scale", "tile_px": 48, "stride_px": 40}),
        (["--tile", "60"], {"scale": 4, "align": "ecc", "tile_px": 60, "stride_px": 40}),
        (["--tile", "48", "--stride", "24"], {"tile_px": 48, "stride_px": 24}),
        (["--missing-jpg", "render"], {"missing_jpg": "render"}),
    ],
)
@pytest.mark.parametrize("verb", ["preprocess", "retrain"])
def test_options_that_are_left_out_are_those_of_shards(verb, given, expected, tmp_path, monkeypatch):
    taken = []

    def work(raw, shards, options=None, **more):
        taken.append(options)
        raise PreprocessError("enough")

    monkeypatch.setattr("preprocessing.shards.preprocess", work)
    monkeypatch.setattr("pipelines.retrain.preprocess", lambda raw, shards, options, **more: work(raw, shards, options))
    shards = tmp_path / "shards"
    arguments = [verb, tmp_path, shards, *given]
    assert run_here(monkeypatch, *arguments, data=tmp_path / "data") == 2
    (shards / "split=train").mkdir(parents=True)
    own = {"scale": 4, "align": "ecc", "tile_px": 48, "stride_px": 40, "missing_jpg": "quarantine", "curve": "srgb"}
    (shards / "_dataset.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION, "options": own}))
    assert run_here(monkeypatch, *arguments, data=tmp_path / "data") == 2
    (shards / "split=train" / "00001_00002-00001_0123456789abcdef.parquet").touch()
    assert run_here(monkeypatch, *arguments, data=tmp_path / "data") == 2
    assert len(taken) == 3 and taken[0] == taken[1]  # options bind once there is a shard
    assert given or taken[0] == PreprocessOptions()
    assert {name: getattr(taken[2], name) for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["simulate", "OUT", "--sequences", "0"], "sequences: expected at least 1, got 0"),
        (["simulate", "OUT", "--scenes", "nosuch"], "nosuch"),
        (["inspect", "EMPTY"], "expected shards or a quarantine, got neither"),
        (["tune", "SHARDS", "--workers", "0"], "--workers: expected at least 1, got 0"),
        (["retrain", "nosuch", "SHARDS", "--workers", "0"], "--workers: expected at least 1, got 0"),
        (["retrain", "nosuch", "SHARDS", "--vgg-weights", "nosuch.pth"], "nosuch.pth"),
        (["evaluate", "SHARDS", "--crops", "0"], "--crops: expected at least 1, got 0"),
        (["evaluate", "SHARDS", "--split", "dev"], "--split: expected"),
        (["compare", "SHARDS", "--table", "3"], "--table: expected 1 or 2, got 3"),
        (["compare", "SHARDS", "--table", "2", "--rows", "srgan"], "--rows, table 2: expected names of"),
        (["compare", "EMPTY", "--table", "2"], "expected"),
    ],
)
def test_own_mistakes_come_before_bars_and_ray(arguments, said, tiny_shards, tmp_path, monkeypatch, capsys):
    """The one line is all that is printed, and no Ray is started."""
    monkeypatch.setattr("pipelines.cluster.start_ray", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"SHARDS": tiny_shards, "EMPTY": tmp_path / "empty", "OUT": tmp_path / "sim"}
    assert run_here(monkeypatch, *(places.get(word, word) for word in arguments), data=tmp_path / "data") == 2
    written = capsys.readouterr()
    assert written.out == "" and written.err.startswith("sdan: ") and written.err.count("\n") == 1, written
    assert said in written.err


def test_inspect_writes_report_html_by_default(tiny_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch, "inspect", tiny_shards, data=tmp_path / "data") in (0, None)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert capsys.readouterr().out.startswith("report.html (")


def test_a_data_folder_that_vanishes_is_named(tmp_path, monkeypatch, capsys):
    def gone(*arguments: object) -> None:
        raise sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("unable to open database file"))

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("pipelines.status.status", gone)
    assert run_here(monkeypatch, "status", data=tmp_path / "data") == 2
    where = tmp_path / "data"
    expected = f"sdan: --data {where}: expected a folder that stays while the command runs, got none; put it back\n"
    assert capsys.readouterr().err == expected


def test_evaluate_writes_its_rows_as_csv(tmp_path, monkeypatch, capsys):
    rows = {"bicubic, camera": {"raw_psnr": 20.5}, "SDAN (self)": {"raw_psnr": 21.25, "true_psnr": 22.0}}
    result = SimpleNamespace(rows=rows, table=lambda protocols: "the table")
    monkeypatch.setattr("pipelines.evaluate.evaluate", lambda *arguments, **options: result)
    file = tmp_path / "new" / "scores.csv"
    arguments = ["evaluate", "SHARDS", "--model", "starter", "--csv", file]
    assert run_here(monkeypatch, *arguments, data=tmp_path / "data") in (0, None)
    assert "the table" in capsys.readouterr().out
    lines = file.read_text().splitlines()
    assert lines == ["row,raw_psnr,true_psnr", '"bicubic, camera",20.5,', "SDAN (self),21.25,22.0"]
    arguments[-1] = tmp_path / "new"
    assert run_here(monkeypatch, *arguments, data=tmp_path / "data") == 2
    assert "expected a readable and writable path" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "sequences"), [([], 10), (["--quick"], 4)])
def test_the_quick_demo_is_smaller(monkeypatch, tmp_path, options, sequences):
    sizes = []
    monkeypatch.setattr("pipelines.demo.run", lambda data, say, size: sizes.append(size))
    monkeypatch.setattr("pipelines.demo.summary", lambda result, data: "done")
    assert run_here(monkeypatch, "demo", *options, data=tmp_path) in (0, None)
    assert [size.sequences for size in sizes] == [sequences]


@pytest.mark.parametrize("port", ["taken", "0", "70000"])
def test_ui_refuses_a_port_before_it_says_an_address(port, tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        wanted = other.getsockname()[1] if port == "taken" else port
        assert run_here(monkeypatch, "ui", "--port", wanted, data=tmp_path / "data") == 2
    written = capsys.readouterr()
    assert written.out == "" and written.err.count("\n") == 1
    said = r"--port \d+: expected a free port on 127\.0\.0\.1, got address already in use; use --port \d+"
    assert re.search(said if port == "taken" else "--port: expected 1 to 65535, got", written.err), written.err


def test_ui_starts_one_quiet_process_on_loopback(tmp_path, monkeypatch):
    started = []
    for name in ("PYTHONWARNINGS", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "MLFLOW_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("pipelines.registry.prepare_database", lambda uri: None)
    monkeypatch.setattr("pipelines.registry.ui_link", lambda uri, server: server)
    monkeypatch.setattr("os.execv", lambda program, command: started.append((command, dict(os.environ))))
    run_here(monkeypatch, "ui", "--port", "5999", data=tmp_path)
    ((command, environment),) = started
    assert " --workers 1 " in " ".join(command) and " --host 127.0.0.1 --port 5999" in " ".join(command)
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false" and environment["PYTHONWARNINGS"] == "ignore"


def test_an_error_of_the_database_is_one_line(tmp_path, monkeypatch, capsys):
    def locked(*arguments: object) -> None:
        raise sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("database is locked"))

    monkeypatch.setattr("pipelines.status.status", locked)
    assert run_here(monkeypatch, "status", data=tmp_path) == 2
    written = capsys.readouterr().err
    assert written.startswith("sdan: MLflow, ") and "database is locked" in written and written.count("\n") == 1
    assert "SELECT" not in written


def test_zoom_falls_back_to_the_starter_model(tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (96, 80, 3), np.uint8)).save(tmp_path / "photo.png")
    arguments = ["zoom", tmp_path / "photo.png", "-o", tmp_path / "zoomed.png"]
    assert run_here(monkeypatch, *arguments, data=tmp_path / "data") in (0, None)
    assert Image.open(tmp_path / "zoomed.png").size == (320, 384)
    assert "starter models, which saw only simulated photographs" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()  # looking for a champion creates nothing


def test_a_champion_zooms_what_it_reads(tmp_path, monkeypatch, capsys):
    """Here it reads RAW, so a PNG gets the starter model for pictures, unless --model says otherwise."""
    from pipelines import registry

    uri = registry.default_tracking_uri(tmp_path / "data")
    registry.prepare_database(uri)
    run_id = registry.create_run(uri, "sdan", "seen")
    registry.set_champion(uri, registry.register_model(uri, run_id, starter_folder()))
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 64), (90, 80, 70)).save(photo)
    said = []
    for more in ([], ["--model", "models:/sdan@champion"]):
        arguments = ["zoom", photo, "-o", tmp_path / f"zoomed{len(more)}.png", *more]
        assert run_here(monkeypatch, *arguments, data=tmp_path / "data") in (0, None)
        said.append(capsys.readouterr().out)
    line = f"{photo}: the champion reads RAW; zoomed with starter-rgb"
    assert line in said[0] and "no champion" not in said[0] and "starter-rgb" in said[1] and line not in said[1]


def test_zoom_sets_a_damaged_photograph_aside(tmp_path, monkeypatch, capsys):
    """Two photographs are written, the third gets one line, and the exit code is 2."""
    photos = [tmp_path / f"{name}.png" for name in ("one", "damaged", "three")]
    for photo in photos:
        Image.new("RGB", (40, 32), (90, 80, 70)).save(photo)
    photos[1].write_bytes(b"not a picture")
    arguments = ["zoom", *photos, "-o", tmp_path / "out", "--model", "starter"]
    assert run_here(monkeypatch, *arguments, data=tmp_path / "data") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sdan: ")]
    assert len(lines) == 2 and lines[0].startswith(
        f"sdan: set aside: {photos[1]}: expected a photograph (RAW, JPG or PNG), got text: not a"
    )
    assert lines[1] == "sdan: expected 3 photographs, got 2; 1 set aside, see above"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one_4x.png", "three_4x.png"]


def verbs() -> dict[str, typer.models.CommandInfo]:
    """Every command that is registered with the Typer app, by name."""
    return {(verb.name or verb.callback.__name__).replace("_", "-"): verb for verb in cli.app.registered_commands}


def test_the_help_lists_every_verb():
    shown = CliRunner().invoke(cli.app, ["--help"])
    assert shown.exit_code == 0
    listed = [line.split()[0] for line in shown.stdout.partition("Commands:")[2].splitlines() if line.strip()]
    assert set(verbs()) <= set(listed)
    assert {"demo", "train", "zoom"} <= set(verbs())


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_and_option_has_a_help_text(verb):
    command = typer.main.get_command(cli.app).commands[verb]
    assert command.help
    without = [parameter.name for parameter in command.params if not getattr(parameter, "help", None)]
    assert without == []
    assert CliRunner().invoke(cli.app, [verb, "--help"]).exit_code == 0


def test_a_dry_run_prints_size_and_time():
    line = estimate_line(Estimate(tiles=40, bytes=58_000_000, seconds=None, cpus=2))
    assert line == "about 40 tiles, 58 MB; the time is unknown before a first run into these SHARDS"
    line = estimate_line(Estimate(tiles=60_000, bytes=87_000_000_000, seconds=7200.0, cpus=16))
    assert line == "about 60000 tiles, 87 GB, 2.0 hours on 16 CPUs at the last run's rate"
