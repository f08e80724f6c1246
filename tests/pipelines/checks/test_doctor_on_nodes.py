"""`sdan doctor` on a real cluster of two nodes on this machine."""

import pytest
import ray
from ray.cluster_utils import Cluster

from pipelines import doctor

pytestmark = pytest.mark.slow


@pytest.fixture
def two_nodes(monkeypatch):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_every_node_is_checked_by_a_process_of_its_own(two_nodes, tmp_path):
    lines = []
    code = doctor.report(tmp_path / "data", say=lines.append)
    found = "\n".join(lines)
    nodes = {line.split()[1] for line in lines if "#" in line.split()[1]}
    assert len(nodes) == 2
    for node in nodes:
        for name in ("torch", "GPU", "operators", "disk", "/dev/shm", "data"):
            assert any(line.split()[1:3] == [node, name] for line in lines), (node, name)
    for name in ("versions", "clocks", "network", "gloo"):
        assert any(line.split()[:2] == ["ok", name] for line in lines), found
    assert code == int(any(line.startswith("broken") for line in lines))
    assert [path.name for path in (tmp_path / "data").iterdir() if "doctor" in path.name] == []
