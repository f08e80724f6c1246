"""How many workers zoom at once, and a folder zoomed with Ray Data."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import ray
from fake_decoder import fake_decoder_path, mark_file
from PIL import Image

from pipelines.zoom_folder import batch, pool
from pipelines.zoom_folder.pool import BYTES, Pool, plan_pool
from pipelines.zooming.models import Chosen
from pipelines.zooming.request import Output
from preprocessing.raw.dng import write_dng
from sdan import STARTER, STARTER_RGB, starter_folder


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([{"CPU": 2, "memory": 10 * BYTES}], Pool(1, 2, 0)),
        ([{"CPU": 16, "memory": 10 * BYTES}, {"CPU": 9, "memory": 10 * BYTES}], Pool(6, 4, 0)),
        ([{"CPU": 16, "memory": 2.5 * BYTES}], Pool(2, 4, 0)),
        ([{"CPU": 2, "memory": 100}], Pool(1, 2, 0)),
        ([{"CPU": 16, "GPU": 2, "memory": 10 * BYTES}, {"CPU": 64, "memory": 99 * BYTES}], Pool(4, 1, 0.5)),
        ([{"CPU": 1, "GPU": 1, "memory": BYTES}], Pool(2, 0.5, 0.5)),
    ],
)
def test_workers_fit_the_machines(nodes, expected):
    assert plan_pool(nodes) == expected


def test_ray_is_used_where_it_pays(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(batch.torch.cuda, "is_available", lambda: False)
    for cpus, photographs, expected in ((2, 99, False), (16, 99, True), (16, 3, False)):
        monkeypatch.setattr(os, "cpu_count", lambda cpus=cpus: cpus)
        assert batch.ray_pays(photographs, batch.SMALL) == expected
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert batch.ray_pays(1, batch.SMALL)
    monkeypatch.setattr(batch.importlib.util, "find_spec", lambda name: None)
    assert not batch.ray_pays(1, batch.SMALL)


@pytest.mark.slow
def test_a_folder_is_zoomed_with_ray(tmp_path, monkeypatch):
    """Also a model that only the driver's machine has; a crash and a damaged file are set aside."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([fake_decoder_path(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(batch, "ray_pays", lambda *_: True)
    monkeypatch.setattr(pool, "_CHUNK", 3)
    photos, out, warned = tmp_path / "in", tmp_path / "out", []
    raw = tmp_path / "raw.dng"
    write_dng(raw, np.full((48, 64), 4000, np.uint16), wb=(1.0, 1.0, 1.0))
    for name in ("a", "crash", "deep/b"):
        path = photos / f"{name}.dng"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(raw, path)
    mark_file(photos / "crash.dng", "SIGSEGV")
    Image.new("RGB", (48, 32), (90, 80, 70)).save(photos / "c.jpg")
    (photos / "cut.dng").write_bytes(raw.read_bytes()[:400])
    chosen = Chosen(starter_folder(STARTER), starter_folder(STARTER_RGB), picture_note="for pictures")
    report = batch.zoom_batch(
        chosen, [str(photos)], str(out), strength=1.0, output=Output(), say=print, warn=warned.append
    )
    assert ray.is_initialized()
    assert report.written == 3 and report.notes["for pictures"] == 1
    assert sorted(Path(label).name for label, _ in report.set_aside) == ["crash.dng", "cut.dng"]
    assert any("crash of the decoder (SIGSEGV)" in line for line in warned)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.png")) == [
        "a_4x.png",
        "c_4x.png",
        "deep/b_4x.png",
    ]
