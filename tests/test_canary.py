"""No secret is written down: a string in every credential is searched for in all that SDAN and Ray leave behind.

A bucket on a local S3 server holds RAW and SHARDS, and an MLflow server with a password in its address holds runs. Both
take any password.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from time import monotonic, sleep

import boto3
import pytest
from known_scene import write_sequence
from moto.server import ThreadedMotoServer
from ray.train.v2._internal.state.schema import _to_json_serializable_value

from pipelines import config as configs
from pipelines import registry
from pipelines.training.worker import TrainJob
from preprocessing.storage import UriError, open_folder, require_no_password

CANARY = "c4narY7secretZq"
SEQUENCES = 3
PROGRAM = """
import sys
from pipelines.cli import app
raw, shards, data = sys.argv[1:]
options = [raw, shards, "--tile", "24", "--stride", "16", "--val", "00002"]
smoke = ["--config", "smoke", "--workers", "1", "--set", "train.epochs=1", "--margin", "0"]
for arguments in (["preprocess", *options], ["retrain", *options, *smoke], ["status"]):
    app(["--data", data, *arguments], standalone_mode=False)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def services(tmp_path, monkeypatch):
    """An S3 server with RAW in s3://zoom/raw and an MLflow server; every credential of the environment has CANARY."""
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    s3.start()
    port, folder = free_port(), tmp_path / "server"
    folder.mkdir()
    log = (folder / "log.txt").open("w")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port)]
    plain = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    plain["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    server = subprocess.Popen([*command, "--workers", "1"], stdout=log, stderr=log, env=plain)
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    names += ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    for name in names:
        monkeypatch.setenv(name, f"{CANARY}{name}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*s3.get_host_and_port()))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{CANARY}@127.0.0.1:{port}")
    client = boto3.client("s3")
    client.create_bucket(Bucket="zoom")
    sequence = write_sequence(tmp_path / "00001", seed=1)
    for number in range(1, SEQUENCES + 1):
        for path in sequence.iterdir():
            client.upload_file(str(path), "zoom", f"raw/{number:05d}/{path.name}")
    try:
        deadline = monotonic() + 180
        while not answers(port):
            assert server.poll() is None and monotonic() < deadline, (folder / "log.txt").read_text()
            sleep(0.2)
        yield client
    finally:
        server.terminate()
        server.wait()
        log.close()
        s3.stop()


def answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def with_canary(folder: Path) -> list[str]:
    """The files below the folder whose content or path has CANARY."""
    needle = CANARY.encode()
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if needle in path.read_bytes() or CANARY in str(path)]


@pytest.mark.slow
def test_no_secret_is_in_any_file_log_or_message(services, tmp_path):
    ray = Path(tempfile.mkdtemp(prefix="sdan-canary-"))  # a short path: Ray's sockets are in it
    try:
        environment = {**os.environ, "RAY_TMPDIR": str(ray), "RAY_ADDRESS": "", "SDAN_VERBOSE": "1"}
        data = tmp_path / "data"
        arguments = [sys.executable, "-c", PROGRAM, "s3://zoom/raw", "s3://zoom/shards", str(data)]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=400, check=False)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-3000:]
        assert "the first model" in said and "next run" in said  # a model was trained and compared
        assert CANARY not in said
        logs = [path for path in ray.rglob("*") if path.is_file() and path.suffix in (".log", ".out", ".err")]
        assert len(logs) > 10  # Ray's logs are in this folder
        assert with_canary(ray) == []
    finally:
        shutil.rmtree(ray, ignore_errors=True)
    assert (data / "runs").is_dir() and with_canary(data) == []
    # The server's folder has its log, its database with every param and tag, and every artifact.
    assert b"train.epochs" in (tmp_path / "server" / "mlflow.db").read_bytes()
    assert with_canary(tmp_path / "server") == []
    stored = services.list_objects_v2(Bucket="zoom")["Contents"]
    assert any(entry["Key"].startswith("shards/split=train/") for entry in stored)
    for entry in stored:
        body = services.get_object(Bucket="zoom", Key=entry["Key"])
        assert CANARY.encode() not in body["Body"].read() and CANARY not in str(body["Metadata"])


@pytest.mark.parametrize("uri", [f"s3://key:{CANARY}@zoom/raw", f"s3://{CANARY}@zoom/raw", f"s3://k:{CANARY}@zoom"])
def test_a_uri_with_a_password_is_refused_without_it(uri):
    for check in (require_no_password, open_folder):
        with pytest.raises(UriError) as refused:
            check(uri)
        assert "s3://zoom" in str(refused.value) and "AWS_SECRET_ACCESS_KEY" in str(refused.value)
        assert CANARY not in str(refused.value)
    require_no_password("s3://zoom/a@b/c")  # in a path it is no password
    require_no_password("/folder/a:b@c")


SECRET = f"s3://key:{CANARY}@zoom/x"


@pytest.mark.parametrize(
    "arguments",
    [
        ["preprocess", SECRET, "SHARDS"],
        ["preprocess", "RAW", SECRET],
        ["train", SECRET],
        ["train", "SHARDS", "--init", SECRET],
        ["train", "SHARDS", "--storage", SECRET],
        ["evaluate", SECRET, "--model", "starter"],
        ["evaluate", "SHARDS", "--model", SECRET],
        ["tune", SECRET],
        ["inspect", SECRET],
        ["retrain", SECRET, "SHARDS"],
        ["retrain", "RAW", SECRET],
        ["zoom", SECRET, "-o", "OUT"],
        ["export", "-o", "a.onnx", "--model", SECRET],
    ],
    ids=lambda arguments: f"{arguments[0]}-{arguments.index(SECRET)}",
)
def test_every_verb_refuses_a_password_in_a_uri(arguments, tmp_path, monkeypatch, capfd):
    from pipelines import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sys, "argv", ["sdan", "--data", str(tmp_path / "data"), *arguments])
    monkeypatch.setattr(cli, "_INTERRUPTS", cli._Interrupts())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = "".join(capfd.readouterr())
    assert ended.value.code == 2 and CANARY not in shown
    assert "expected a URI without user name and password" in shown
    assert with_canary(tmp_path) == []


def test_a_server_that_does_not_answer_is_named_without_password(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "PROBES", 1)
    for uri in (f"http://user:{CANARY}@127.0.0.1:9", f"postgresql://user:{CANARY}@127.0.0.1:9/x"):
        with pytest.raises(registry.RegistryError) as refused:
            registry.prepare_database(uri)
        assert "127.0.0.1:9" in str(refused.value) and CANARY not in str(refused.value)


def test_what_ray_shows_of_a_training_has_no_password():
    """Ray Train keeps the text of its arguments for the dashboard."""
    job = TrainJob(configs.smoke(), None, "/runs/one", 1, 1, f"http://user:{CANARY}@server:5000", "0", None, None)
    shown = str(_to_json_serializable_value({"job": job}))
    assert "/runs/one" in shown and CANARY not in shown
