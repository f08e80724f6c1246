"""MLflow's database, runs and the registry: one champion, promotion, rollback, and how model URIs are resolved."""

import http.server
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
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
    folder = tmp_path / "a data%20folder?x=1#y%"  # a URI would read each of these characters differently
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


@pytest.mark.parametrize("name", ["plain", "a b", "a%20b", "a?b", "a#b", "100%"])
def test_the_database_is_in_the_folder_that_was_named(template, tmp_path, monkeypatch, name):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = shutil.copytree(template, tmp_path / name)
    before = (folder / "mlflow.db").read_bytes()
    uri = registry.default_tracking_uri(folder)
    registry.prepare_database(uri)
    registry.create_run(uri, "train", "run")
    assert (folder / "mlflow.db").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_name_that_is_not_utf8_gets_one_line(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RegistryError, match=r"--data.*expected a name in UTF-8"):
        registry.default_tracking_uri(Path(os.fsdecode(b"/tmp/stra\xdfe")))


def damaged(path: Path) -> None:
    path.write_bytes(b"this is not a database that MLflow can read" * 100)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def foreign(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE photographs (name TEXT)")


def newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'fedcba987654'")


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (damaged, "expected MLflow's database, got file is not a database; restore it from a backup"),
        (cut_short, "expected MLflow's database, got .*; restore it from a backup"),
        (foreign, r"expected MLflow's database, got another program's \(tables photographs\)"),
        (newer, "expected a database of this MLflow or an older one, got revision fedcba987654; update MLflow"),
        (folder_instead, "expected MLflow's database, got a folder"),
    ],
)
def test_a_database_that_cannot_be_used_gets_one_line(data, uri, spoil, said):
    spoil(data / "mlflow.db")
    for verb in (registry.prepare_database, registry.connect):
        with pytest.raises(RegistryError, match=rf"mlflow\.db: .*{said}") as caught:
            verb(uri)
        assert "\n" not in str(caught.value) and "move it" not in str(caught.value)


def test_an_older_schema_is_migrated_only_by_a_verb_that_writes(data, uri, monkeypatch):
    with sqlite3.connect(data / "mlflow.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    with pytest.raises(RegistryError, match="got an older one; run `sdan doctor`"):
        registry.get_champion(uri)
    migrated = []
    monkeypatch.setattr(registry, "_migrate", lambda *arguments: migrated.append(arguments))
    registry.prepare_database(uri)
    assert migrated == [(uri, data / "mlflow.db")]


def test_a_database_whose_making_was_interrupted_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri, upgrade = registry.default_tracking_uri(tmp_path), registry._upgrade

    def interrupted(aside: str) -> None:
        upgrade(aside)
        with sqlite3.connect(aside.removeprefix("sqlite:///")) as connection:
            connection.execute("DROP TABLE runs")
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "_upgrade", interrupted)
    with pytest.raises(KeyboardInterrupt):
        registry.prepare_database(uri)
    assert not (tmp_path / "mlflow.db").exists()
    monkeypatch.setattr(registry, "_upgrade", upgrade)
    registry.prepare_database(uri)
    assert registry.create_run(uri, "train", "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def lock(database: Path) -> sqlite3.Connection:
    """Another program's connection, which holds the database's lock until it is closed."""
    connection = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def test_a_locked_database_is_waited_for(data, uri, caplog):
    other = lock(data / "mlflow.db")
    threading.Timer(1.0, other.close).start()
    registry.prepare_database(uri)
    said = [record.getMessage() for record in caplog.records if record.name == registry.__name__]
    assert said == [f"{data}/mlflow.db: another program has locked the database; waiting up to 60 s"]
    registry.create_run(uri, "train", "run")


def test_a_database_that_stays_locked_gets_one_line(data, uri, monkeypatch):
    monkeypatch.setattr(registry, "LOCK_WAIT_S", 0.3)
    other = lock(data / "mlflow.db")
    for verb in (registry.prepare_database, registry.get_champion):
        with pytest.raises(RegistryError, match=r"expected access within .* another program keeps locked"):
            verb(uri)
    other.close()


def test_an_unwritable_data_folder_gets_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="expected a writable place"):
        registry.prepare_database(registry.default_tracking_uri(tmp_path / "file" / "data"))


