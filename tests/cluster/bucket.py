"""A bucket on a local S3 server at the desk, read and filled from there.

python bucket.py serve IP PORT         the server (moto)
python bucket.py put FOLDER PREFIX     copy a folder into the bucket
python bucket.py get PREFIX FOLDER     copy a prefix of the bucket into a folder
python bucket.py list PREFIX           the keys below a prefix, one a line
"""

import sys
from pathlib import Path

import boto3

NAME, PORT = "cluster-test", 9000
CREDENTIALS = "[default]\naws_access_key_id = testing\naws_secret_access_key = testing\n"


def keys(client, prefix):
    """The keys below a prefix."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=NAME, Prefix=prefix)
    return sorted(entry["Key"] for page in pages for entry in page.get("Contents", []))


def main(action, *arguments):
    """Run one action."""
    if action == "serve":
        from moto.server import main as serve

        serve(["--host", arguments[0], "--port", arguments[1]])
    client = boto3.client("s3", region_name="us-east-1")
    if action == "create":
        client.create_bucket(Bucket=NAME)
    elif action == "put":
        folder, prefix = Path(arguments[0]), arguments[1]
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            client.upload_file(str(path), NAME, f"{prefix}/{path.relative_to(folder)}")
    elif action == "get":
        for key in keys(client, arguments[0]):
            if key.endswith("/"):  # PyArrow marks folders so
                continue
            target = Path(arguments[1]) / key.removeprefix(arguments[0]).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(NAME, key, str(target))
    elif action == "list":
        sys.stdout.write("".join(f"{key}\n" for key in keys(client, arguments[0])))


if __name__ == "__main__":
    main(*sys.argv[1:])
