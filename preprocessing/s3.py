"""Changes to S3 by single requests: an object is put whole or not at all, and on wish only if nobody else changed it.

pyarrow uploads in parts, which a killed writer leaves behind to be paid for, and has no conditional requests.
"""

from functools import lru_cache
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import boto3
import pyarrow as pa
import pyarrow.fs
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

_CHANGED = (409, 412)
_RETRIES = Config(connect_timeout=5, read_timeout=30, retries={"mode": "standard", "total_max_attempts": 6})


def put(uri: str, path: str, data: bytes | pa.Buffer) -> None:
    """Put `data` at `path` ("bucket/key") of the storage that `uri` names. Raises OSError after finite retries."""
    _put(uri, path, data, {})


def put_instead(uri: str, path: str, data: bytes, version: str | None) -> bool:
    """`put` over this `version` alone (None: where there is no object); False when there is another by now."""
    return _put(uri, path, data, {"IfMatch": version} if version else {"IfNoneMatch": "*"})


def get(uri: str, path: str) -> tuple[bytes | None, str | None]:
    """The object and its version, (None, None) where there is none. Raises OSError after finite retries."""
    bucket, _, key = path.partition("/")
    try:
        answer = _client(uri).get_object(Bucket=bucket, Key=key)
        return answer["Body"].read(), answer["ETag"]
    except ClientError as error:
        if error.response["Error"].get("Code") == "NoSuchKey":
            return None, None
        raise OSError(str(error)) from error
    except BotoCoreError as error:
        raise OSError(str(error)) from error


def delete(uri: str, path: str) -> None:
    """Remove the object if it is there. Raises OSError after finite retries.

    pyarrow would leave an empty object in place of the "folder" that lost its last file.
    """
    bucket, _, key = path.partition("/")
    try:
        _client(uri).delete_object(Bucket=bucket, Key=key)
    except (ClientError, BotoCoreError) as error:
        raise OSError(str(error)) from error


def _put(uri: str, path: str, data: bytes | pa.Buffer, condition: dict[str, str]) -> bool:
    bucket, _, key = path.partition("/")
    try:
        _client(uri).put_object(Bucket=bucket, Key=key, Body=bytes(data), **condition)
    except ClientError as error:
        if condition and error.response["ResponseMetadata"]["HTTPStatusCode"] in _CHANGED:
            return False
        raise OSError(str(error)) from error
    except BotoCoreError as error:
        raise OSError(str(error)) from error
    return True


@lru_cache
def _client(uri: str) -> Any:
    """boto3's client for what pyarrow understands of an s3:// URI."""
    parts = urlsplit(uri)
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    endpoint, scheme = query.get("endpoint_override"), query.get("scheme", "https")
    filesystem, _ = pyarrow.fs.FileSystem.from_uri(uri)  # it finds out the bucket's region
    return boto3.client(
        "s3",
        region_name=filesystem.region,
        endpoint_url=f"{scheme}://{endpoint.rpartition('://')[2]}" if endpoint else None,
        aws_access_key_id=unquote(parts.username) if parts.username else None,
        aws_secret_access_key=unquote(parts.password) if parts.password else None,
        config=_RETRIES,
    )
