"""Checks cluster.yaml and cluster-local.yaml without machines: by Ray's validation, which ignores what is in `provider`
and `node_config`; by botocore's model of EC2's RunInstances (`node_config`); by the tables below (`provider`); and by
the scheduler of Ray's autoscaler (spot before on demand)."""

import copy
import functools
import os
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import boto3
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import fillout_defaults, prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.scripts.scripts import cli as ray_commands

ROOT = Path(__file__).parents[1]
FILE = ROOT / "cluster.yaml"
LOCAL = ROOT / "cluster-local.yaml"
PROVIDER_KEYS = {
    "type": str,
    "region": str,
    "availability_zone": str,
    "cache_stopped_nodes": bool,
    "use_internal_ips": bool,
    "security_group": dict,
}
LOCAL_PROVIDER_KEYS = {"type": str, "head_ip": str, "worker_ips": list, "external_head_ip": str}
NODE_TYPE_KEYS = {"min_workers", "max_workers", "priority", "resources", "node_config", "worker_setup_commands"}


@pytest.fixture
def config():
    return yaml.safe_load(FILE.read_text())


@pytest.fixture
def local():
    return yaml.safe_load(LOCAL.read_text())


@functools.cache
def ec2():
    """(regions of EC2, input shape of RunInstances), from the data in botocore."""
    session = boto3.session.Session()
    model = session.client("ec2", region_name="us-east-1").meta.service_model
    return session.get_available_regions("ec2"), model.operation_model("RunInstances").input_shape


def provider_problems(config, known):
    """Unknown keys and types in a config's `provider`."""
    found = [f"provider: unknown key {key}" for key in config["provider"] if key not in known]
    return found + [
        f"provider: {key} is {value!r}"
        for key, value in config["provider"].items()
        if key in known and not isinstance(value, known[key])
    ]


def problems(config):
    """Errors in the parts of a config that Ray does not validate."""
    found = provider_problems(config, PROVIDER_KEYS)
    regions, shape = ec2()
    region = config["provider"]["region"]
    if region not in regions:
        found.append(f"provider: no region {region}")
    for zone in config["provider"]["availability_zone"].split(","):
        if not re.fullmatch(rf"{region}[a-z]", zone):
            found.append(f"provider: zone {zone} is not in {region}")
    for name, node_type in config["available_node_types"].items():
        found += [f"{name}: unknown key {key}" for key in sorted(set(node_type) - NODE_TYPE_KEYS)]
        node = node_type["node_config"]
        report = ParamValidator().validate({**node, "MinCount": 1, "MaxCount": 1}, shape)
        if report.has_errors():
            found.append(f"{name}: {report.generate_report()}")
        found += [f"{name}: {wrong}" for wrong in wrong_values(node, shape)]
    return found


def wrong_values(params, shape, path="node_config"):
    """Values outside EC2's enumerations, which ParamValidator does not check."""
    if shape.type_name == "structure" and isinstance(params, dict):
        return [
            wrong
            for key, value in params.items()
            if key in shape.members
            for wrong in wrong_values(value, shape.members[key], f"{path}.{key}")
        ]
    if shape.type_name == "list" and isinstance(params, list):
        return [wrong for value in params for wrong in wrong_values(value, shape.member, path)]
    allowed = getattr(shape, "enum", [])
    return [f"{path} is {params!r}"] if allowed and params not in allowed else []


@pytest.mark.parametrize("file", [FILE, LOCAL], ids=["aws", "local"])
def test_ray_accepts_the_config(file):
    validate_config(prepare_config(yaml.safe_load(file.read_text())))


def test_every_key_of_the_local_provider_exists(local):
    assert provider_problems(local, LOCAL_PROVIDER_KEYS) == []
    typo = local | {"provider": {"type": "local", "head_ips": "10.0.0.1", "worker_ips": "10.0.0.2"}}
    assert len(provider_problems(typo, LOCAL_PROVIDER_KEYS)) == 2


