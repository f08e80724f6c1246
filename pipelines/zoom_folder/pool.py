"""Zooms with Ray Data: a pool of actors, each with a worker process that holds the models."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.data

from pipelines.cluster import running_nodes
from pipelines.zoom_folder.plan import Job
from pipelines.zoom_folder.worker import Result, Settings, ZoomWorker, sweep_temporary, temporary_folder
from preprocessing.shards import quiet_ray_data, require_only_deaths
from sdan import checkpoint

CPUS = 4
"""CPUs of a worker without a GPU; of fewer it takes all."""
PER_GPU = 2
"""Workers that share a GPU: one reads or writes a photograph while the other computes."""
BYTES = 2_000_000_000
"""Memory that a worker may need; a machine with less for each gets fewer."""
RETRIES = 2
"""Retries of a row whose actor died: a photograph, or a part of a split."""
_CHUNK = 1000
"""Photographs of one Ray Data job, which limits what the driver holds of its plan."""


@dataclass(frozen=True)
class Pool:
    """How many workers there are, and what each asks of Ray."""

    workers: int
    cpus: float
    gpus: float


def plan_pool(nodes: Sequence[Mapping[str, float]], *, cpus_each: int = CPUS, per_gpu: int = PER_GPU) -> Pool:
    """Fit workers into the machines; at least one.

    Args:
        nodes: each machine's resources by Ray's names: CPU, GPU, memory (bytes).
        cpus_each: CPUs of a worker without a GPU; of fewer it takes all.
        per_gpu: workers that share a GPU.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus:
        least = min(node.get("CPU", 0) / int(node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1)
        return Pool(gpus * per_gpu, max(0.0, min(1.0, least / per_gpu)), 1 / per_gpu)
    cpus = min(cpus_each, max(int(node.get("CPU", 0)) for node in nodes))
    each = [min(int(node.get("CPU", 0)) // max(cpus, 1), int(node.get("memory", BYTES) // BYTES)) for node in nodes]
    return Pool(max(1, sum(each)), float(cpus), 0.0)


def zoom_in_pool(settings: Settings, jobs: Sequence[Job]) -> Iterator[Result]:
    """Zoom with the running Ray; yields results as they arrive. A photograph whose actor died every time has none.

    Raises:
        PreprocessError: Ray's workers cannot run this sdan.
    """
    nodes = running_nodes()
    if settings.device == "cpu":
        nodes = [node | {"GPU": 0.0} for node in nodes]
    pool = plan_pool(nodes)
    folders = dict.fromkeys((settings.for_raw, settings.for_pictures))
    models = ray.put([_files(Path(folder)) for folder in folders])
    threads = None if pool.gpus else max(1, int(pool.cpus))
    rest = iter(jobs)
    with quiet_ray_data() as failures:
        while chunk := list(itertools.islice(rest, _CHUNK)):
            rows = [{"job": json.dumps(asdict(job))} for job in chunk]
            for row in mapped(rows, ZoomActor, pool, settings=asdict(settings), models=models, threads=threads):
                result = json.loads(row["result"])
                yield Result(**result | {"notes": tuple(result["notes"])})
            require_only_deaths(failures)


def mapped(rows: list[dict[str, Any]], actor: type, pool: Pool, **arguments: Any) -> Iterator[dict[str, Any]]:
    """What the pool's actors, each `actor(**arguments)`, make of the rows, as it arrives. A row whose actor died every
    time is left out. Called inside `quiet_ray_data`."""
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        actor,
        fn_constructor_kwargs=arguments,
        compute=ray.data.ActorPoolStrategy(size=min(pool.workers, len(rows)), max_tasks_in_flight_per_actor=1),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        max_restarts=-1,
        max_task_retries=RETRIES,
    )
    yield from results.iter_rows()


class ZoomActor:
    """A row with a job -> a row with its result."""

    def __init__(self, settings: dict[str, Any], models: Any, threads: int | None) -> None:
        """
        Args:
            models: reference to the files of one or two checkpoint folders, which may not exist on this machine.
        """
        sweep_temporary()
        self._open = ExitStack()
        here = self._open.enter_context(temporary_folder())
        folders = []
        for number, files in enumerate(ray.get(models)):
            folders.append(here / str(number))
            folders[-1].mkdir()
            for name, data in files.items():
                (folders[-1] / name).write_bytes(data)
        own = replace(Settings(**settings), for_raw=str(folders[0]), for_pictures=str(folders[-1]))
        self._worker = ZoomWorker(own, threads=threads)
        self._open.callback(self._worker.close)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"result": json.dumps(asdict(self._worker.run(Job(**json.loads(row["job"])))))}

    def __del__(self) -> None:
        self._open.close()


def _files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (checkpoint.WEIGHTS, checkpoint.DESCRIPTION)}
