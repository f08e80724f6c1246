"""One retraining at a time: the file lock of the data folder, and the lock object in a bucket."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import boto3
import pytest
from moto.server import ThreadedMotoServer

from pipelines.retraining import lock
from pipelines.retraining.lock import LOCK, SHARDS_LOCK, STALE_S, Holder, LockError, RetrainRunning, describe, hold

HOLD = """
import sys, time
from pathlib import Path
from pipelines.retraining.lock import hold
with hold(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


def holder_in(folder, shards):
    """A process that holds the locks."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), shards], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def end(process):
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def bucket():
    """A client of a local S3 server with the bucket "zoom"; the environment names it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}.items():
            patch.setenv(name, value)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        client = boto3.client("s3")
        client.create_bucket(Bucket="zoom")
        yield client
    server.stop()


def stored(bucket, prefix):
    """The content of the lock object; None if there is none."""
    key = f"{prefix}/{SHARDS_LOCK}"
    if "Contents" not in bucket.list_objects_v2(Bucket="zoom", Prefix=key):
        return None
    return json.loads(bucket.get_object(Bucket="zoom", Key=key)["Body"].read())


def leave(bucket, prefix, holder, silent_s=0.0, monkeypatch=None):
    """A lock object of `holder` that was written `silent_s` ago."""
    bucket.put_object(Bucket="zoom", Key=f"{prefix}/{SHARDS_LOCK}", Body=holder.to_json())
    if silent_s:
        from preprocessing import s3

        real = s3.get_aged
        monkeypatch.setattr(s3, "get_aged", lambda uri, path: (*real(uri, path)[:2], silent_s))


def test_a_second_holder_of_the_folder_names_the_first(tmp_path):
    process = holder_in(tmp_path, "shards")
    try:
        with (
            pytest.raises(RetrainRunning, match=rf"running \(process {process.pid} on \S+ since 20\d\d-.* \w+\); this"),
            hold(tmp_path, "shards"),
        ):
            pass
        assert f"process {process.pid} on" in describe(tmp_path, None)
    finally:
        end(process)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid  # its file stays, its lock does not
    assert describe(tmp_path, None) == "free"
    with hold(tmp_path, "shards"):
        assert str(os.getpid()) in describe(tmp_path, None)
    assert (tmp_path / LOCK).read_text() == ""


def test_a_lock_file_of_an_older_version_or_damage_is_no_obstacle(tmp_path):
    for content in ("process 1 on here since 2026-01-01 00:00:00", "{", ""):
        (tmp_path / LOCK).write_text(content)
        assert describe(tmp_path, None) == ("free" if not content else f"{tmp_path / LOCK}: unreadable")
        with hold(tmp_path, "shards"):
            pass


def test_a_bucket_is_locked_whatever_the_data_folder(bucket, tmp_path):
    shards = "s3://zoom/one"
    process = holder_in(tmp_path / "a", shards)
    try:
        named = r"s3://zoom/one/_retrain.lock: a retraining is running \(process"
        with pytest.raises(RetrainRunning, match=named), hold(tmp_path / "b", shards):
            pass
        assert f"process {process.pid}" in describe(tmp_path / "b", shards)
        with hold(tmp_path / "b", "s3://zoom/two"):  # other shards are free
            assert stored(bucket, "two")["pid"] == os.getpid()
    finally:
        end(process)
    assert stored(bucket, "two") is None
    with hold(tmp_path / "b", shards) as held:  # killed a moment ago, so stale at once
        assert len(held.notes) == 1 and f"left behind (process {process.pid} on" in held.notes[0]
        held.require()
    assert stored(bucket, "one") is None


@pytest.mark.parametrize(
    ("changes", "silent_s", "taken"),
    [
        ({}, 1e6, False),  # this very process runs, however silent
        ({"boot": "another"}, 0.0, True),
        ({"process": "1-1"}, 0.0, True),
        ({"machine": "elsewhere"}, STALE_S - 60, False),
        ({"machine": "elsewhere"}, STALE_S + 60, True),
    ],
)
def test_stale_by_boot_process_or_silence(bucket, tmp_path, monkeypatch, changes, silent_s, taken):
    prefix = f"stale{len(changes)}{silent_s:.0f}{''.join(changes)}"
    leave(bucket, prefix, dataclasses.replace(Holder(), **changes), silent_s, monkeypatch)
    try:
        with hold(tmp_path, f"s3://zoom/{prefix}"):
            assert taken
    except RetrainRunning:
        assert not taken


def test_of_two_that_find_a_stale_lock_one_takes_it(bucket, tmp_path, monkeypatch):
    """Between the look and the write of the first, the second takes the lock."""
    from preprocessing import s3

    leave(bucket, "race", dataclasses.replace(Holder(), boot="another"))
    real, winner = s3.put_if_unchanged, Holder()
    taken = []

    def late(uri, path, data, version):
        if not taken:
            taken.append(bucket.put_object(Bucket="zoom", Key=path.partition("/")[2], Body=winner.to_json()))
        return real(uri, path, data, version)

    monkeypatch.setattr(s3, "put_if_unchanged", late)
    with pytest.raises(RetrainRunning), hold(tmp_path, "s3://zoom/race"):
        pass
    assert stored(bucket, "race")["token"] == winner.token


def test_the_heartbeat_keeps_the_lock_fresh_and_a_loss_is_noticed(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    with hold(tmp_path, "s3://zoom/beat") as held:
        first = stored(bucket, "beat")["heartbeat"]
        deadline = time.monotonic() + 20
        while stored(bucket, "beat")["heartbeat"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        held.require()
        other = Holder()
        leave(bucket, "beat", other)
        with pytest.raises(LockError, match="lost it; the champion stays"):
            held.require()
    assert stored(bucket, "beat")["token"] == other.token  # what another holds is left alone


def test_a_lost_answer_to_our_own_write_is_no_other_holder(bucket, tmp_path, monkeypatch):
    from preprocessing import s3

    real, calls = s3.put_if_unchanged, []

    def unanswered(*arguments):
        calls.append(real(*arguments))
        return False

    monkeypatch.setattr(s3, "put_if_unchanged", unanswered)
    with hold(tmp_path, "s3://zoom/unanswered"):
        assert calls == [True]


def test_a_bucket_that_cannot_be_written_is_one_line(bucket, tmp_path):
    said = r"s3://nosuch/x/_retrain\.lock: expected a bucket that takes cond"
    with pytest.raises(LockError, match=said), hold(tmp_path, "s3://nosuch/x"):
        pass
