"""Checks the manifests in k8s/ without Kubernetes: by the schemas of kuberay_schema.py, and by the code with which
Ray's autoscaler reads a RayCluster. Whether KubeRay accepts them was not tried."""

import copy
import re
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
import yaml
from kuberay_schema import KINDS
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as autoscaling_config,
)
from typer.main import get_command

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "k8s").glob("*.yaml"))


def manifests(file):
    """The manifests of a file."""
    return list(yaml.safe_load_all((ROOT / "k8s" / file).read_text()))


def problems(manifest):
    """What is wrong with a manifest, by its schema."""
    found = jsonschema.Draft202012Validator(KINDS[manifest["kind"]]).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in found]


def cluster_spec(manifest):
    """The RayCluster's spec in any of KubeRay's kinds."""
    spec = manifest["spec"].get("jobTemplate", manifest["spec"])
    return spec.get("rayClusterSpec", spec)


def ray_manifests():
    """Every manifest of KubeRay's kinds."""
    return [one for file in FILES for one in manifests(file.name) if one["apiVersion"] == "ray.io/v1"]


@pytest.mark.parametrize("file", [file.name for file in FILES])
def test_manifests_have_only_known_keys_and_values(file):
    assert [problems(manifest) for manifest in manifests(file)] == [[]] * len(manifests(file))


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        ("ray-cluster.yaml", ("spec", "headGroupSpecs"), {}, "headGroupSpecs"),
        ("ray-cluster.yaml", ("spec", "workerGroupSpecs", 0, "maxReplica"), 3, "maxReplica"),
        ("ray-cluster.yaml", ("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 4, "is not of type 'string'"),
        ("ray-cluster.yaml", ("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "img"), "x", "img"),
        ("ray-cluster.yaml", ("spec", "authOptions", "mode"), "tokens", "tokens"),
        ("ray-job.yaml", ("spec", "entryPoint"), "sdan", "entryPoint"),
        ("ray-job.yaml", ("apiVersion",), "ray.io/v1alpha1", "ray.io/v1"),
        ("ray-cron-job.yaml", ("spec", "schedule"), "2 in the night", "2 in the night"),
        ("ray-cron-job.yaml", ("spec", "concurrencyPolicy"), "Forbid", "concurrencyPolicy"),
    ],
)
def test_typos_are_found(file, path, value, message):
    broken = place = copy.deepcopy(manifests(file)[0])
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert any(message in problem for problem in problems(broken)), problems(broken)


def test_rays_autoscaler_understands_the_clusters():
    for manifest in ray_manifests():
        found = autoscaling_config({"metadata": {"name": "x", "namespace": "y"}, "spec": cluster_spec(manifest)})
        types = found["available_node_types"]
        assert types["gpu"]["resources"]["GPU"] == 1 and "GPU" not in types["cpu"]["resources"]
        assert types["gpu"]["max_workers"] > types["gpu"]["min_workers"]
        # Training takes the GPUs that are there when it starts; a job's cluster exists for that job alone.
        assert types["gpu"]["min_workers"] == (0 if manifest["kind"] == "RayCluster" else 1)
    (standing,) = manifests("ray-cluster.yaml")
    head = autoscaling_config(standing | {"metadata": {"name": "x", "namespace": "y"}})["available_node_types"][
        "headgroup"
    ]
    assert head["resources"]["trial_slot"] >= 1


def test_clusters_run_the_tested_ray_with_tokens():
    assert len(ray_manifests()) == 3
    for manifest in ray_manifests():
        spec = cluster_spec(manifest)
        assert spec["rayVersion"] == version("ray")
        assert spec["authOptions"] == {"mode": "token"} and spec["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_every_pod_runs_the_image_to_change_without_root():
    for manifest in ray_manifests():
        spec = cluster_spec(manifest)
        image = manifest["metadata"]["annotations"]["sdan/image"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            assert [container["image"] for container in pod["containers"]] == [image]
            assert pod["securityContext"]["runAsNonRoot"]


def test_volumes_settings_and_accounts_exist():
    everything = [one for file in FILES for one in manifests(file.name)]
    names = {(one["kind"], one["metadata"]["name"]) for one in everything}
    pods = [group["template"]["spec"] for one in ray_manifests() for group in cluster_spec(one)["workerGroupSpecs"]]
    pods += [cluster_spec(one)["headGroupSpec"]["template"]["spec"] for one in ray_manifests()]
    pods += [one["spec"]["template"]["spec"] for one in everything if one["kind"] == "Deployment"]
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        claims = {
            volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if "emptyDir" not in volume
        }
        assert {("PersistentVolumeClaim", claim) for claim in claims} <= names
        assert ("ServiceAccount", pod["serviceAccountName"]) in names
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
            maps = [source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source]
            assert {("ConfigMap", name) for name in maps} <= names and maps


def test_entrypoints_are_commands_that_exist(monkeypatch):
    from pipelines.cli import app

    verbs = get_command(app).commands
    for manifest in ray_manifests():
        command = manifest["spec"].get("jobTemplate", manifest["spec"]).get("entrypoint")
        if command is None:
            continue
        words = command.split()
        assert words[:3] == ["sdan", "--data", "/data"]
        known = {name for option in verbs[words[3]].params for name in option.opts}
        assert {word for word in words[4:] if word.startswith("--")} <= known


def test_manifests_hold_no_secret():
    for file in (*FILES, ROOT / "k8s" / "Dockerfile"):
        assert not re.search(r"AKIA|ASIA|BEGIN [A-Z ]*PRIVATE KEY|password", file.read_text(), re.IGNORECASE)
    assert not any(one["kind"] == "Secret" for file in FILES for one in manifests(file.name))


def test_the_image_is_made_of_what_the_packages_need():
    text = (ROOT / "k8s" / "Dockerfile").read_text()
    ignored = (ROOT / "k8s" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()}
    assert copied >= {"preprocessing", "sdan", "tuning", "pipelines", "pyproject.toml", "constraints.txt"}
    assert {line[1:] for line in ignored if line.startswith("!")} == copied and ignored[0] == "*"
    assert all((ROOT / name).exists() for name in copied)
    assert re.search(r"^USER ray$", text, re.MULTILINE) and "--constraint /tmp/constraints.txt" in text
    (pattern,) = re.findall(r"grep -Ev '([^']+)' constraints.txt", text)
    left = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not re.match(pattern, line)]
    assert any(line.startswith("ray==") for line in left) and any(line.startswith("nvidia-ml-py==") for line in left)
    assert not any(re.match(r"torch==|nvidia-c|triton==", line) for line in left)
