"""The base installation zooms; a verb that needs an extra says so in one line."""

import subprocess
import sys

import pytest
from PIL import Image

from pipelines.cli import EXPORT_PACKAGES, TRAIN_PACKAGES

# Python finds no package of the extra, as if it were not installed.
WITHOUT_EXTRA = f"""
import sys
from importlib.machinery import PathFinder

class WithoutExtra(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.partition(".")[0] in {(*TRAIN_PACKAGES, *EXPORT_PACKAGES, "pandas")!r}
        return None if missing else super().find_spec(name, path, target)

sys.meta_path[:] = [WithoutExtra if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run(code, *arguments, folder, extra=False):
    return subprocess.run(
        [sys.executable, "-c", ("" if extra else WITHOUT_EXTRA) + code, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_python_api_needs_no_extra(tmp_path):
    done = run("import sdan\nprint(sdan.load('starter').config.scale)", folder=tmp_path)
    assert done.stdout.strip() == "4", done.stderr


def test_zoom_needs_no_extra(tmp_path):
    Image.new("RGB", (64, 48), (90, 80, 70)).save(tmp_path / "photo.png")
    done = run("from pipelines import cli\ncli.main()", "zoom", "photo.png", "-o", "out.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out.png").size == (256, 192)


def test_a_folder_needs_no_extra(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    Image.new("RGB", (32, 24), (90, 80, 70)).save(tmp_path / "in" / "deep" / "photo.png")
    for expected in ("1 zoomed", "1 were there"):
        done = run("from pipelines import cli\ncli.main()", "zoom", "in", "-o", "out", folder=tmp_path)
        assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr
    assert Image.open(tmp_path / "out" / "deep" / "photo_4x.png").size == (128, 96)
    done = run("from pipelines import cli\ncli.main()", "zoom", "s3://a/b", "-o", "out", folder=tmp_path)
    assert done.returncode == 2 and "pip install 'sdan[train]'" in done.stderr


UNUSED = ("torch._dynamo", "torch._inductor", "sympy", "torchvision", "mlflow", "ray", "pandas", "scipy")
"""Slow and large imports that a zoom has no use for."""


def test_zoom_imports_no_compiler(tmp_path):
    Image.new("RGB", (64, 48), (90, 80, 70)).save(tmp_path / "photo.png")
    listing = (
        f"import atexit, sys\natexit.register(lambda: print([name for name in {UNUSED} if name in sys.modules]))\n"
    )
    code = listing + "from pipelines import cli\ncli.main()"
    done = run(code, "zoom", "photo.png", "-o", "out.png", folder=tmp_path, extra=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    "verb", [["train", "shards"], ["preprocess", "raw", "shards"], ["tune", "shards"], ["demo"], ["serve"]]
)
def test_other_verbs_name_the_extra(verb, tmp_path):
    done = run("from pipelines import cli\ncli.main()", *verb, folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("sdan: "), done.stderr
    assert "pip install 'sdan[train]'" in done.stderr


def test_export_names_its_extra(tmp_path):
    arguments = ("export", "-o", "a.onnx", "--model", "starter-rgb")
    done = run("from pipelines import cli\ncli.main()", *arguments, folder=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "pip install 'sdan[export]'" in done.stderr