def test_no_database_is_made_for_a_tracking_server(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    uri = registry.default_tracking_uri(tmp_path)
    assert uri == "http://127.0.0.1:1"
    with pytest.raises(RegistryError, match="expected an answer"):
        registry.prepare_database(uri)
    assert list(tmp_path.iterdir()) == []


def serve(status: int) -> http.server.HTTPServer:
    """A server on 127.0.0.1 that answers every request with `status`."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Print nothing."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_a_dead_server_gets_one_line_within_20_s(monkeypatch):
    monkeypatch.setattr(registry, "PROBE_PAUSE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        places = {f"127.0.0.1:{silent.getsockname()[1]}": "timed? ?out", "nosuch.invalid": "resol|known|resolution"}
        places[f"127.0.0.1:{closed.getsockname()[1]}"] = "refused"
        closed.close()
        monkeypatch.setattr(registry, "PROBE_TIMEOUT_S", 0.5)
        for place, reason in places.items():
            started = time.monotonic()
            with pytest.raises(RegistryError, match=f"(?i)expected an answer from MLflow, got .*({reason})") as caught:
                registry.get_champion(f"http://user:secret@{place}")
            assert time.monotonic() - started < 20
            assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(("status", "alive"), [(200, True), (404, True), (401, True), (503, False)])
def test_a_server_is_known_by_any_answer_of_its_own(monkeypatch, status, alive):
    monkeypatch.setattr(registry, "PROBE_PAUSE_S", 0.0)
    server = serve(status)
    uri = f"http://127.0.0.1:{server.server_port}"
    if alive:
        registry.prepare_database(uri)
    else:
        with pytest.raises(RegistryError, match="got HTTP status 503"):
            registry.prepare_database(uri)
    server.shutdown()


def test_a_dead_database_server_gets_one_line():
    with pytest.raises(RegistryError, match="MLFLOW_TRACKING_URI=postgresql://127") as caught:
        registry.connect("postgresql://user:secret@127.0.0.1:1/mlflow")
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


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


def test_models_and_runs_are_described(uri, tmp_path):
    run_id = registry.create_run(uri, "sdan", "run")
    registry.log_config(uri, run_id, {"shards": "/my/shards"})
    folder = write_checkpoint(tmp_path / "one")
    stored = {
        "config": {"name": "demo", "train": {"epochs": 8, "crops_per_epoch": 160}},
        "scores": {"val_self_aligned_psnr": 30.254, "val_self_raw_psnr": 30.3, "val_self_true_psnr": None},
    }
    (folder / "config.json").write_text(json.dumps(stored))
    client = MlflowClient(tracking_uri=uri)
    found = client.get_model_version("sdan", registry.register_model(uri, run_id, folder))
    assert found.description == (
        "demo, trained for 8 epochs of 160 crops on /my/shards; "
        "PSNR of the held-out crops, self protocol: 30.25 dB (aligned), 30.30 dB (raw)"
    )
    shown = {name: value for name, value in found.tags.items() if not name.startswith("sdan.")}
    assert shown == {"self_aligned_psnr": "30.2540", "self_raw_psnr": "30.3000"}
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == found.description


def test_the_ui_opens_the_table_of_trainings(uri):
    client = MlflowClient(tracking_uri=uri)
    old = client.create_experiment("sdan")  # as an older version made it, without tags
    link = registry.ui_link(uri, "http://127.0.0.1:5000/")
    query = "workflowType=machine_learning&viewStateShareKey=sdan"
    assert link == f"http://127.0.0.1:5000/#/experiments/{old}/runs?{query}"
    for name in ("sdan", "new"):
        tags = client.get_experiment(registry.open_experiment(uri, name)).tags
        assert tags["mlflow.experimentKind"] == "custom_model_development"
        view = json.loads(tags["mlflow.sharedViewState.sdan"])
        assert view["orderByKey"] == "metrics.`main/best_psnr`" and "params.`name`" in view["selectedColumns"]


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
        ("nowhere", "expected a checkpoint folder, got none"),
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


@pytest.mark.parametrize("version", ["99", "abc"])
def test_promoting_no_version_names_those_there_are(uri, tmp_path, version):
    for name in ("one", "two"):
        register(uri, tmp_path / name, name.encode())
    with pytest.raises(RegistryError, match=f"expected one of the versions 1, 2, got {version}"):
        registry.set_champion(uri, version)


def test_looking_for_a_champion_creates_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = registry.default_tracking_uri(tmp_path)
    assert registry.get_champion(uri) is None
    with pytest.raises(RegistryError, match="expected an MLflow database"):
        registry.resolve_model(uri, "models:/sdan@champion")
    assert list(tmp_path.iterdir()) == []
