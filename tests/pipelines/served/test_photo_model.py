"""A registered version is an MLflow model that answers with the bytes of `sdan zoom`; older versions are still read."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image

from pipelines import registry
from pipelines.registered import logged
from pipelines.zoom import Zoomer, zoom_photos
from sdan import STARTER_RGB, starter_folder


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """(tracking URI, version) of the starter for pictures, registered as a training does it."""
    data = tmp_path_factory.mktemp("registered") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        uri = registry.default_tracking_uri(data)
    registry.prepare_database(uri)
    run_id = registry.create_run(uri, "sdan", "run")
    version = registry.register_model(uri, run_id, starter_folder(STARTER_RGB))
    registry.set_champion(uri, version)
    return uri, version


@pytest.fixture
def photo(tmp_path):
    """A small JPG with a tag."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 18, 3), np.uint8)
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    Image.fromarray(pixels).resize((72, 50), Image.Resampling.BICUBIC).save(tmp_path / "photo.jpg", exif=exif)
    return tmp_path / "photo.jpg"


def zoomed(photo: Path, folder: Path) -> bytes:
    """What `sdan zoom` writes."""
    zoom_photos([photo], photo.with_name("zoomed.png"), Zoomer.load(folder), say=str, warn=str)
    return photo.with_name("zoomed.png").read_bytes()


@pytest.fixture(scope="module")
def loaded(registered):
    """As MLflow loads it. The folder is named, because mlflow.set_tracking_uri would set a variable for all tests."""
    uri, _ = registered
    return mlflow.pyfunc.load_model(str(registry.resolve_model(uri, registry.CHAMPION_URI).parents[1]))


def test_it_answers_with_the_bytes_of_sdan_zoom(registered, loaded, photo):
    want = zoomed(photo, registry.resolve_model(registered[0], registry.CHAMPION_URI))
    answer = loaded.predict(pd.DataFrame({"photo": [photo.read_bytes()] * 2, "name": ["a.jpg", "../../b.jpg"]}))
    assert list(answer["png"]) == [want, want]
    assert loaded.predict(pd.DataFrame({"photo": [photo.read_bytes()]}))["png"][0] == want


def test_a_bad_photograph_gets_one_line_without_paths(loaded):
    with pytest.raises(MlflowException) as told:
        loaded.predict(pd.DataFrame({"photo": [b"no photograph"], "name": ["a.jpg"]}))
    assert told.value.error_code == "INVALID_PARAMETER_VALUE"
    assert str(told.value).startswith("photo.jpg: expected a photograph") and "\n" not in str(told.value)


def test_a_version_is_an_mlflow_model_of_code_and_weights(registered):
    uri, number = registered
    client = MlflowClient(tracking_uri=uri)
    version = client.get_model_version("sdan", number)
    model = client.get_logged_model(version.tags[logged.MODEL_TAG])
    assert version.source == model.artifact_location and str(model.status) == "READY"
    assert {metric.key for metric in model.metrics or []} == {"self_aligned_psnr", "self_raw_psnr", "self_true_psnr"}
    assert [output.model_id for output in client.get_run(version.run_id).outputs.model_outputs] == [model.model_id]

    folder = registry.resolve_model(uri, f"models:/sdan/{number}").parents[1]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".pyc")]
    assert sorted(path.name for path in (folder / "artifacts/checkpoint").iterdir()) == [
        *("CARD.md", "config.json", "model.safetensors"),
    ]
    described = yaml.safe_load((folder / "MLmodel").read_text())
    assert described["signature"] and described["saved_input_example_info"]
    pinned = (folder / "requirements.txt").read_text().split()
    assert all("==" in line for line in pinned)
    assert {"sdan", "torch", "rawpy", "mlflow"} <= {line.partition("==")[0] for line in pinned}


def test_a_version_names_no_place_of_this_machine(registered):
    uri, number = registered
    folder = registry.resolve_model(uri, f"models:/sdan/{number}").parents[1]
    places = (str(Path.home()), str(Path(__file__).parents[3]), "/tmp/", str(folder.parents[3]))
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            text = path.read_text()
            assert not [place for place in places if place in text], path


def test_requirements_are_the_installed_versions():
    pinned = dict(line.split("==") for line in logged.pinned_requirements())
    assert pinned["mlflow"] == mlflow.__version__ and pinned["numpy"] == np.__version__
    assert not [name for name in ("ray", "pytest") if name in pinned]


def test_versions_before_0_3_are_read(registered, tmp_path):
    """They are the checkpoint as plain artifacts of the run."""
    uri, _ = registered
    client = MlflowClient(tracking_uri=uri)
    run_id = registry.create_run(uri, "sdan", "old")
    digest = registry._digest(starter_folder())
    client.log_artifacts(run_id, str(starter_folder()), f"checkpoint-{digest}")
    client.set_tag(run_id, registry.CHECKPOINT_TAG, f"checkpoint-{digest}")
    client.create_registered_model("old")
    source = f"{client.get_run(run_id).info.artifact_uri}/checkpoint-{digest}"
    old = client.create_model_version("old", source, run_id=run_id)
    want = (starter_folder() / "model.safetensors").read_bytes()
    for asked in (f"models:/old/{old.version}", f"runs:/{run_id}"):
        assert (registry.resolve_model(uri, asked) / "model.safetensors").read_bytes() == want
    registry.set_champion(uri, str(old.version), "old")
    assert registry.resolve_model(uri, "models:/old@champion").name == f"checkpoint-{digest}"
    assert registry.register_model(uri, run_id, starter_folder(), "old") == str(old.version)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_mlflow_serves_the_champion(registered, photo, tmp_path):
    uri, _ = registered
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", registry.CHAMPION_URI, "--env-manager", "local"]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # MLflow starts uvicorn by name
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "PATH": path}
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], cwd=tmp_path, env=environment, start_new_session=True
    )
    try:
        row = {"photo": base64.b64encode(photo.read_bytes()).decode(), "name": "photo.jpg"}
        body = json.dumps({"dataframe_records": [row]}).encode()
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        for _ in range(300):
            assert server.poll() is None
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
                break
            except OSError:
                time.sleep(1)
        with urllib.request.urlopen(asked, timeout=200) as answer:
            (prediction,) = json.loads(answer.read())["predictions"]
        want = zoomed(photo, registry.resolve_model(uri, registry.CHAMPION_URI))
        assert base64.b64decode(prediction["png"]) == want
        bad = json.dumps({"dataframe_records": [{**row, "photo": base64.b64encode(b"text").decode()}]}).encode()
        with pytest.raises(urllib.error.HTTPError) as told:
            urllib.request.urlopen(urllib.request.Request(asked.full_url, bad, dict(asked.headers)), timeout=200)
        assert told.value.code == 400
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)
