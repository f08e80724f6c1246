"""Ray's own client of jobs against a server that speaks its HTTP: token, log, exit code, Ctrl-C. No Ray runs."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from job_server import JobServer

from pipelines.jobs import submit as jobs
from pipelines.jobs.submit import JobError, submit

ROOT = Path(__file__).parents[3]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(jobs, "LOOK_S", 0.05)
    made = JobServer()
    yield made
    made.close()


def test_rays_client_submits_and_follows(server):
    job = submit(server.address, "sdan status", working_dir=None, env_vars={"A": "b"})
    written = []

    def write(text):
        written.append(text)
        if text == "two\n":
            server.end("FAILED", 7)

    server.log += ["one\n"]
    threading.Timer(0.3, lambda: server.log.append("two\n")).start()
    assert job.follow(write) == 7 and written == ["one\n", "two\n"]
    (request,) = server.submitted
    assert request["entrypoint"] == "sdan status" and request["runtime_env"]["env_vars"] == {"A": "b"}


def test_a_server_that_wants_a_token_gets_one_line(monkeypatch):
    server = JobServer(token="0123456789abcdef")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(
        JobError, match=r"expected a valid token, got none or another; export RAY_AUTH_MODE=token"
    ) as caught:
        submit(server.address, "sdan status", working_dir=None, env_vars={})
    server.close()
    assert "0123456789abcdef" not in str(caught.value)


def test_ctrl_c_detaches_with_one_line(server, tmp_path):
    server.log += ["started\n"]
    command = [sys.executable, "-m", "pipelines.cli", "preprocess", "s3://b/raw", "s3://b/shards"]
    process = subprocess.Popen(
        [*command, "--cluster", server.address],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(error.splitlines()) == 2, error
    announced, detached = error.splitlines()
    assert announced == f"job raysubmit_1 at {server.address}; Ctrl-C stops following it, not the job"
    assert "job raysubmit_1 goes on; follow it with `ray job logs" in detached and "ray job stop" in detached
    (request,) = server.submitted
    assert request["entrypoint"].endswith(" sdan preprocess s3://b/raw s3://b/shards")
