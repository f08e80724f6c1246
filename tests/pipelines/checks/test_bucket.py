"""The check of a bucket, against a server that is sound and ones that are not."""

import os

import boto3
import pytest
from moto.server import ThreadedMotoServer

from pipelines.checks.bucket import bucket
from preprocessing import s3


@pytest.fixture(scope="module")
def uri():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    boto3.client("s3").create_bucket(Bucket="checked")
    yield "s3://checked/prefix"
    server.stop()
    os.environ.clear()
    os.environ.update(before)


def keys():
    return [one["Key"] for one in boto3.client("s3").list_objects_v2(Bucket="checked").get("Contents", [])]


def test_a_sound_bucket_is_ok_and_left_clean(uri):
    found = bucket(uri)
    assert (found.state, found.detail) == ("ok", f"{uri}: write, read, conditional write, delete")
    assert keys() == []


@pytest.mark.parametrize(("ignored", "named"), [("IfNoneMatch", "If-None-Match"), ("IfMatch", "If-Match")])
def test_a_server_that_ignores_conditions_is_broken(uri, monkeypatch, ignored, named):
    real = s3._put

    def put(uri, path, data, condition):
        return real(uri, path, data, {name: value for name, value in condition.items() if name != ignored})

    monkeypatch.setattr(s3, "_put", put)
    found = bucket(uri)
    assert found.state == "broken" and named in found.detail
    assert keys() == []


def test_another_kind_of_uri_is_broken():
    assert "expected s3://" in bucket("/local").detail
