"""`sdan zoom` of folders and buckets: what is written, skipped, set aside and said, also when a decoder crashes."""

import csv
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import numpy as np
import pytest
from fake_decoder import fake_decoder_path, mark_file
from PIL import Image

from pipelines import cli
from pipelines.zoom_folder import batch
from pipelines.zoom_folder.batch import BatchReport, zoom_batch
from pipelines.zoom_folder.places import open_place
from pipelines.zoom_folder.worker import ZoomWorker, load_zoomers, temporary_folder, zoom_job
from pipelines.zooming.models import Chosen
from pipelines.zooming.request import Output, ZoomError
from preprocessing.raw.dng import write_dng


@pytest.fixture(scope="module")
def model(untrained):
    return untrained


class InProcess:
    """A ZoomWorker without a child, whose start would take most of a test's time."""

    def __init__(self, settings):
        self.settings, self.target = settings, open_place(settings.target)
        self.zoomers = load_zoomers(settings)

    def run(self, job, progress):
        with temporary_folder() as folder:
            return zoom_job(job, self.zoomers, self.target, self.settings, folder, progress)

    def close(self, job):
        pass


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    monkeypatch.setattr(batch, "ray_pays", lambda *_: False)
    monkeypatch.setattr(batch, "ZoomWorker", InProcess)


@pytest.fixture
def with_children(monkeypatch, tmp_path):
    """Real children, whose decoder crashes or hangs on marked files."""
    monkeypatch.setattr(batch, "ZoomWorker", ZoomWorker)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([fake_decoder_path(tmp_path), os.environ.get("PYTHONPATH", "")]))


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".dng":
        write_dng(path, np.full((48, 64), 4000, np.uint16), wb=(1.0, 1.0, 1.0))
    else:
        Image.new("RGB", (64, 48), (90, 80, 70)).save(path)
    return path


def zoom(model, inputs, out, **output) -> tuple[BatchReport, list[str], list[str]]:
    """(report, said, warned)."""
    said, warned = [], []
    report = zoom_batch(
        model if isinstance(model, Chosen) else Chosen(model, model),
        [str(one) for one in ([inputs] if isinstance(inputs, Path) else inputs)],
        str(out),
        strength=1.0,
        output=Output(**output),
        say=said.append,
        warn=warned.append,
    )
    return report, said, warned


