"""Checks cluster.yaml without AWS: by Ray's validation, which ignores what is in `provider` and `node_config`; by
botocore's model of EC2's RunInstances (`node_config`); and by the tables below (`provider`)."""

import copy
import functools
import json
import re
from importlib.metadata import version
from pathlib import Path

import boto3
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_commands

ROOT = Path(__file__).parents[1]
FILE = ROOT / "cluster.yaml"
PROVIDER_KEYS = {
    "type": str,
    "region": str,
    "availability_zone": str,
    "cache_stopped_nodes": bool,
    "use_internal_ips": bool,
    "security_group": dict,
}
NODE_TYPE_KEYS = {"min_workers", "max_workers", "resources", "node_config", "worker_setup_commands"}


@pytest.fixture
def config():
    return yaml.safe_load(FILE.read_text())


@functools.cache
def ec2():
    """(regions of EC2, input shape of RunInstances), from the data in botocore."""
    session = boto3.session.Session()
    model = session.client("ec2", region_name="us-east-1").meta.service_model
    return session.get_available_regions("ec2"), model.operation_model("RunInstances").input_shape


def problems(config):
    """Errors in the parts of a config that Ray does not validate."""
    found = []
    for key, value in config["provider"].items():
        if key not in PROVIDER_KEYS:
            found.append(f"provider: unknown key {key}")
        elif not isinstance(value, PROVIDER_KEYS[key]):
            found.append(f"provider: {key} is {value!r}")
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


def test_ray_accepts_the_config(config):
    validate_config(prepare_config(config))


def test_every_key_and_value_exists_in_aws(config):
    assert problems(config) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("provider", "regoin"), "us-east-1", "unknown key regoin"),
        (("provider", "cache_stopped_nodes"), "no", "cache_stopped_nodes is 'no'"),
        (("provider", "region"), "us-esat-1", "no region us-esat-1"),
        (("available_node_types", "gpu_worker", "node_config", "InstanceTyp"), "g5.2xlarge", "InstanceTyp"),
        (("available_node_types", "gpu_worker", "node_config", "InstanceType"), "g5.2xlrage", "'g5.2xlrage'"),
        (("available_node_types", "head", "node_config", "IamInstanceProfile"), "sdan-head", "IamInstanceProfile"),
        (("available_node_types", "head", "node_config", "MetadataOptions"), {"HttpToken": "required"}, "HttpToken"),
        (("available_node_types", "head", "node_config", "MetadataOptions"), {"HttpTokens": "yes"}, "HttpTokens is"),
        (("available_node_types", "head", "node_config", "BlockDeviceMappings", 0, "Ebs"), {"VolumeSize": "1"}, "Size"),
        (("available_node_types", "cpu_worker", "max_worker"), 3, "unknown key max_worker"),
    ],
)
def test_typos_that_ray_does_not_check_are_found(config, path, value, message):
    broken = copy.deepcopy(config)
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert any(message in problem for problem in problems(broken)), problems(broken)


def test_the_config_contains_no_secret():
    text = FILE.read_text()
    assert not re.search(r"AKIA|ASIA|aws_(access|secret)|BEGIN [A-Z ]*PRIVATE KEY|password", text, re.IGNORECASE)
    assert not re.search(r"\b[0-9a-zA-Z/+]{40,}\b", text)
    assert not re.search(r"\b\d{12}\b", text.replace("0" * 17, "")), "an AWS account number?"


def test_nodes_install_the_tested_versions(config):
    install = [command for command in config["setup_commands"] if "pip install" in command]
    assert len(install) == 1 and "--constraint constraints.txt" in install[0]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert pins["ray"] == version("ray"), "cluster.yaml was validated with another Ray than the nodes will run"
    assert config["file_mounts"]["~/sdan"] == "." and "~/sdan" in install[0]
    assert "'.[train]'" in install[0], "nodes need Ray and MLflow"


def test_data_and_caches_are_not_copied_to_nodes(config):
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line]
    patterns = {pattern.removeprefix("**/") for pattern in config["rsync_exclude"]}
    assert {".git", ".venv", "data"} <= patterns
    assert set(ignored) - {"build"} <= patterns


def test_no_port_is_open_to_the_internet(config):
    head, worker = (" ".join(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert re.findall(r"--dashboard-host[= ](\S+)", head) == ["127.0.0.1"]
    assert "0.0.0.0" not in FILE.read_text() and "::/0" not in FILE.read_text()
    assert all("RAY_AUTH_MODE=token" in command for command in (head, worker))
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert all("ingress" not in key.lower() for key in config["provider"])


def test_the_cluster_page_has_valid_policies_and_commands():
    page = (ROOT / "docs" / "cluster.md").read_text()
    policies = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
    assert len(policies) == 2 and all(policy["Version"] == "2012-10-17" for policy in policies)
    named = set(re.findall(r"\bray ([a-z][a-z-]+)", " ".join(re.findall(r"`+([^`]+)`+", page))))
    assert named >= {"up", "down", "attach", "dashboard", "job", "get-head-ip", "get-auth-token"}
    assert named <= set(ray_commands.commands)


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
    assert sum(node["max_workers"] for node in workers.values()) <= config["max_workers"]
