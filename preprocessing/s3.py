"""Uploads to S3 and deletions, each a single boto3 request: an object is written completely or not at all.

pyarrow.fs reads, lists and copies. It does not upload, because it has no conditional requests and uploads in parts: a
killed writer would leave parts behind, which are billed.
"""

from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, BinaryIO
from urllib.parse import parse_qs, urlsplit

import boto3
import pyarrow as pa
import pyarrow.fs
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

_CHANGED = (409, 412)
"""HTTP status of a conditional write that lost to another writer."""
_RETRIES = Config(connect_timeout=5, read_timeout=30, retries={"mode": "standard", "total_max_attempts": 6})
"""Total time after which a request fails for good:

| request | client | the server returns errors | the server does not answer |
|---|---|---|---|
| read, list | pyarrow, its defaults | 6 s | 100 s |
| write, update, delete | boto3, these settings | 30 s | 180 s |
"""


def put(uri: str, path: str, data: bytes | pa.Buffer | BinaryIO) -> None:
    """Write `data` to `path` ("bucket/key"); `uri` selects the storage. Raises OSError after the last retry.

    An open file is sent from the disk in parts of that request; S3 takes at most 5 GB in one.
    """
    _put(uri, path, data, {})


def put_if_unchanged(uri: str, path: str, data: bytes, version: str | None) -> bool:
    """`put`, if the object still has this `version` (None: if it does not exist). Returns whether it was written."""
    return _put(uri, path, data, {"IfMatch": version} if version else {"IfNoneMatch": "*"})


def get(uri: str, path: str) -> tuple[bytes | None, str | None]:
    """(content, version) of an object, (None, None) if missing. Raises OSError after the last retry."""
    content, version, _ = get_aged(uri, path)
    return content, version


def get_aged(uri: str, path: str) -> tuple[bytes | None, str | None, float]:
    """`get`, and how long ago the object was written, in seconds by the server's own clock (0 if missing)."""
    bucket, _, key = path.partition("/")
    try:
        answer = _client(uri).get_object(Bucket=bucket, Key=key)
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return answer["Body"].read(), answer["ETag"], (now - answer["LastModified"]).total_seconds()
    except ClientError as error:
        if error.response["Error"].get("Code") == "NoSuchKey":
            return None, None, 0.0
        raise OSError(str(error)) from error
    except BotoCoreError as error:
        raise OSError(str(error)) from error


def delete(uri: str, path: str) -> None:
    """Remove the object; no error if it is missing. Raises OSError after the last retry.

    pyarrow would leave an empty object as a placeholder for the "folder" that lost its last file.
    """
    bucket, _, key = path.partition("/")
    try:
        _client(uri).delete_object(Bucket=bucket, Key=key)
    except (ClientError, BotoCoreError) as error:
        raise OSError(str(error)) from error


def _put(uri: str, path: str, data: bytes | pa.Buffer | BinaryIO, condition: dict[str, str]) -> bool:
    bucket, _, key = path.partition("/")
    try:
        body: Any = data if hasattr(data, "read") else bytes(data)
        _client(uri).put_object(Bucket=bucket, Key=key, Body=body, **condition)
    except ClientError as error:
        if condition and error.response["ResponseMetadata"]["HTTPStatusCode"] in _CHANGED:
            return False
        raise OSError(str(error)) from error
    except BotoCoreError as error:
        raise OSError(str(error)) from error
    return True


@lru_cache
def _client(uri: str) -> Any:
    """A boto3 client with the endpoint, region and credentials that pyarrow would use for this s3:// URI."""
    parts = urlsplit(uri)
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    endpoint, scheme = query.get("endpoint_override"), query.get("scheme", "https")
    filesystem, _ = pyarrow.fs.FileSystem.from_uri(uri)  # looks up the bucket's region
    return boto3.client(
        "s3",
        region_name=filesystem.region,
        endpoint_url=f"{scheme}://{endpoint.rpartition('://')[2]}" if endpoint else None,
        config=_RETRIES,
    )