def pictures(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*") if path.suffix in (".png", ".jpg"))


def reasons(out: Path) -> dict[str, str]:
    with (out / "set_aside.csv").open(newline="") as file:
        return {Path(row["photograph"]).name: row["reason"] for row in csv.DictReader(file)}


def test_bad_photographs_are_set_aside_and_reported(model, tmp_path, with_children):
    photos, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.jpg", "deep/crash.dng", "deep/er/good.dng"):
        write(photos / name)
    mark_file(photos / "deep" / "crash.dng", "SIGSEGV")
    (photos / "cut.png").write_bytes((write(photos / "whole.png")).read_bytes()[:60])
    report, _, warned = zoom(model, photos, out)
    assert (report.written, report.there, len(report.set_aside)) == (3, 0, 2)
    assert pictures(out) == ["a_4x.png", "deep/er/good_4x.png", "whole_4x.png"]
    assert Image.open(out / "deep" / "er" / "good_4x.png").size == (256, 192)
    found = reasons(out)
    assert "cut.png: expected" in found["cut.png"] and "crash of the decoder (SIGSEGV)" in found["crash.dng"]
    assert all(line.startswith(f"set aside: {photos}") and "\n" not in line for line in warned)
    assert (
        f"3 zoomed in {report.seconds:.0f} s, 0 were there, 2 set aside (see {out}/set_aside.csv)" in report.summary()
    )
    assert any("converted to a synthetic mosaic" in note and count == 2 for note, count in report.notes.items())


def test_a_second_run_does_the_rest(model, tmp_path):
    photos, out = tmp_path / "in", tmp_path / "out"
    write(photos / "a.jpg")
    (photos / "b.png").write_bytes(write(tmp_path / "b.png").read_bytes()[:60])
    report, _, warned = zoom(model, photos, out)
    assert (report.written, len(report.set_aside)) == (1, 1) and list(reasons(out)) == ["b.png"]
    before = (out / "a_4x.png").stat().st_mtime_ns
    write(photos / "b.png")
    report, _, warned = zoom(model, photos, out)
    assert (report.written, report.there, warned) == (1, 1, []) and not (out / "set_aside.csv").exists()
    assert (out / "a_4x.png").stat().st_mtime_ns == before
    Image.new("RGB", (40, 40)).save(photos / "a.jpg")  # another photograph of that name
    assert zoom(model, photos, out)[0].written == 1
    assert Image.open(out / "a_4x.png").size == (160, 160)
    assert len([path for path in (out / ".zoomed").iterdir() if path.name != "options.json"]) == 2


@pytest.mark.slow
def test_a_hanging_decoder_costs_one_photograph(model, tmp_path, with_children, monkeypatch):
    mark_file(write(tmp_path / "in" / "a.dng"), "hang")
    write(tmp_path / "in" / "b.dng")
    monkeypatch.setattr(batch, "ZoomWorker", lambda settings: ZoomWorker(settings, limit_s=8))
    report, _, warned = zoom(model, tmp_path / "in", tmp_path / "out")
    assert report.written == 1 and "expected progress, got none for 8 s" in warned[0]


def test_two_runs_at_once_are_harmless(model, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        write(tmp_path / "in" / name)
    reports = []
    runs = [
        threading.Thread(target=lambda: reports.append(zoom(model, tmp_path / "in", tmp_path / "out")[0]))
        for _ in range(2)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [report.written + report.there for report in reports] == [2, 2]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".zoomed", "a_4x.png", "b_4x.png"]
    assert zoom(model, tmp_path / "in", tmp_path / "out")[0].there == 2


def test_the_commands_exit_code_and_lines(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"plain words\n" * 40)
    command = ["sdan", "zoom", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--model", str(model)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "expected photographs that can be zoomed, got 1 set aside" in last
    write(tmp_path / "in" / "b.jpg")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "1 zoomed in " in capsys.readouterr().out.splitlines()[-1]


def test_a_full_disk_ends_the_run(model, tmp_path):
    write(tmp_path / "in" / "a.jpg")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".zoomed").write_text("")  # a file, so that no record can be written
    with pytest.raises(ZoomError, match=r"expected a place that can be written, got .*; fix this and run again"):
        zoom(model, tmp_path / "in", tmp_path / "out")


@pytest.mark.slow
def test_a_model_that_does_not_load_ends_the_run(model, tmp_path, with_children, monkeypatch):
    """E.g. on another machine, whose GPU is full."""
    write(tmp_path / "in" / "a.jpg")
    broken = Chosen(model, shutil.copytree(model, tmp_path / "broken"))
    start = ZoomWorker.run

    def break_first(worker, job, progress):
        (broken.for_pictures / "config.json").write_text("{}")
        return start(worker, job, progress)

    monkeypatch.setattr(ZoomWorker, "run", break_first)
    with pytest.raises(ZoomError, match=r"broken/config.json: expected"):
        zoom(broken, tmp_path / "in", tmp_path / "out")


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A client of a local S3 server (moto); AWS's environment variables name it."""
    server = shutil.which("moto_server", path=str(Path(sys.executable).parent))
    assert server, "moto[server] is a development dependency: make setup"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    moto = subprocess.Popen([server, "-H", "127.0.0.1", "-p", str(port)], **quiet)
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }.items():
        patch.setenv(name, value)
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield boto3.client("s3")
    finally:
        patch.undo()
        moto.kill()
        moto.wait()


def test_a_bucket_is_zoomed_into_a_bucket(model, s3, tmp_path):
    s3.create_bucket(Bucket="photos")
    for name in ("a.jpg", "deep/b.dng"):
        s3.upload_file(str(write(tmp_path / name)), "photos", f"in/{name}")
    s3.put_object(Bucket="photos", Key="in/bad.jpg", Body=b"plain words\n" * 40)
    report, _, warned = zoom(model, ["s3://photos/in"], "s3://photos/out")
    assert (report.written, len(report.set_aside)) == (2, 1)
    assert warned == [
        "set aside: s3://photos/in/bad.jpg: expected a photograph (RAW, JPG or PNG), got text: not a photograph"
    ]
    listed = {one["Key"]: one["Size"] for one in s3.list_objects_v2(Bucket="photos", Prefix="out/")["Contents"]}
    shown = {key for key in listed if "/." not in key}
    assert shown == {"out/a_4x.png", "out/deep/b_4x.png", "out/set_aside.csv"}
    s3.download_file("photos", "out/deep/b_4x.png", str(tmp_path / "b.png"))
    zoom(model, tmp_path / "deep", tmp_path / "local")
    pixels = [np.asarray(Image.open(path)) for path in (tmp_path / "b.png", tmp_path / "local" / "b_4x.png")]
    assert np.array_equal(*pixels)
    s3.delete_object(Bucket="photos", Key="in/bad.jpg")
    report, _, _ = zoom(model, ["s3://photos/in"], "s3://photos/out")
    assert (report.written, report.there, report.set_aside) == (0, 2, [])
    with pytest.raises(ZoomError, match="expected the quality of the run"):
        zoom(model, ["s3://photos/in"], "s3://photos/out", quality=50)


def test_a_missing_bucket_is_one_line(model, s3, tmp_path):
    with pytest.raises(ZoomError, match=r"s3://nosuch/in: expected .*") as caught:
        zoom(model, ["s3://nosuch/in"], tmp_path / "out")
    assert "\n" not in str(caught.value)
    write(tmp_path / "in" / "a.jpg")
    with pytest.raises(ZoomError, match="-o s3://nosuch/out: expected a place that can be written") as caught:
        zoom(model, tmp_path / "in", "s3://nosuch/out")
    assert "\n" not in str(caught.value)
