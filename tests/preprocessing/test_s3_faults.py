"""Faults of S3. A proxy before a local S3 server (moto) answers 500, closes connections or does not answer."""

import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
import ray
from known_scene import write_sequence

from pipelines import cluster
from preprocessing.shards import PreprocessError, PreprocessOptions, preprocess
from preprocessing.storage import open_folder

pytestmark = pytest.mark.slow
OPTIONS = PreprocessOptions(tile_px=24, stride_px=16, val=("00002",))
SEQUENCES = 6


class Proxy(ThreadingHTTPServer):
    """Forwards requests to moto unless `fault(method, path)` returns "500", "cut" (closes the connection) or "hang"."""

    daemon_threads = True

    def __init__(self, moto_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.moto_port = moto_port
        self.fault = lambda method, path: None
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _forward(self) -> None:
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault(self.command, self.path)
        if fault == "hang":
            time.sleep(600)
        if fault:
            self.close_connection = True
        if fault == "500":
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
        if fault:
            return
        moto = http.client.HTTPConnection("127.0.0.1", self.server.moto_port)
        headers = {name: value for name, value in self.headers.items() if name != "Expect"}
        moto.request(self.command, self.path, body, headers)
        answer = moto.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "date", "server", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        self.wfile.write(content)
        moto.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward

    def log_message(self, *_: object) -> None:
        pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    """moto with six sequences in s3://zoom/raw behind the proxy at AWS_ENDPOINT_URL; Ray is running."""
    program = shutil.which("moto_server", path=str(Path(sys.executable).parent))
    assert program, "moto[server] is a development dependency: make setup"
    port = _free_port()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    moto = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], **quiet)
    with pytest.MonkeyPatch.context() as patch:
        proxy = Proxy(port)
        names = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        names["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.server_port}"
        for name, value in names.items():
            patch.setenv(name, value)
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert moto.poll() is None
            time.sleep(0.2)
        client = boto3.client("s3")
        client.create_bucket(Bucket="zoom")
        folder = write_sequence(tmp_path_factory.mktemp("raw") / "00001", seed=1)
        for number in range(1, SEQUENCES + 1):
            for path in folder.iterdir():
                client.upload_file(str(path), "zoom", f"raw/{number:05d}/{path.name}")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield proxy
        ray.shutdown()
        proxy.shutdown()
        moto.terminate()
        moto.wait()


@pytest.fixture(scope="module")
def undisturbed(proxy):
    assert run("undisturbed").written == 3 * SEQUENCES
    return content("undisturbed")


@pytest.fixture(autouse=True)
def _heal(proxy):
    yield
    proxy.fault = lambda method, path: None


def run(prefix, options=OPTIONS):
    return preprocess("s3://zoom/raw", f"s3://zoom/{prefix}", options, progress=False, start_ray=cluster.start_ray)


def content(prefix):
    """ETag of every object, except _rate.json, which holds the time taken. Asserts that no upload is unfinished."""
    client = boto3.client("s3")
    assert not client.list_multipart_uploads(Bucket="zoom").get("Uploads")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="zoom", Prefix=f"{prefix}/")
    objects = [entry for page in pages for entry in page.get("Contents", [])]
    found = {entry["Key"].removeprefix(f"{prefix}/"): entry["ETag"] for entry in objects}
    return {name: tag for name, tag in found.items() if name != "_rate.json"}


@pytest.mark.parametrize("fault", ["500", "cut"])
def test_occasional_faults_change_nothing(proxy, undisturbed, fault):
    rng = random.Random(3)
    proxy.fault = lambda method, path: fault if rng.random() < 0.1 else None
    assert run(f"flaky-{fault}").quarantined == []
    proxy.fault = lambda method, path: None
    assert content(f"flaky-{fault}") == undisturbed


def test_failing_writes_end_the_run_and_keep_finished_pairs(proxy, undisturbed):
    written = []

    def full(method, path):
        if method == "PUT" and "parquet" in path:
            written.append(path)
            return "500" if len(written) > 4 else None
        return None

    proxy.fault = full
    with pytest.raises(
        PreprocessError,
        match=r"s3://zoom/full: expected a folder that can be written, got [^\n]+finished pairs are kept",
    ) as told:
        run("full")
    assert "\n" not in str(told.value)
    proxy.fault = lambda method, path: None
    assert content("full").items() <= undisturbed.items()
    again = run("full")
    assert again.skipped >= 4 and content("full") == undisturbed


def test_failing_reads_end_the_run_after_eight_pairs(proxy, undisturbed):
    given = []

    def gone(method, path):
        given.append(path)
        started = any("parquet" in name for name in given)
        return "500" if started and method == "GET" and ".dng" in path else None

    proxy.fault = gone
    with pytest.raises(PreprocessError, match="s3://zoom/raw: expected readable pairs, got 8 consecutive pairs"):
        run("unread")
    proxy.fault = lambda method, path: None
    assert run("unread").quarantined == [] and content("unread") == undisturbed


def test_a_bucket_that_does_not_answer_ends_the_run(proxy):
    proxy.fault = lambda method, path: "hang"
    with pytest.raises(PreprocessError, match="s3://zoom/raw: expected a folder that can be read"):
        run("silent")


def test_two_concurrent_runs_write_what_one_would(proxy, undisturbed):
    program = (
        "import sys; from pipelines.cluster import start_ray; from preprocessing.shards import *\n"
        f"preprocess('s3://zoom/raw', 's3://zoom/both', {OPTIONS!r}, progress=False, start_ray=start_ray)"
    )
    both = [subprocess.Popen([sys.executable, "-c", program], env=os.environ) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    assert run("both").todo == 0 and content("both") == undisturbed


UPDATE_PROGRAM = """
import json, sys
from preprocessing.storage import open_folder
for number in range(10):
    mine = sys.argv[1] + str(number)
    open_folder("s3://zoom/set").update("set.json", lambda old: json.dumps([*json.loads(old or "[]"), mine]).encode())
"""


def test_concurrent_updates_lose_nothing(proxy):
    running = [subprocess.Popen([sys.executable, "-c", UPDATE_PROGRAM, name]) for name in "abc"]
    assert [process.wait(120) for process in running] == [0] * 3
    assert len(set(json.loads(open_folder("s3://zoom/set").read("set.json")))) == 30
