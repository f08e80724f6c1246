"""Ctrl-C, SIGTERM and a lost Ray end a command with one line that says what is kept, and no traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from ray.cluster_utils import Cluster

from pipelines import cli, registry
from preprocessing.simulator.sequences import simulate

SDAN = str(Path(sys.executable).with_name("sdan"))
LISTENING = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
"""Starts a program that hears Ctrl-C: a suite started in a shell's background ignores it, and children inherit that."""
LIMIT_S = 300
"""Far more than a command takes to get to work, or to end; a hang fails the test."""


class Command:
    """`sdan ARGUMENTS` in a process group of its own, as from a terminal; its output goes to a file."""

    def __init__(self, folder, *arguments):
        self.log = folder / "output.txt"
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LISTENING, SDAN, *map(str, arguments)],
                stdout=file,
                stderr=file,
                start_new_session=True,
                cwd=folder,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def output(self):
        return self.log.read_text(errors="replace")

    def wait_for(self, text):
        deadline = time.monotonic() + LIMIT_S
        while text not in self.output:
            assert self.process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def last_line(self, code):
        """Wait for the end; check that it gave `code`, one line of its own and no traceback; returns the line."""
        assert self.process.wait(LIMIT_S) == code, self.output
        assert "Traceback" not in self.output and "***" not in self.output, self.output
        lines = [line for line in self.output.splitlines() if line.startswith("sdan: ")]
        assert len(lines) == 1 and self.output.rstrip().endswith(lines[0]), self.output
        return lines[0]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    simulate(folder, sequences=2, width_px=768)
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_zoom_leaves_only_complete_files(number, code, tmp_path):
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (1600, 1600, 3), np.uint8)).save(tmp_path / "photo.png")
    with Command(tmp_path, "zoom", "photo.png", "-o", "out/zoomed.png", "--model", "starter") as zoom:
        zoom.wait_for("tile/s")
        os.killpg(zoom.process.pid, number)
        name = {130: "Ctrl-C", 143: "SIGTERM"}[code]
        expected = f"sdan: interrupted by {name}; the files named above are complete, nothing else was left"
        assert zoom.last_line(code) == expected
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
def test_an_interrupted_folder_goes_on(alone, tmp_path):
    """From a terminal the signal reaches the worker, too; `alone`, only the command gets it."""
    random = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        picture = random.integers(0, 255, (100 if name == "a" else 1600, 1600, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / "in" / f"{name}.png")
    arguments = ["zoom", "in", "-o", "out", "--model", "starter"]
    with Command(tmp_path, *arguments) as zoom:
        zoom.wait_for(" 1.")  # in the second photograph
        children = psutil.Process(zoom.process.pid).children()
        os.kill(zoom.process.pid, signal.SIGINT) if alone else os.killpg(zoom.process.pid, signal.SIGINT)
        expected = "sdan: interrupted by Ctrl-C; finished photographs are kept; run the same command to go on"
        assert zoom.last_line(130) == expected
    assert children and not any(child.is_running() for child in children)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".zoomed", "a_4x.png"]
    Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "in" / "b.png")
    done = subprocess.run([SDAN, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " s, 1 were there, 0 set aside" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_preprocess_goes_on(number, code, raw, tmp_path):
    arguments = ["preprocess", raw, "shards", "--tile", "48", "--align", "ecc"]
    with Command(tmp_path, *arguments) as preprocess:
        preprocess.wait_for("pair/s")
        os.killpg(preprocess.process.pid, number)
        line = preprocess.last_line(code)
    assert line.endswith("; finished pairs are kept; run the same command to go on")
    done = subprocess.run([SDAN, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "shards").rglob("*.parquet"))) == 6


@pytest.mark.slow
def test_an_interrupted_train_says_how_to_resume(tiny_shards, tmp_path):
    train = ["--data", "data", "train", tiny_shards, "--config", "smoke", "--name", "run"]
    with Command(tmp_path, *train, "--epochs", "500") as first:
        first.wait_for("starting the workers")
        os.kill(first.process.pid, signal.SIGTERM)
        line = first.last_line(143)
        assert line.endswith("; run run has no checkpoint yet; add --resume --name run to go on")
    with Command(tmp_path, *train, "--epochs", "500", "--resume") as second:
        second.wait_for("PSNR")  # its first validation
        os.killpg(second.process.pid, signal.SIGINT)
        assert "sdan: interrupted by Ctrl-C; run run has its checkpoint of epoch " in second.last_line(130)
    client = MlflowClient(registry.default_tracking_uri(tmp_path / "data"))
    (run,) = client.search_runs([client.get_experiment_by_name("sdan").experiment_id])
    assert run.info.status == "KILLED"


@pytest.mark.slow
def test_an_interrupted_tune_says_how_to_resume(tiny_shards, tmp_path):
    tune = ["--data", "data", "tune", tiny_shards, "--config", "smoke", "--trials", "2", "--set", "train.epochs=500"]
    with Command(tmp_path, *tune) as sweep:
        sweep.wait_for("started with")
        client = MlflowClient(registry.default_tracking_uri(tmp_path / "data"))
        experiment = client.get_experiment_by_name("sdan-sweeps").experiment_id
        deadline = time.monotonic() + LIMIT_S
        while len(client.search_runs([experiment])) < 2:
            assert sweep.process.poll() is None and time.monotonic() < deadline, sweep.output
            time.sleep(0.2)
        os.killpg(sweep.process.pid, signal.SIGINT)
        line = sweep.last_line(130)
    kept = "sweep sweep keeps its finished trials and the checkpoints of the others; add --resume to go on"
    assert line == f"sdan: interrupted by Ctrl-C; {kept}"
    runs = client.search_runs([experiment])
    assert [run.info.status for run in runs] == ["KILLED", "KILLED"]  # the sweep and its trial


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_lost_ray_is_one_line(name, raw, tmp_path):
    with Command(tmp_path, "preprocess", raw, "shards", "--tile", "48", "--align", "ecc") as preprocess:
        preprocess.wait_for("pair/s")
        for child in psutil.Process(preprocess.process.pid).children():
            if child.name().startswith(name):
                child.kill()
        line = preprocess.last_line(2)
    assert line.startswith("sdan: Ray, this machine: expected it to run until the command ends, got the end of its ")
    assert f"process {name}, " in line and line.endswith("; finished pairs are kept; run the same command to go on")


@pytest.mark.slow
def test_a_lost_cluster_is_one_line(raw, tmp_path, monkeypatch):
    """Ray itself would wait a minute for the head's GCS, and then end the command from C++."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    address = nodes.address  # None after its end
    try:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with Command(tmp_path, "preprocess", raw, "shards", "--tile", "48", "--align", "ecc") as preprocess:
            preprocess.wait_for("pair/s")
            nodes.head_node.all_processes["gcs_server"][0].process.kill()
            line = preprocess.last_line(2)
    finally:
        nodes.shutdown()
    assert line.startswith(f"sdan: Ray, {address}: expected it to run until the command ends, got no answer from")
    assert line.endswith(" s; finished pairs are kept; run the same command to go on")


def interrupted_here(monkeypatch, act, data):
    """`sdan status` in this process, doing `act` in place of its work; returns the exit code."""
    monkeypatch.setattr("pipelines.status.status", act)
    monkeypatch.setattr(cli, "_leave", sys.exit)
    monkeypatch.setattr(sys, "argv", ["sdan", "--data", str(data), "status"])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as ended:
        cli.main()
    for number, handler in before.items():
        signal.signal(number, handler)
    return ended.value.code


@pytest.mark.parametrize("swallow", [False, True])
def test_an_error_after_the_signal_is_not_shown(swallow, tmp_path, monkeypatch, capsys):
    """What a verb raises on its way out, such as MLflow's own error, is the interrupt's consequence."""

    def work(data):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except KeyboardInterrupt:
            if swallow:
                raise ValueError("a consequence") from None
            raise

    monkeypatch.setattr(cli, "GRACE_S", 1e6)  # else it would end the tests
    assert interrupted_here(monkeypatch, work, tmp_path) == 143
    assert capsys.readouterr().err == "sdan: interrupted by SIGTERM; run the command again\n"


def test_a_lost_cluster_ends_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "GRACE_S", 1e6)  # else it would end the tests
    monkeypatch.setattr("pipelines.cluster.lost", lambda: "Ray, head:6379: expected an answer, got none")
    assert interrupted_here(monkeypatch, lambda data: time.sleep(60), tmp_path) == 2
    assert capsys.readouterr().err == "sdan: Ray, head:6379: expected an answer, got none; run the command again\n"


def run_code(code, folder):
    """The finished interpreter that has run `sdan status` in `folder`, changed by `code`."""
    code += "sys.argv = ['sdan', '--data', 'data', 'status']\ncli.main()\n"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=LIMIT_S)


def test_a_command_that_does_not_stop_is_ended(tmp_path):
    code = (
        "import os, signal, sys, threading, time\n"
        "import pipelines.status\n"
        "from pipelines import cli\n"
        "def work(data):\n"
        "    while True:\n"
        "        try:\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "            time.sleep(600)\n"
        "        except KeyboardInterrupt:\n"
        "            signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "pipelines.status.status = work\n"
        "cli.GRACE_S = 0.5\n"
    )
    done = run_code(code, tmp_path)
    assert (done.returncode, done.stderr) == (130, "\nsdan: interrupted by Ctrl-C; run the command again\n")


def test_an_exit_that_hangs_in_c_is_not_waited_for(tmp_path):
    """As libraries in C++ may hang when the interpreter is torn down; exit functions of Python run all the same."""
    code = (
        "import atexit, ctypes, os, signal, sys\n"
        "import pipelines.status\n"
        "from pipelines import cli\n"
        "libc = ctypes.CDLL(None)\n"
        "libc['__cxa_atexit'](ctypes.cast(libc.pause, ctypes.c_void_p), None, None)\n"
        "atexit.register(print, 'exit functions ran')\n"
        "pipelines.status.status = lambda data: os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = run_code(code, tmp_path)
    assert (done.returncode, done.stderr) == (130, "sdan: interrupted by Ctrl-C; run the command again\n")
    assert done.stdout == "exit functions ran\n"


def test_the_handlers_are_put_back(tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr("pipelines.status.status", lambda data: "fine")
    monkeypatch.setattr(sys, "argv", ["sdan", "--data", str(tmp_path), "status"])
    with pytest.raises(SystemExit):
        cli.main()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
