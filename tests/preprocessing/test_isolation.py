"""What happens to a pair when its child process dies. A fake decoder crashes, hangs or prints if a file is marked."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pytest
from fake_decoder import fake_decoder_path, mark_file
from known_scene import write_sequence

from preprocessing.isolation import IsolatedProcess
from preprocessing.plan import PreprocessOptions, make_plan
from preprocessing.schema import list_shards
from preprocessing.storage import open_folder

OPTIONS = PreprocessOptions(tile_px=24, stride_px=16)


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """(job, source, target) of the first pair of a sequence."""
    write_sequence(tmp_path / "raw" / "00001", seed=1)
    monkeypatch.setenv("PYTHONPATH", fake_decoder_path(tmp_path))
    source, target = open_folder(str(tmp_path / "raw")), open_folder(str(tmp_path / "shards"))
    return make_plan(source, OPTIONS, {}).jobs[0], source, target


@pytest.fixture
def worker():
    worker = IsolatedProcess()
    yield worker
    worker.close()


def mark(pair, order):
    """Mark the pair's RAW so that the fake decoder misbehaves."""
    job, source, target = pair
    mark_file(Path(source.path(job.lr_raw)), order)
    return job, source, target


def test_one_child_serves_many_pairs_until_closed(pair, worker):
    first = worker.run(*pair, OPTIONS)
    pid = worker.pid
    second = worker.run(*pair, OPTIONS)
    assert first.status == second.status == "written" and first.rows == second.rows and worker.pid == pid
    assert len(list_shards(pair[2].root)) == 1
    worker.close()
    assert worker.pid is None and not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("order", ["SIGSEGV", "SIGABRT"])
def test_a_crash_quarantines_the_pair(pair, worker, order):
    result = worker.run(*mark(pair, order), OPTIONS)
    assert result.status == "quarantined" and "\n" not in result.reason
    assert result.reason.startswith(f"{pair[0].lr_raw}: ") and order in result.reason


def test_a_kill_does_not_quarantine_the_pair(pair, worker):
    result = worker.run(*mark(pair, "SIGKILL"), OPTIONS)
    assert result.status == "died" and "SIGKILL" in result.reason


def test_a_child_killed_while_idle_is_replaced(pair, worker):
    worker.run(*pair, OPTIONS)
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert worker.run(*pair, OPTIONS).status == "written"


@pytest.mark.timeout(120)  # the fake decoder hangs for 1000 s
def test_a_hanging_decoder_is_killed(pair):
    result = IsolatedProcess(limit_s=3).run(*mark(pair, "hang"), OPTIONS)
    assert result.status == "died" and "took longer than 3 s" in result.reason


def test_decoder_output_does_not_disturb_replies(pair, worker):
    assert worker.run(*mark(pair, "print"), OPTIONS).status == "written"


@pytest.mark.timeout(120)
def test_a_child_does_not_outlive_its_parent(pair):
    owner = os.fork()
    if owner == 0:
        worker = IsolatedProcess()
        worker.run(*pair, OPTIONS)
        Path(pair[2].root, "pid").write_text(str(worker.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(owner, 0)
    child = Path("/proc") / Path(pair[2].root, "pid").read_text()
    while child.exists() and "State:\tZ" not in (child / "status").read_text():
        time.sleep(0.05)


def test_exclusions_are_not_sent_to_the_child(pair, worker, monkeypatch):
    requests = []
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda value: requests.append(dumps(value)) or requests[-1])
    options = dataclasses.replace(OPTIONS, exclude=("left-out",), val=("held-out",))
    assert worker.run(*pair, options).status == "written"
    (request,) = requests
    assert "left-out" not in request and "held-out" not in request and '"tile_px": 24' in request
