"""A training in MLflow, as shown by the UI in a headless browser."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from mlflow.tracking import MlflowClient
from PIL import Image

from pipelines import cluster, registry
from pipelines import config as configs
from pipelines.train import train

SDAN = str(Path(sys.executable).with_name("sdan"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def run(tiny_shards, tmp_path_factory):
    """(data folder, MLflow run) of a small training that sampled system metrics every second."""
    data = tmp_path_factory.mktemp("ui")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
        cluster.start_ray()
        config = configs.override(configs.smoke(), {"train.epochs": 6, "train.crops_per_epoch": 16})
        result = train(str(tiny_shards), config, data=data, workers=1, name="seen", progress=False)
    return data, MlflowClient(registry.default_tracking_uri(data)).get_run(result.run_id)


@pytest.fixture(scope="module")
def address(run):
    """The address of the running UI."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([SDAN, "--data", str(run[0]), "ui", "--port", str(port)], start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def test_a_run_records_its_data_and_environment(run):
    _, found = run
    data = {entry.tags[0].value: entry.dataset for entry in found.inputs.dataset_inputs}
    assert set(data) == {"train", "val"}
    assert '"pairs": 4' in data["train"].profile and data["train"].digest != data["val"].digest
    for name in ("env.commit", "env.torch", "env.device", "env.workers", "env.platform"):
        assert found.data.tags[name], name
    wanted = (
        "main/train_loss",
        "main/best_psnr",
        "train/grad_norm",
        "run/data_wait",
        "run/skipped_steps",
        "run/workers",
        "val_self/offset_px",
        "val_oracle/offset_p95_px",
    )
    for name in (*wanted, "val_oracle/offset_outside", "val_oracle/offset_roughness"):
        assert name in found.data.metrics, name
    system = [name for name in found.data.metrics if name.startswith("system/")]
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(system)


@pytest.fixture
def browser():
    with Browser() as opened:
        yield opened


def look_at(browser, url, *, words, picture):
    """Open `url`, wait until all `words` are on the page, and save a screenshot."""
    # The window is tall because charts outside it are not drawn. A change of the #/route alone would not load the page.
    browser.open("about:blank", 1500)
    browser.open(url, 1500, 9000)
    browser.wait_for(*words)
    browser.screenshot(picture, whole=False)


def test_the_pages_of_a_run_show_its_charts(browser, run, address, tmp_path):
    _, found = run
    experiment = f"{address}/#/experiments/{found.info.experiment_id}/runs"
    page = f"{experiment}/{found.info.run_id}"
    look_at(browser, experiment, words=["seen"], picture=tmp_path / "runs.png")
    look_at(browser, page, words=["seen", "train.learning_rate", "val_psnr"], picture=tmp_path / "run.png")
    look_at(
        browser,
        f"{page}/model-metrics",
        words=["train_loss", "val_psnr", "validation"],
        picture=tmp_path / "charts.png",
    )
    look_at(browser, f"{page}/system-metrics", words=["cpu_utilization_percentage"], picture=tmp_path / "system.png")
    for name in ("runs", "run", "charts", "system"):
        image = Image.open(tmp_path / f"{name}.png").convert("RGB")
        assert image.size[0] >= 1400
        assert len(image.getcolors(1 << 24)) > 200, f"{name}: an empty page"
