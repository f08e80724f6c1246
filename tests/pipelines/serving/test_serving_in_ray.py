"""`sdan serve` as a user starts it, in Ray Serve: many clients, a promotion meanwhile, memory, and Ctrl-C."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests
from running_service import picture, write_model

from pipelines import registry

pytestmark = pytest.mark.slow
CLIENTS = 32
REQUESTS = 200
LIMIT_S = 300
MOST_GROWTH_BYTES = 100e6
"""Of all processes of the service together, between the first quarter of the requests and the last."""


def register(tracking_uri, folder):
    registry.prepare_database(tracking_uri)
    run = registry.create_run(tracking_uri, registry.EXPERIMENT, folder.name)
    return registry.register_model(tracking_uri, run, folder)


def memory(service):
    """Resident bytes of the proxy, the replica and the decoders."""
    total = 0
    for process in psutil.Process(service.pid).children(recursive=True):
        try:
            name = " ".join(process.cmdline())
            if re.search(r"ray::(Serve|Proxy)|serving\.decoding", name):
                total += process.memory_info().rss
        except psutil.Error:
            pass
    return total


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A --data folder with two registered models; the first is champion."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = registry.default_tracking_uri(tmp_path / "data")
    versions = [register(uri, write_model(tmp_path / name, seed)) for seed, name in enumerate(("one", "two"))]
    registry.set_champion(uri, versions[0])
    return tmp_path / "data", uri, versions


def test_many_clients_a_promotion_and_ctrl_c(data, tmp_path, record_property):
    folder, uri, versions = data
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address, log = f"http://127.0.0.1:{port}", tmp_path / "output.txt"
    command = [sys.executable, "-m", "pipelines.cli", "--data", str(folder), "serve", "--port", str(port)]
    with log.open("wb") as file:
        service = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            start_new_session=True,
            # A suite that was started in the background of a shell ignores Ctrl-C, and its children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        wait_until(lambda: f"model: sdan version {versions[0]}" in log.read_text(), service, log)
        body = picture(seed=5)
        codes, sizes, used = [], [], []

        def send(number):
            answer = requests.post(f"{address}/zoom", data=body, timeout=LIMIT_S)
            codes.append(answer.status_code)
            used.append(answer.headers.get("x-sdan-model"))
            sizes.append(len(answer.content))
            if number == REQUESTS // 2:
                registry.set_champion(uri, versions[1])

        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(send, range(REQUESTS // 4)))
            before = memory(service)
            list(clients.map(send, range(REQUESTS // 4, REQUESTS)))
            after = memory(service)
        assert codes == [200] * REQUESTS and len(set(sizes)) == 1
        record_property("memory_mb", (round(before / 1e6), round(after / 1e6)))
        record_property("models", {name: used.count(name) for name in set(used)})
        assert before > 0 and after - before < MOST_GROWTH_BYTES
        wait_until(lambda: f"model: sdan version {versions[1]}" in log.read_text(), service, log)
        large = threading.Thread(target=interrupted, args=(address,))
        large.start()
        wait_until(lambda: requests.get(f"{address}/healthz", timeout=60).json()["inside"] == 1, service, log)
        began = time.monotonic()
        os.killpg(service.pid, signal.SIGINT)
        assert service.wait(LIMIT_S) == 130
        record_property("seconds_to_end", round(time.monotonic() - began, 1))
        large.join(LIMIT_S)
    finally:
        if service.poll() is None:
            os.killpg(service.pid, signal.SIGKILL)
            service.wait()
    output = log.read_text()
    assert "Traceback" not in output, output
    assert output.rstrip().endswith("sdan: interrupted by Ctrl-C; photographs in work were given up"), output


def interrupted(address):
    with pytest.raises(requests.ConnectionError):
        requests.post(f"{address}/zoom", data=picture(1600, 1600), timeout=LIMIT_S)


def wait_until(true, service, log):
    end = time.monotonic() + LIMIT_S
    while not true():
        assert service.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.2)
