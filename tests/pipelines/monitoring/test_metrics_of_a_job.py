"""The metrics of a small real job, read where Prometheus reads them."""

import re
import time
import urllib.request

import pytest
import ray

from pipelines.cluster import start_ray
from pipelines.monitoring.published import METRICS, exported_name, pair_finished
from pipelines.training.meter import EpochMeter, LiveFile
from preprocessing.shards import PreprocessOptions, preprocess

pytestmark = pytest.mark.slow


@ray.remote(num_cpus=0.1)
def train(folder) -> None:
    """What a worker publishes while it trains."""
    from pathlib import Path

    import torch

    live, meter = LiveFile(Path(folder), 1, 100), EpochMeter()
    for _ in range(2):
        meter.add({"loss": torch.tensor(1.0), "skipped": torch.tensor(0.0)}, 0.01)
    live.update(16, meter, 8)
    time.sleep(20)


def scraped() -> str:
    """All nodes' metrics."""
    ports = [node["MetricsExportPort"] for node in ray.nodes()]
    return "".join(
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode() for port in ports
    )


def test_pairs_and_crops_appear_on_rays_endpoint(tmp_path):
    raw = tmp_path / "raw/00001"
    raw.mkdir(parents=True)
    for name in ("00006.ARW", "00002.ARW", "00006.JPG", "00002.JPG"):
        (raw / name).write_bytes(b"")
    (tmp_path / "run").mkdir()
    start_ray()
    reference = train.remote(str(tmp_path / "run"))
    pair_finished("written", 40)  # as the job does for each pair
    preprocess(
        str(tmp_path / "raw"), str(tmp_path / "shards"), PreprocessOptions(), progress=False, on_pair=pair_finished
    )
    wanted = ["sdan_preprocess_pairs", "sdan_preprocess_tiles", "sdan_train_crops_per_second", "sdan_train_data_wait"]
    deadline, text = time.monotonic() + 60, ""
    while not all(exported_name(name) in text for name in wanted) and time.monotonic() < deadline:
        time.sleep(1)
        text = scraped()
    for name in wanted:
        assert re.search(rf"^{exported_name(name)}{{", text, re.MULTILINE), name
        assert METRICS[name].description in text
    assert re.search(r'^ray_sdan_train_crops_per_second{.*run="run".*} [1-9]', text, re.MULTILINE)
    system = (
        "ray_tasks",
        "ray_cluster_active_nodes",
        "ray_node_cpu_utilization",
        "ray_node_mem_used",
        "ray_object_store_memory",
    )
    for name in (*system, "ray_node_disk_free", "ray_node_network_receive_speed"):
        assert re.search(rf"^{name}{{", text, re.MULTILINE), name
    ray.cancel(reference, force=True)
