"""Checks deploy/ without AWS or systemd as far as that goes: the units (by systemd itself where it is installed), the
scripts that they run, the policies, and the volume of MLflow's database (botocore's stub, and a file as the
disk)."""

import configparser
import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import boto3
import pytest
import yaml
from botocore.stub import Stubber

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNITS = DEPLOY / "systemd"
POLICIES = sorted((DEPLOY / "aws").glob("*-policy.json"))


def unit(name):
    """A unit's sections."""
    parser = configparser.RawConfigParser(strict=True)
    parser.optionxform = str
    parser.read_string((UNITS / name).read_text())
    return parser


@pytest.fixture(scope="module")
def volume():
    """deploy/aws/volume.py as a module."""
    spec = importlib.util.spec_from_file_location("volume", DEPLOY / "aws" / "volume.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def home(tmp_path):
    """A home directory with a `ray` and a `mlflow` that print how they were called."""
    commands = tmp_path / "venv" / "bin"
    commands.mkdir(parents=True)
    for name in ("ray", "mlflow"):
        (commands / name).write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@"\n')
        (commands / name).chmod(0o755)
    return tmp_path


def run(script, home, **settings):
    """Run a script of deploy/ with that home."""
    env = {"HOME": str(home), "PATH": os.environ["PATH"], "SDAN_BUCKET": "s3://b"} | settings
    return subprocess.run(["bash", str(DEPLOY / script)], env=env, capture_output=True, text=True, timeout=60)


def test_units_restart_the_server_and_catch_up_missed_nights():
    server = unit("sdan-mlflow.service")
    assert server["Service"]["Restart"] == "always" and server["Unit"]["StartLimitIntervalSec"] == "0"
    timer, job = unit("sdan-retrain.timer"), unit("sdan-retrain.service")
    assert timer["Timer"]["Persistent"] == "true" and timer["Timer"]["OnCalendar"].endswith(" UTC")
    assert job["Service"]["Type"] == "oneshot"
    for service in (server, job):
        script = ROOT / service["Service"]["ExecStart"].removeprefix("%h/sdan/")
        assert os.access(script, os.X_OK), script
        assert service["Service"]["EnvironmentFile"] == "%h/sdan.env"


def test_systemd_accepts_the_units(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    for path in UNITS.glob("sdan-*"):
        # The scripts are not in this home; systemd checks that commands exist.
        text = path.read_text().replace("%h/sdan/", f"{ROOT}/")
        (tmp_path / path.name).write_text(text)
    names = [str(path) for path in sorted(tmp_path.iterdir())]
    done = subprocess.run(["systemd-analyze", "--user", "verify", *names], capture_output=True, text=True, timeout=60)
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "sdan-" in line]
    assert said == [], done.stderr
    when = unit("sdan-retrain.timer")["Timer"]["OnCalendar"]
    assert subprocess.run(["systemd-analyze", "calendar", when], capture_output=True, timeout=60).returncode == 0


def test_the_install_script_installs_every_unit():
    text = (UNITS / "install.sh").read_text()
    assert "cp ./*.service ./*.timer" in text and "enable-linger" in text
    (enabled,) = re.findall(r"systemctl --user enable --quiet (.+)", text)
    wanted = {path.name for path in UNITS.glob("sdan-*") if unit(path.name).has_section("Install")}
    assert set(enabled.split()) == wanted == {"sdan-mlflow.service", "sdan-retrain.timer"}


@pytest.mark.parametrize("script", sorted(path.name for path in DEPLOY.rglob("*.sh")))
def test_scripts_parse_and_stop_at_errors(script):
    (path,) = DEPLOY.rglob(script)
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    assert "set -euo pipefail" in path.read_text() and os.access(path, os.X_OK)


def test_mlflow_keeps_artifacts_in_s3_and_its_port_private(home):
    done = run("mlflow.sh", home)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said.index("upgrade") < said.index("server"), "the database is made before the server's processes need it"
    assert said[said.index("--workers") + 1] == "1", "several kill each other on a busy machine"
    assert said[said.index("--artifacts-destination") + 1] == "s3://b/mlartifacts"
    assert said[said.index("--backend-store-uri") + 1] == f"sqlite:///{home}/mlflow/mlflow.db"
    host = said[said.index("--host") + 1]
    assert host not in ("0.0.0.0", "::") and f"{host}:5000" in said[said.index("--allowed-hosts") + 1].split(",")


def test_mlflow_does_not_start_beside_its_volume(home):
    folder = home / "volume"
    folder.mkdir()
    done = run("mlflow.sh", home, SDAN_MLFLOW_VOLUME="vol-1", SDAN_MLFLOW_FOLDER=str(folder))
    assert done.returncode == 2 and "expected the mounted volume vol-1" in done.stderr
    assert list(folder.iterdir()) == []


def test_a_second_retraining_leaves_with_0(home):
    first = run("retrain.sh", home, SDAN_RETRAIN_OPTIONS="--align ecc")
    assert "~/venv/bin/sdan --data ~/data retrain s3://b/raw s3://b/shards --align ecc" in first.stdout
    with (home / ".sdan-retrain.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = run("retrain.sh", home)
    assert second.returncode == 0 and "another run holds" in second.stdout and "submit" not in second.stdout


def test_settings_of_the_config_are_those_that_scripts_read():
    text = yaml.safe_load((ROOT / "cluster.yaml").read_text())["metadata"]["settings"]
    given = set(re.findall(r"^(SDAN_\w+)=", text, re.MULTILINE))
    scripts = [path.read_text() for path in DEPLOY.rglob("*.sh")] + [(ROOT / "cluster.yaml").read_text()]
    read = {name for script in scripts for name in re.findall(r"\$\{?(SDAN_\w+)", script)}
    assert given == read


def statements(path):
    """A policy's statements."""
    policy = json.loads(path.read_text())
    assert policy["Version"] == "2012-10-17"
    return policy["Statement"]


def listed(value):
    """A policy's value as a list."""
    return [value] if isinstance(value, str) else value


@pytest.mark.parametrize(
    "path", [path for path in POLICIES if path.name != "trust-policy.json"], ids=lambda path: path.stem
)
def test_policies_grant_single_actions_on_named_things(path):
    for statement in statements(path):
        actions, resources = listed(statement["Action"]), listed(statement["Resource"])
        assert not any("*" in action for action in actions), "no wildcard in an action"
        if "*" in resources:
            assert all(action.startswith("ec2:Describe") for action in actions), "AWS can restrict the rest"
        # Changing an instance needs the cluster's tag, or the act of launching it.
        if any(action in ("ec2:TerminateInstances", "ec2:CreateTags") for action in actions):
            assert statement["Condition"], statement["Sid"]
        if "iam:PassRole" in actions:
            assert statement["Condition"]["StringEquals"] == {"iam:PassedToService": "ec2.amazonaws.com"}
            assert all(re.fullmatch(r"arn:aws:iam::ACCOUNT:role/sdan-(head|worker)", role) for role in resources)


def test_workers_cannot_launch_machines():
    (worker,) = [path for path in POLICIES if path.name == "worker-policy.json"]
    actions = {action for statement in statements(worker) for action in listed(statement["Action"])}
    assert all(action.startswith("s3:") for action in actions)
    assert {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket"} <= actions


def test_policies_name_the_cluster_and_profiles_of_the_config():
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    profiles = {node["node_config"]["IamInstanceProfile"]["Name"] for node in config["available_node_types"].values()}
    assert profiles == {"sdan-head", "sdan-worker"}
    for path in POLICIES:
        tags = re.findall(r'Tag/ray-cluster-name": "(\w+)"', path.read_text())
        assert set(tags) <= {config["cluster_name"]}


def test_the_volume_is_attached_once_and_never_taken(volume):
    ec2 = boto3.client("ec2", region_name="us-east-1", aws_access_key_id="testing", aws_secret_access_key="testing")
    made, mine = "vol-0abc", {"VolumeId": "vol-0abc", "InstanceId": "i-1"}

    def described(*attachments):
        """The answer of DescribeVolumes."""
        return {"Volumes": [{"VolumeId": made, "Attachments": list(attachments)}]}

    with Stubber(ec2) as answers:  # also checks every request against botocore's model of EC2
        for state in (None, "attaching", "attached"):
            answers.add_response("describe_volumes", described(*([mine | {"State": state}] if state else [])))
            if state is None:
                answers.add_response("attach_volume", {"State": "attaching"}, mine | {"Device": volume.DEVICE})
        volume.attach(ec2, made, "i-1", wait_s=30)
        answers.assert_no_pending_responses()
        answers.add_response("describe_volumes", described({"InstanceId": "i-2", "State": "attached"}))
        with pytest.raises(volume.VolumeError, match=r"vol-0abc: expected it free or attached to i-1, got {'i-2'"):
            volume.attach(ec2, made, "i-1", wait_s=0)
    assert str(volume.by_id("vol-0abc")) == "/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0abc"


def test_the_volume_is_formatted_once(tmp_path):
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
        pytest.skip("mounting needs root and mkfs.ext4")
    disk, folder, table = tmp_path / "disk", tmp_path / "folder", tmp_path / "fstab"
    disk.touch()
    os.truncate(disk, 16 * 2**20)
    table.touch()
    # In a mount namespace of its own, with a file as the disk and as /etc/fstab.
    program = f"""
import importlib.util, pathlib, subprocess
spec = importlib.util.spec_from_file_location("volume", {str(DEPLOY / "aws" / "volume.py")!r})
volume = importlib.util.module_from_spec(spec)
spec.loader.exec_module(volume)
disk, folder = pathlib.Path({str(disk)!r}), pathlib.Path({str(folder)!r})
volume.mount(disk, folder, "root")
(folder / "mlflow.db").write_text("kept")
volume.mount(disk, folder, "root")
subprocess.run(["umount", str(folder)], check=True)
volume.mount(disk, folder, "root")
assert (folder / "mlflow.db").read_text() == "kept"
subprocess.run(["umount", str(folder)], check=True)
"""
    inside = f'mount --make-rprivate / && mount --bind {table} /etc/fstab && exec python3 -c "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", inside, "bash", program], capture_output=True, text=True, timeout=60
    )
    if "mount failed" in done.stderr or "loop device" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip(f"this machine cannot mount a file: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert table.read_text() == f"{disk} {folder} ext4 defaults,nofail 0 2\n"
