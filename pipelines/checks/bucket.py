"""Whether a bucket can be used: write, read, write only if nobody else has, delete."""

from __future__ import annotations

import uuid

from pipelines.checks.finding import Finding
from preprocessing import s3
from preprocessing.storage import open_folder


def bucket(uri: str) -> Finding:
    """Write, read and delete a small object below `uri`, also on condition.

    Concurrent runs and the retraining's lock rely on conditional writes (If-None-Match, If-Match), which some servers
    accept and ignore.
    """
    if not uri.startswith("s3://"):
        return Finding("S3", "broken", f"--s3 {uri}: expected s3://BUCKET/PREFIX, got another form; correct it")
    folder = open_folder(uri)
    label = folder.label
    name = f".sdan-doctor-{uuid.uuid4().hex[:12]}"
    path = f"{folder.root}/{name}"
    steps = []
    try:
        s3.put(uri, path, b"first")
        steps.append("write")
        if folder.read(name) != b"first":
            return Finding(
                "S3", "broken", f"{label}: expected to read what was written, got other bytes; check the server"
            )
        steps.append("read")
        if s3.put_if_unchanged(uri, path, b"second", None):
            return _unconditional(label, "If-None-Match: *")
        _, version = s3.get(uri, path)
        if not s3.put_if_unchanged(uri, path, b"second", version):
            return Finding("S3", "broken", f"{label}: expected a write with the current version to pass, got a refusal")
        if s3.put_if_unchanged(uri, path, b"third", version):
            return _unconditional(label, "If-Match")
        steps.append("conditional write")
    finally:
        s3.delete(uri, path)
    return Finding("S3", "ok", f"{label}: {', '.join([*steps, 'delete'])}")


def _unconditional(label: str, header: str) -> Finding:
    return Finding(
        "S3",
        "broken",
        f"{label}: expected a refusal of a write on condition ({header}), got none, so two runs could overwrite each "
        "other; use a server with conditional writes (AWS, MinIO, Ceph Squid or later)",
    )


def credentials() -> Finding:
    """Whether AWS credentials are found; nothing is sent."""
    import boto3

    found = boto3.Session().get_credentials()
    if found is None:
        return Finding("S3", "absent", "no credentials; s3:// needs an instance role (or the usual AWS variables)")
    return Finding("S3", "ok", f"credentials from {found.method}; --s3 URI tries a bucket")
