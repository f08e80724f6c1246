"""The files of deploy/monitoring: queries name metrics that exist, services listen on this machine only."""

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from pipelines.monitoring.published import METRICS, exported_name

DEPLOY = Path(__file__).parents[3] / "deploy/monitoring"
PANELS = json.loads((DEPLOY / "grafana/dashboards/sdan.json").read_text())["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def named(queries):
    """The metrics that queries name."""
    return {name for query in queries for name in re.findall(r"\bray_\w+", query)}


def ray_names() -> set[str]:
    """The metrics that Ray's own dashboards use, and those of its node agent."""
    folder = files("ray.dashboard.modules.metrics.dashboards")
    agent = files("ray.dashboard.modules.reporter").joinpath("reporter_agent.py").read_text()
    texts = [one.read_text() for one in folder.iterdir() if one.name.endswith(".py")]
    found = {name for text in texts for name in re.findall(r"\bray_\w+", text)}
    return found | {f"ray_{name}" for name in re.findall(r'"((?:node|cluster|component)_\w+)"', agent)}


def test_every_query_names_metrics_that_exist():
    ours = {exported_name(name) for name in METRICS}
    assert named(QUERIES) - ours <= ray_names()


def test_every_metric_of_ours_is_shown():
    assert {exported_name(name) for name in METRICS} <= named(QUERIES)


def test_ratios_of_counters_use_rate():
    for query in QUERIES:
        for name in re.findall(r"\bray_sdan_\w+_total", query):
            assert f"rate({name}[" in query


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_are_whole(panel):
    assert panel["datasource"]["uid"] == "prometheus" and panel["type"] == "timeseries"
    assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for target in panel["targets"]:
        tags = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        grouped = re.search(r" by \((.*?)\)", target["expr"])
        assert not grouped or tags == set(re.split(r",\s*", grouped[1]))
        assert target["expr"].count("(") == target["expr"].count(")")


def test_panels_have_their_own_places():
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in PANELS]
    assert len(set(places)) == len(PANELS) == len({panel["id"] for panel in PANELS})


def test_services_listen_on_this_machine_only():
    prometheus, grafana = COMPOSE["services"]["prometheus"], COMPOSE["services"]["grafana"]
    assert "--web.listen-address=127.0.0.1:9090" in prometheus["command"]
    assert grafana["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert not any("ports" in service for service in (prometheus, grafana))


def test_mounted_files_exist():
    for service in COMPOSE["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("./") or (DEPLOY / source).exists()


def test_images_have_a_version():
    assert all(re.search(r":v?\d+\.\d+\.\d+$", one["image"]) for one in COMPOSE["services"].values())


def test_prometheus_reads_the_file_that_ray_writes():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


def test_grafana_finds_its_source_and_its_dashboard():
    folder = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    assert (source["uid"], source["url"]) == ("prometheus", "http://127.0.0.1:9090")
    (provider,) = yaml.safe_load((folder / "dashboards/sdan.yaml").read_text())["providers"]
    assert any(provider["options"]["path"] in volume for volume in COMPOSE["services"]["grafana"]["volumes"])
