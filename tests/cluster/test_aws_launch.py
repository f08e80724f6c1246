"""`ray up cluster.yaml` against moto's EC2 until the head runs. The desk reaches no address outside the lab, so Ray's
ssh to the made-up public address of that head goes nowhere."""

import base64
import json
import re
import shlex
import sys
from urllib.parse import parse_qs

import pytest
import yaml
from lab import DESK_IP, ROOT, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]
PORT = 9100
WAIT_S = 600.0
"""For what takes under a minute alone on two cores."""
ENDPOINT = f"http://{DESK_IP}:{PORT}"
KEYS = (
    f"AWS_ENDPOINT_URL={ENDPOINT} AWS_ACCESS_KEY_ID=testing AWS_SECRET_ACCESS_KEY=testing AWS_DEFAULT_REGION=us-east-1"
)
PATH = f"PATH={sys.exec_prefix}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
IMAGE = "ami-00000000000000000"
PREPARE = """
import sys, pathlib, boto3
folder, iam = pathlib.Path(sys.argv[1]), boto3.client("iam")
for role in ("sdan-head", "sdan-worker"):
    iam.create_role(RoleName=role, AssumeRolePolicyDocument=(folder / "trust-policy.json").read_text())
    iam.create_instance_profile(InstanceProfileName=role)
    iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
    iam.put_role_policy(RoleName=role, PolicyName="bucket", PolicyDocument=(folder / "worker-policy.json").read_text())
machines = (folder / "head-policy.json").read_text()
iam.put_role_policy(RoleName="sdan-head", PolicyName="machines", PolicyDocument=machines)
launch = (folder / "launch-policy.json").read_text()
iam.create_policy(PolicyName="launch", PolicyDocument=launch)
print(boto3.client("ec2").describe_images()["Images"][0]["ImageId"])
"""
"""The steps of docs/cluster.md; moto checks the syntax of the policies. Prints the id of an image that moto has."""


def allowed(policy):
    """The actions that a policy of deploy/aws/ allows."""
    listed = [one["Action"] for one in json.loads((ROOT / "deploy" / "aws" / policy).read_text())["Statement"]]
    return {action for one in listed for action in ([one] if isinstance(one, str) else one)}


def actions(recording):
    """The EC2 actions in moto's recording."""
    found = set()
    for line in recording.read_text().splitlines():
        body = json.loads(line)["body"]
        text = base64.b64decode(body).decode() if re.fullmatch(r"[A-Za-z0-9+/=]+", body) else body
        found |= {f"ec2:{name}" for name in parse_qs(text).get("Action", [])}
    return found


def heads(lab):
    """The machines that moto runs, as EC2's JSON."""
    code = (
        "import boto3, json; print(json.dumps(boto3.client('ec2').describe_instances()['Reservations'], default=str))"
    )
    reservations = json.loads(lab.desk.run(f'{KEYS} {sys.executable} -c "{code}"'))
    return [one for reservation in reservations for one in reservation["Instances"]]


def test_ray_up_launches_the_head_within_its_policy(lab):
    log = "MOTO_ENABLE_RECORDING=True MOTO_RECORDER_FILEPATH=recording.txt MOTO_IAM_LOAD_MANAGED_POLICIES=true"
    lab.desk.serve(f"env {log} {PATH} moto_server --host {DESK_IP} --port {PORT}", "moto-ec2.txt")
    wait_for(lambda: lab.desk.answers(f"{ENDPOINT}/moto-api/"), WAIT_S, "moto")
    policies = ROOT / "deploy" / "aws"
    image = lab.desk.run(f"{KEYS} {sys.executable} -c {shlex.quote(PREPARE)} {policies}", timeout=300).strip()
    text = (ROOT / "cluster.yaml").read_text()
    assert text.count(IMAGE) == 1
    (lab.desk.home / "cluster.yaml").write_text(text.replace(IMAGE, image))
    lab.desk.run("mkdir -p .ray && test -f .ray/auth_token || echo 0123 > .ray/auth_token")
    (lab.desk.home / "recording.txt").write_text("")
    up = lab.desk.serve(f"env {KEYS} {PATH} ray up -y --no-config-cache cluster.yaml", "ray-up-aws.txt")
    try:
        wait_for(
            lambda: any(one["State"]["Name"] == "running" for one in heads(lab)) or up.poll() is not None,
            WAIT_S,
            "the head",
        )
        said = lab.desk.folder / "ray-up-aws.txt"
        wait_for(lambda: "Waiting for SSH" in said.read_text() or up.poll() is not None, WAIT_S, "the head's ssh")
        assert up.poll() is None, said.read_text()[-3000:]
    finally:
        up.kill()
        lab.desk.run("pkill -f '[r]ay up'")  # nsenter's end does not end what it started
    (head,) = heads(lab)
    assert head["InstanceType"] == "m6i.2xlarge" and head["ImageId"] == image
    tags = {tag["Key"]: tag["Value"] for tag in head["Tags"]}
    name = yaml.safe_load(text)["cluster_name"]
    assert tags["ray-cluster-name"] == name, "the policies' conditions ask for this tag"
    used = actions(lab.desk.home / "recording.txt")
    assert "ec2:RunInstances" in used and used <= allowed("launch-policy.json"), used - allowed("launch-policy.json")