@pytest.mark.parametrize("file", [FILE, LOCAL], ids=["aws", "local"])
def test_every_value_to_change_is_at_the_top(file):
    lines = file.read_text().splitlines()
    last = max(number for number, line in enumerate(lines) if "CHANGE" in line)
    assert last < 45, lines[last]
    below = "\n".join(lines[last + 10 :])
    assert not re.search(r"0{8}|us-east|192\.168|BUCKET|example\.org|ami-|vol-", re.sub(r"sg-0+", "", below))


def test_every_key_and_value_exists_in_aws(config):
    assert problems(config) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("provider", "regoin"), "us-east-1", "unknown key regoin"),
        (("provider", "cache_stopped_nodes"), "no", "cache_stopped_nodes is 'no'"),
        (("provider", "region"), "us-esat-1", "no region us-esat-1"),
        (("available_node_types", "gpu_spot", "node_config", "InstanceTyp"), "g5.2xlarge", "InstanceTyp"),
        (("available_node_types", "gpu_spot", "node_config", "InstanceType"), "g5.2xlrage", "'g5.2xlrage'"),
        (("available_node_types", "head", "node_config", "IamInstanceProfile"), "sdan-head", "IamInstanceProfile"),
        (("available_node_types", "head", "node_config", "MetadataOptions"), {"HttpToken": "required"}, "HttpToken"),
        (("available_node_types", "head", "node_config", "MetadataOptions"), {"HttpTokens": "yes"}, "HttpTokens is"),
        (("available_node_types", "head", "node_config", "BlockDeviceMappings", 0, "Ebs"), {"VolumeSize": "1"}, "Size"),
        (("available_node_types", "cpu_spot", "max_worker"), 3, "unknown key max_worker"),
    ],
)
def test_typos_that_ray_does_not_check_are_found(config, path, value, message):
    broken = copy.deepcopy(config)
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert any(message in problem for problem in problems(broken)), problems(broken)


@pytest.mark.parametrize("file", [FILE, LOCAL], ids=["aws", "local"])
def test_the_config_contains_no_secret(file):
    text = file.read_text()
    assert not re.search(r"AKIA|ASIA|aws_(access|secret)|BEGIN [A-Z ]*PRIVATE KEY|password", text, re.IGNORECASE)
    text = re.sub("0{17,40}", "", text)
    assert not re.search(r"\b[0-9a-zA-Z/+]{40,}\b", text)
    assert not re.search(r"\b\d{12}\b", text), "an AWS account number?"


@pytest.mark.parametrize("file", [FILE, LOCAL], ids=["aws", "local"])
def test_nodes_run_a_commit_with_the_tested_versions(file):
    config = yaml.safe_load(file.read_text())
    commands = config["setup_commands"]
    (install,) = [command for command in commands if "pip install" in command]
    assert "cd ~/sdan &&" in install and "--constraint constraints.txt" in install and "'.[train]'" in install
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert pins["ray"] == version("ray"), "the file was validated with another Ray than the nodes will run"
    (clone,) = [command for command in commands if "git clone" in command]
    assert commands.index(clone) < commands.index(install)
    assert 'git checkout --quiet --force --detach "$SDAN_COMMIT"' in clone
    # The settings reach the nodes as a here-document: its end must be a line of its own.
    assert commands[0] == config["metadata"]["settings"] and commands[0].endswith("\nEND\n")
    assert set(config["file_mounts"]) == {"~/.ray/auth_token"}, "nothing that lies in the folder is copied"


