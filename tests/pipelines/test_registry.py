"""MLflow's database, runs and the registry: one champion, promotion, rollback, and how model URIs are resolved."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines import registry
from pipelines.registry import RegistryError

PREPARE = "import sys; from pipelines.registry import prepare_database; prepare_database(sys.argv[1])"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A database that four processes prepare at once, as when four commands start together."""
    folder = tmp_path_factory.mktemp("template") / "data"
    uri = registry.default_tracking_uri(folder)
    started = [
        subprocess.Popen([sys.executable, "-c", PREPARE, uri], stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0] * 4, errors
    return folder


@pytest.fixture
def data(template, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "a data folder"  # a space: artifact URIs are percent-encoded
    shutil.copytree(template, folder)
    return folder


@pytest.fixture
def uri(data):
    return registry.default_tracking_uri(data)


def write_checkpoint(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps({"model": {"scale": 4}}))
    (folder / "trainer.pt").write_bytes(b"optimizer")
    return folder


def register(uri: str, folder: Path, weights: bytes) -> str:
    run_id = registry.create_run(uri, "train", folder.name)
    return registry.register_model(uri, run_id, write_checkpoint(folder, weights))


def test_a_database_prepared_by_four_processes_works(uri):
    run_id = registry.create_run(uri, "train", "first", {"a": "b"})
    run = MlflowClient(tracking_uri=uri).get_run(run_id)
    assert run.info.run_name == "first" and run.data.tags["a"] == "b"


def test_preparing_a_database_again_keeps_its_runs(uri):
    run_id = registry.create_run(uri, "train", "first")
    registry.prepare_database(uri)
    assert MlflowClient(tracking_uri=uri).get_run(run_id).info.run_name == "first"


def test_a_damaged_database_gets_one_line(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"this is not a database that MLflow can read" * 100)
    with pytest.raises(RegistryError, match=r"mlflow\.db: expected an MLflow database") as caught:
        registry.prepare_database(f"sqlite:///{tmp_path}/mlflow.db")
    assert "\n" not in str(caught.value)


def test_an_unwritable_data_folder_gets_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="expected a writable place"):
        registry.prepare_database(registry.default_tracking_uri(tmp_path / "file" / "data"))


def test_no_database_is_made_for_a_tracking_server(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    uri = registry.default_tracking_uri(tmp_path)
    assert uri == "http://127.0.0.1:1"
    registry.prepare_database(uri)
    assert list(tmp_path.iterdir()) == []


def test_artifacts_are_beside_the_database(uri, data, tmp_path):
    version = register(uri, tmp_path / "one", b"1")
    folder = registry.resolve_model(uri, f"models:/sdan/{version}")
    assert folder.is_relative_to(data / "mlartifacts")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]  # no pickle


def test_params_that_a_run_has_are_not_logged_again(uri):
    run_id = registry.create_run(uri, "train", "run")
    registry.log_config(uri, run_id, {"loss.align_weight": 0.5})
    registry.log_config(uri, run_id, {"loss.align_weight": 1.0, "loss.kind": "l1", "train.betas": (0.9, 0.99)})
    params = MlflowClient(tracking_uri=uri).get_run(run_id).data.params
    assert params == {"loss.align_weight": "0.5", "loss.kind": "l1", "train.betas": "(0.9, 0.99)"}


def test_each_checkpoint_of_a_run_is_registered_once(uri, tmp_path):
    run_id = registry.create_run(uri, "train", "run")
    first = registry.register_model(uri, run_id, write_checkpoint(tmp_path / "one", b"1"))
    assert registry.register_model(uri, run_id, tmp_path / "one") == first
    second = registry.register_model(uri, run_id, write_checkpoint(tmp_path / "two", b"2"))
    assert second != first
    assert (registry.resolve_model(uri, f"models:/sdan/{first}") / "model.safetensors").read_bytes() == b"1"
    assert (registry.resolve_model(uri, f"runs:/{run_id}") / "model.safetensors").read_bytes() == b"2"


def test_champion_promotion_and_rollback(uri, tmp_path):
    assert registry.get_champion(uri) is None
    with pytest.raises(RegistryError, match="expected a champion"):
        registry.rollback(uri)
    one, two, three = (register(uri, tmp_path / name, name.encode()) for name in ("one", "two", "three"))
    registry.set_champion(uri, one)
    with pytest.raises(RegistryError, match="is the first"):
        registry.rollback(uri)
    registry.set_champion(uri, two)
    registry.set_champion(uri, two)  # a repeated promotion does not make it its own predecessor
    registry.set_champion(uri, three)
    champion = registry.resolve_model(uri, "models:/sdan@champion")
    assert (champion / "model.safetensors").read_bytes() == b"three"
    assert registry.rollback(uri) == (three, two)
    assert registry.rollback(uri) == (two, one)
    assert str(registry.get_champion(uri).version) == one


def test_folder_resolves_to_itself(uri, tmp_path):
    folder = write_checkpoint(tmp_path / "one")
    assert registry.resolve_model(uri, folder) == folder


def test_remote_artifacts_are_downloaded(uri, tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "one", b"remote")
    client = MlflowClient(tracking_uri=uri)
    client.create_registered_model("sdan")
    version = client.create_model_version("sdan", "s3://bucket/checkpoint").version
    fetched = []

    def download(artifact_uri, dst_path, tracking_uri):
        fetched.append((artifact_uri, tracking_uri))
        return shutil.copytree(folder, Path(dst_path) / "checkpoint")

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", download)
    found = registry.resolve_model(uri, f"models:/sdan/{version}", cache=tmp_path / "cache")
    assert (found / "model.safetensors").read_bytes() == b"remote"
    assert fetched == [("s3://bucket/checkpoint", uri)]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "expected a checkpoint folder, got no such folder"),
        ("models:/sdan@champion", "expected a champion, got none yet"),
        ("models:/other@champion", "expected a registered model"),
        ("models:/sdan/7", "expected a registered model"),
        ("models:/sdan", "expected models:/NAME@ALIAS"),
        ("runs:/0123456789abcdef", "expected a run in"),
    ],
)
def test_a_wrong_model_uri_gets_one_line(uri, model, message):
    with pytest.raises(RegistryError, match=message) as caught:
        registry.resolve_model(uri, model)
    assert "\n" not in str(caught.value) and model in str(caught.value)


def test_incomplete_runs_and_folders_are_refused(uri, tmp_path):
    run_id = registry.create_run(uri, "train", "run")
    with pytest.raises(RegistryError, match="expected a run with a registered checkpoint"):
        registry.resolve_model(uri, f"runs:/{run_id}")
    with pytest.raises(RegistryError, match=r"without model\.safetensors and config\.json"):
        registry.register_model(uri, run_id, tmp_path)
    with pytest.raises(RegistryError, match="expected a run in"):
        registry.register_model(uri, "0123", write_checkpoint(tmp_path / "one"))
    with pytest.raises(RegistryError, match="expected a registered version"):
        registry.set_champion(uri, "12")


def test_looking_for_a_champion_creates_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = registry.default_tracking_uri(tmp_path)
    assert registry.get_champion(uri) is None
    with pytest.raises(RegistryError, match="expected an MLflow database"):
        registry.resolve_model(uri, "models:/sdan@champion")
    assert list(tmp_path.iterdir()) == []
