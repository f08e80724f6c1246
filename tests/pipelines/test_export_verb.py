"""`sdan export`: what it refuses, darktable's folder, and the example of docs/export.md."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from pipelines import cli
from pipelines.export import check, darktable, verb
from sdan import STARTER, STARTER_RGB, SDANConfig, starter_folder
from sdan.export import ExportError

ROOT = Path(__file__).parents[2]
RGB = SDANConfig(input="packed_rgb", scale=4)


@pytest.mark.parametrize(
    ("out", "asked", "said"),
    [
        ("a.zip", None, r"-o .*a\.zip: expected a name that ends in \.onnx or \.pt2, got a\.zip"),
        ("a.onnx", "pt2", r"expected a name that ends in \.pt2, got a\.onnx"),
        ("a.onnx", "zip", "--format: expected onnx, darktable or pt2, got zip"),
        ("a.onnx", "darktable", r"expected a folder for darktable, got a \.onnx file"),
        ("old.onnx", None, "expected a new name, got an existing one; choose another or add --overwrite"),
    ],
)
def test_a_wrong_request_is_refused_before_the_model(out, asked, said, tmp_path):
    (tmp_path / "old.onnx").touch()
    with pytest.raises(ExportError, match=said):
        verb.check_request(tmp_path / out, asked, overwrite=False)


def test_a_file_does_not_replace_a_folder(tmp_path):
    (tmp_path / "a.onnx").mkdir()
    with pytest.raises(ExportError, match="expected a file, got a folder"):
        verb.check_request(tmp_path / "a.onnx", None, overwrite=True)
    (tmp_path / "b").touch()
    with pytest.raises(ExportError, match="expected a folder, got a file"):
        verb.check_request(tmp_path / "b", "darktable", overwrite=True)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("upscale-sdan", SDANConfig(input="packed"), "expected an RGB model for darktable.*got one that reads RAW"),
        ("upscale-sdan", SDANConfig(input="packed_rgb", scale=8), "expected a scale of 2 or 4 for darktable, got 8"),
        ("My Model", RGB, "expected a folder named like a darktable model"),
    ],
)
def test_darktable_gets_only_what_it_can_use(name, config, said, tmp_path):
    with pytest.raises(ExportError, match=said):
        darktable.check(tmp_path / name, config)


def test_a_raw_model_for_darktable_gets_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SDAN_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(
        sys, "argv", ["sdan", "export", "-o", str(tmp_path / "a"), "--format", "darktable", "--model", STARTER]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and "expected an RGB model for darktable" in said
    assert not (tmp_path / "a").exists()


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "trace", lambda module: None)
    monkeypatch.setattr(verb, "write_onnx", lambda program, path, *others: path.touch())
    monkeypatch.setattr(check, "largest_difference", lambda module, path: float("nan"))
    with pytest.raises(ExportError, match=r"expected a file that equals the model to 0\.001, got nan"):
        verb.export(starter_folder(STARTER_RGB), tmp_path / "a.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_darktables_folder_and_the_example_of_the_page(tmp_path, monkeypatch):
    done = verb.export(starter_folder(STARTER_RGB), tmp_path / "upscale-sdan", "darktable")
    assert done.difference < 1e-4 and done.metadata["licence"] == "Apache-2.0"
    described = json.loads((tmp_path / "upscale-sdan" / "config.json").read_text())
    assert described["id"] == "upscale-sdan" and described["task"] == "upscale" and described["backend"] == "onnx"
    session = onnxruntime.InferenceSession(done.path, providers=["CPUExecutionProvider"])
    assert done.path.name == "model_x4.onnx" and session.get_inputs()[0].shape == [1, 3, "height", "width"]

    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/export.md").read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    done.path.rename("sdan.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (80, 101, 3), np.uint8)
    Image.fromarray(pixels).save("photo.png")
    exec(compile(code, "docs/export.md", "exec"), {})
    assert Image.open("zoomed.png").size == (404, 320)