@pytest.mark.parametrize("file", [FILE, LOCAL], ids=["aws", "local"])
def test_no_port_is_open_to_the_internet(file):
    config = yaml.safe_load(file.read_text())
    head, worker = (" ".join(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert re.findall(r"--dashboard-host[= ](\S+)", head) == ["127.0.0.1"]
    assert "0.0.0.0" not in file.read_text() and "::/0" not in file.read_text()
    assert all("RAY_AUTH_MODE=token" in command for command in (head, worker))
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert all("ingress" not in key.lower() for key in config["provider"])


@pytest.mark.parametrize(("failures", "code", "starts"), [(0, 0, 1), (2, 0, 3), (9, 1, 4)])
def test_a_failed_start_of_a_worker_is_repeated(tmp_path, failures, code, starts):
    (_, start) = yaml.safe_load(LOCAL.read_text())["worker_start_ray_commands"]
    (tmp_path / "sdan.env").write_text("SDAN_BUCKET=s3://b\n")
    ray = tmp_path / "venv" / "bin" / "ray"
    ray.parent.mkdir(parents=True)
    ray.write_text(
        '#!/bin/sh\necho "$1 $RAY_AUTH_MODE $SDAN_BUCKET" >> ~/calls\n'
        f'test "$1" != start || test $(grep -c start ~/calls) -gt {failures}\n'
    )
    ray.chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "RAY_HEAD_IP": "10.0.0.1"}
    assert subprocess.run(["bash", "-c", start], env=environment, timeout=30).returncode == code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [line for line in calls if "start" in line] == ["start token s3://b"] * starts
    assert len(calls) == starts + min(failures, starts), "what a failed start left is stopped"


def test_the_cluster_page_names_commands_that_exist():
    page = (ROOT / "docs" / "cluster.md").read_text()
    named = set(re.findall(r"\bray ([a-z][a-z-]+)", " ".join(re.findall(r"`+([^`]+)`+", page))))
    assert named >= {"up", "down", "attach", "dashboard", "job", "get-head-ip", "get-auth-token"}
    assert named <= set(ray_commands.commands)


@functools.cache
def node_types():
    """The worker types of cluster.yaml as Ray's autoscaler sees them: with the resources of their machines."""
    config = yaml.safe_load(FILE.read_text())
    for name, node_type in config["available_node_types"].items():
        node_type["resources"] = {"CPU": 8, "GPU": 1} if name.startswith("gpu") else {"CPU": 16}
    types = AutoscalingConfig(fillout_defaults(prepare_config(config)), skip_content_hash=True).get_node_type_configs()
    return {name: node_type for name, node_type in types.items() if name != config["head_node_type"]}


def launched(demand, availability):
    """The node types that Ray's autoscaler launches for one task.

    Args:
        availability: node type -> 0 (its last launch failed) to 1.
    """
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=node_types(),
        max_num_nodes=8,
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(demand)]),
        cloud_resource_availabilities=availability,
        recoverable_resource_availabilities=availability,
    )
    return [launch.instance_type for launch in ResourceDemandScheduler(None).schedule(request).to_launch]


@pytest.mark.parametrize(("kind", "demand"), [("gpu", {"GPU": 1, "CPU": 1}), ("cpu", {"CPU": 16})])
def test_on_demand_machines_follow_where_there_are_no_spots(kind, demand):
    assert launched(demand, {}) == [f"{kind}_spot"]
    assert launched(demand, {f"{kind}_spot": 0.0}) == [f"{kind}_on_demand"]
    assert launched(demand, {f"{kind}_spot": 1.0, f"{kind}_on_demand": 1.0}) == [f"{kind}_spot"]


def test_spot_and_on_demand_types_are_the_same_machine(config):
    types = config["available_node_types"]
    for kind in ("gpu", "cpu"):
        spot, on_demand = types[f"{kind}_spot"]["node_config"], types[f"{kind}_on_demand"]["node_config"]
        assert {key: value for key, value in spot.items() if key != "InstanceMarketOptions"} == on_demand
        assert types[f"{kind}_spot"]["priority"] > types[f"{kind}_on_demand"]["priority"]


def test_nodes_have_a_role_and_encrypted_disks(config):
    for node_type in config["available_node_types"].values():
        node = node_type["node_config"]
        assert node["IamInstanceProfile"].keys() == {"Name"}
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])


def test_idle_workers_stop_and_the_head_has_trial_slots(config):
    assert 0 < config["idle_timeout_minutes"] <= 30
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["trial_slot"] >= 1
    workers = {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}
    assert workers and all(node["min_workers"] == 0 for node in workers.values())
    assert all(node["max_workers"] <= config["max_workers"] for node in workers.values())
