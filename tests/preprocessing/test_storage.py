"""Writes are atomic; temporary files of dead writers are removed, those of live writers are kept."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from known_scene import write_sequence

from preprocessing.storage import held, open_folder, write_atomically, writer_id

ROOT = str(Path(__file__).parents[2])


def test_put_replaces_and_leaves_no_temporary_file(tmp_path):
    folder = open_folder(str(tmp_path / "new"))
    folder.put("a/b.json", b"one")
    folder.put("a/b.json", b"two")
    assert folder.read("a/b.json") == b"two" and folder.read("a/b.json", 1) == b"t"
    assert [path.name for path in (tmp_path / "new" / "a").iterdir()] == ["b.json"]
    folder.move("a/b.json", "c/d.json")
    assert folder.exists("c/d.json") and not folder.exists("a/b.json")
    folder.delete("c/d.json")
    folder.delete("c/d.json")  # deleting again is no error


def test_failed_put_keeps_the_old_file(tmp_path):
    folder = open_folder(str(tmp_path))
    folder.put("a", b"old")
    with pytest.raises(TypeError):
        folder.put("a", 7)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and folder.read("a") == b"old"


def test_write_atomically_replaces_the_file(tmp_path):
    path = tmp_path / ("x" * 240 + ".json")  # a name that leaves little room for a temporary one
    write_atomically(path, b"one")
    write_atomically(path, "zwei ü")
    assert path.read_text(encoding="utf-8") == "zwei ü" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "absent" / "a", b"")


@pytest.mark.parametrize("call", ["write_bytes", "replace"])
def test_failed_atomic_write_keeps_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "a"
    write_atomically(path, b"old")
    real = getattr(Path, call)

    def fail(self, *arguments):
        real(self, arguments[0][:3]) if call == "write_bytes" else None
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new, longer")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from preprocessing.storage import write_atomically
real = Path.write_bytes
def write_half(self, data):
    real(self, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
Path.write_bytes = write_half
write_atomically(Path(sys.argv[1]), b"new" * 100_000)
"""


def test_killed_writer_keeps_the_old_file(tmp_path):
    path = tmp_path / "a"
    write_atomically(path, b"old")
    done = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL and path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    open_folder(str(tmp_path)).sweep("")
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomically_needs_no_pyarrow_or_boto3(tmp_path):
    """`sdan zoom` writes its output with it, and is installed without them."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(('pyarrow', 'boto3', 'botocore')))"
    program = (
        f"{blocked}; from pathlib import Path; from preprocessing.storage import *; write_atomically(Path('a'), 'x')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ROOT})
    assert (tmp_path / "a").read_text() == "x"


def test_a_held_folder_is_held_once(tmp_path):
    with held(tmp_path / "a" / "b") as first, held(tmp_path / "a" / "b") as second:
        assert first and not second
        (tmp_path / "a" / "b" / "kept").touch()
    with held(tmp_path / "a" / "b") as again:
        assert again
    with held(tmp_path / "empty"):
        pass
    assert (tmp_path / "a" / "b" / "kept").exists() and not (tmp_path / "empty").exists()


def test_a_killed_holder_frees_the_folder(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from preprocessing.storage import held\n"
        "with held(Path(sys.argv[1])) as ours:\n"
        "    print(ours, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command, environment = [sys.executable, "-c", code, str(tmp_path)], os.environ | {"PYTHONPATH": ROOT}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout.readline() == b"True\n"
        with held(tmp_path) as ours:
            assert not ours
        process.kill()
        process.wait()
        with held(tmp_path) as ours:
            assert ours


def test_holders_that_remove_the_folder_never_share_it(tmp_path):
    """Each holder leaves an empty folder, which is removed while others open it."""
    holders, most = [], []

    def hold(number):
        for _ in range(200):
            with held(tmp_path / "a") as ours:
                if ours:
                    holders.append(number)
                    most.append(len(holders))
                    holders.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hold, range(4)))
    assert set(most) == {1} and not (tmp_path / "a").exists()


def test_readers_see_one_of_two_writers_whole(tmp_path):
    path, contents = tmp_path / "a", {letter * 1_000_000 for letter in (b"a", b"b")}
    write_atomically(path, min(contents))
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(lambda data: [write_atomically(path, data) for _ in range(50)], c) for c in contents]
        while not all(writer.done() for writer in writers):
            assert path.read_bytes() in contents
        [writer.result() for writer in writers]
    assert path.read_bytes() in contents and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [0, 10, 64 * 1024, 64 * 1024 + 1, 100_000, 300_000])
def test_read_ends_gives_both_ends_without_overlap(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "x").write_bytes(data)
    first, last = open_folder(str(tmp_path)).read_ends("x")
    assert first == data[: 64 * 1024] and last == data[64 * 1024 :][-64 * 1024 :]


def test_sweep_removes_only_files_of_dead_writers(tmp_path):
    program = "from preprocessing.storage import writer_id; print(writer_id())"
    gone = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    machine, process, _ = (mine := writer_id()).split("~")
    names = {
        f".x.parquet~{gone}": False,
        f".x.parquet~{mine}": True,
        f".x.parquet~{machine}~{process.partition('-')[0]}-1~0b": False,  # this process's id, but an earlier start time
        ".x.parquet~another.host-1~1-1~0c": True,
        ".x.parquet~another.host-1~1-1~0d": False,  # older than a day
        ".gitignore": True,
        "x.parquet": True,
    }
    for name in names:
        (tmp_path / name).write_bytes(b"")
    for name in (".x.parquet~another.host-1~1-1~0d", f".x.parquet~{mine}", ".gitignore", "x.parquet"):
        os.utime(tmp_path / name, times=(time.time() - 90_000,) * 2)
    open_folder(str(tmp_path)).sweep("")
    assert {path.name for path in tmp_path.iterdir()} == {name for name, stays in names.items() if stays}


UPDATE_PROGRAM = """
import json, sys
from preprocessing.storage import open_folder
folder = open_folder(sys.argv[1])
for number in range(50):
    mine = sys.argv[2] + str(number)
    folder.update("set.json", lambda old: json.dumps(sorted({*json.loads(old or "[]"), mine})).encode())
