"""Jobs on a real cluster with token authentication: a wrong token, the log, the exit code."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray._common.utils import reset_ray_address

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """(address of the job server, environment of a shell that has the token)"""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text(secrets.token_hex(32))
    # The agent, which takes the jobs, has a fixed port by default, and another Ray of this machine may hold it.
    with contextlib.ExitStack() as held:
        three = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        port, dashboard, agent = (one.getsockname()[1] for one in three)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    options = f"--head --block --num-cpus=1 --node-ip-address=127.0.0.1 --port={port} --dashboard-port={dashboard}"
    options += f" --dashboard-agent-listen-port={agent}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options.split()]
    log = (home / "log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while not _listens(dashboard):
            assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.5)
        yield address, environment
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        reset_ray_address()  # only `ray stop` removes it, and ray.init() of another test would wait for an answer there


def _listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def sdan(environment, *words, **options):
    """The finished command."""
    command = [sys.executable, "-m", "pipelines.cli", *words]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, **options)


def test_a_shell_without_the_token_is_told_where_it_belongs(head, tmp_path):
    address, environment = head
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text(secrets.token_hex(32))
    done = sdan(environment | {"HOME": str(tmp_path)}, "preprocess", "s3://b/r", "s3://b/s", "--cluster", address)
    assert done.returncode == 2 and "put the cluster's token in ~/.ray/auth_token" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_job_passes_on_its_log_and_its_exit_code(head, tmp_path):
    address, environment = head
    given = ["--data", str(tmp_path), "preprocess", str(tmp_path / "none"), str(tmp_path / "shards")]
    done = sdan(environment, *given, "--cluster", address)
    assert done.returncode == 2, done.stderr
    assert "none: expected" in done.stdout and "Traceback" not in done.stdout + done.stderr
