"""Attaches an EBS volume to this instance and mounts it; formats it only if it holds no file system.

    sudo ~/venv/bin/python deploy/aws/volume.py vol-0123... /srv/mlflow --owner ubuntu

Run at each `ray up`: what is done already is left as it is. MLflow's database lies there and outlives the head.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

METADATA = "http://169.254.169.254/latest"
WAIT_S = 300.0
"""How long an earlier head may take to let the volume go, and this one to see it."""
DEVICE = "/dev/sdf"
"""The name that EC2 asks for; on today's instances the device has another (`by_id`)."""


class VolumeError(RuntimeError):
    """The volume cannot be used; the message says what to do."""


def metadata(path: str) -> str:
    """One value of the instance's metadata (IMDSv2)."""
    ask = urllib.request.Request(
        f"{METADATA}/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )
    with urllib.request.urlopen(ask, timeout=5) as reply:
        token = reply.read().decode()
    get = urllib.request.Request(f"{METADATA}/meta-data/{path}", headers={"X-aws-ec2-metadata-token": token})
    with urllib.request.urlopen(get, timeout=5) as reply:
        return str(reply.read().decode())


def attach(ec2: Any, volume: str, instance: str, *, wait_s: float = WAIT_S) -> None:
    """Attach the volume to the instance, and wait until it is. A head that is being terminated may still hold it.

    Args:
        ec2: boto3's EC2 client.

    Raises:
        VolumeError: another instance keeps it.
    """
    end = time.monotonic() + wait_s
    while True:
        state = ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]
        holders = {held["InstanceId"]: held["State"] for held in state["Attachments"]}
        if holders.get(instance) == "attached":
            return
        if not holders:
            ec2.attach_volume(VolumeId=volume, InstanceId=instance, Device=DEVICE)
        elif time.monotonic() > end:
            raise VolumeError(
                f"{volume}: expected it free or attached to {instance}, got {holders}; terminate that instance, or "
                "detach the volume from it"
            )
        time.sleep(1)


def by_id(volume: str) -> Path:
    """The device of a volume on instances with NVMe disks."""
    return Path("/dev/disk/by-id") / f"nvme-Amazon_Elastic_Block_Store_{volume.replace('-', '')}"


def mount(device: Path, folder: Path, owner: str) -> None:
    """Mount the device at the folder, now and after a reboot; a device without a file system gets ext4 first."""
    if not os.path.ismount(folder):
        # blkid: 0, it found a file system or a partition table; 2, nothing that it knows; else an error
        found = subprocess.run(["blkid", "--probe", str(device)], capture_output=True, text=True)
        if found.returncode == 2:
            subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(device)], check=True)
        elif found.returncode:
            raise VolumeError(
                f"{device}: expected to read it, got {found.stderr.strip() or found.returncode}; see `lsblk`"
            )
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", str(device), str(folder)], check=True)
    line = f"{device} {folder} ext4 defaults,nofail 0 2\n"
    table = Path("/etc/fstab")
    if line not in table.read_text():
        with table.open("a") as entries:
            entries.write(line)
    shutil.chown(folder, owner, owner)


def main() -> None:
    """Attach and mount."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", help="vol-...")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--owner", required=True, help="user who gets the folder")
    options = parser.parse_args()
    import boto3

    ec2 = boto3.client("ec2", region_name=metadata("placement/region"))
    try:
        attach(ec2, options.volume, metadata("instance-id"))
        device, end = by_id(options.volume), time.monotonic() + WAIT_S
        while not device.exists():
            if time.monotonic() > end:
                raise VolumeError(
                    f"{device}: expected it {WAIT_S:.0f} s after the volume was attached, got nothing; see `lsblk`"
                )
            time.sleep(1)
        mount(device, options.folder, options.owner)
    except VolumeError as error:
        sys.exit(f"volume: {error}")


if __name__ == "__main__":
    main()