"""


def update_concurrently(uri, environment=None):
    """Four processes add fifty names each to one file."""
    running = [subprocess.Popen([sys.executable, "-c", UPDATE_PROGRAM, uri, name], env=environment) for name in "abcd"]
    assert [process.wait() for process in running] == [0] * 4
    return json.loads(open_folder(uri).read("set.json"))


def test_concurrent_updates_lose_nothing(tmp_path):
    assert len(update_concurrently(str(tmp_path / "new"))) == 200
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["set.json"]


def test_unknown_schemes_are_rejected():
    with pytest.raises(pa.ArrowInvalid, match="expected a folder or s3://, got gs://"):
        open_folder("gs://bucket/raw")


S3_PROGRAM = """
import sys
from pathlib import Path
import boto3
from pipelines.cluster import start_ray
from preprocessing.schema import list_shards, read_info
from preprocessing.report.inspect import inspect
from preprocessing.shards import PreprocessOptions, preprocess
client, raw = boto3.client("s3"), Path(sys.argv[1])
client.create_bucket(Bucket="zoom")
for path in raw.rglob("*.*"):
    client.upload_file(str(path), "zoom", f"raw/{path.relative_to(raw)}")
runs = [PreprocessOptions(tile_px=24, stride_px=16)] * 2 + [PreprocessOptions(tile_px=24, stride_px=16, val=("00001",))]
start_ray()
reports = [preprocess("s3://zoom/raw", "s3://zoom/shards", options, progress=False) for options in runs]
assert [(report.written, report.skipped) for report in reports] == [(3, 0), (0, 3), (0, 3)], reports
assert len(list_shards("s3://zoom/shards")) == len(list_shards("s3://zoom/shards", "val")) == 3
assert read_info("s3://zoom/shards").tile_px == 24
assert inspect("s3://zoom/shards").count("<img ") == 9
"""


@pytest.mark.slow
def test_raw_and_shards_on_s3(tmp_path):
    server = shutil.which("moto_server", path=os.path.dirname(sys.executable))  # noqa: PTH120
    assert server, "moto[server] is a development dependency: make setup"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    write_sequence(tmp_path / "raw" / "00001", seed=1)
    names = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    environment = {**os.environ, **names, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    moto = subprocess.Popen([server, "-H", "127.0.0.1", "-p", str(port)], **quiet)
    try:
        for _ in range(150):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        program = [sys.executable, "-c", S3_PROGRAM, str(tmp_path / "raw")]
        for name in ("here", "t"):
            (tmp_path / name).mkdir()
        environment["RAY_TMPDIR"] = tempfile.gettempdir()  # socket paths are limited to 107 bytes
        environment["TMPDIR"] = str(tmp_path / "t")
        done = subprocess.run(
            program, env=environment, cwd=tmp_path / "here", capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert not list((tmp_path / "here").iterdir())
        left = [path.name for path in (tmp_path / "t").rglob("*") if path.is_file()]
        assert not [name for name in left if name.lower().endswith((".dng", ".arw", ".jpg", ".parquet"))], left
    finally:
        moto.terminate()
        moto.wait()
