"""Scores the crops of a split part by part, in this process or in workers of Ray Data.

Only one part's pictures are in memory at a time; what is collected are numbers. A part is a whole number of the
network's batches, so any number of workers computes the same batches and returns the same scores, in the crops' order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import ray
import torch
from torch import Tensor

from pipelines.cluster import ClusterError, running_nodes, start_ray
from pipelines.config import ExperimentConfig
from pipelines.loader import ShardIndex, ShardsError
from pipelines.scoring.held_out import HeldOut, Tile, read_crops
from pipelines.scoring.scores import BATCH, PROTOCOLS, PerCrop, of_protocol, score_bicubic, score_model
from pipelines.zoom_folder.batch import ray_pays
from pipelines.zoom_folder.pool import RETRIES, Pool, mapped, plan_pool
from preprocessing.shards import quiet_ray_data, require_only_deaths
from preprocessing.storage import one_line
from sdan import metrics
from sdan.baselines import Network
from sdan.ops.precision import ComputePlan, compute_plan

PART = 4 * BATCH
"""Crops of a part."""
SMALL = 64
"""Crops below which a start of Ray on this machine does not pay."""
CPUS = 2
"""CPUs of a worker without a GPU: registration and reading keep one busy."""
PER_GPU = 4
"""Workers that share a GPU: some read and register tiles on the CPU while another computes."""


@dataclass(frozen=True)
class Scored:
    """Scores of crops without their pictures: numbers and strings, also as JSON."""

    sources: dict[str, PerCrop]
    """What a row is made from (camera, rendering, self, oracle) -> its scores."""
    columns: Sequence[dict[str, Any]]
    """HeldOut.columns."""
    valid: list[float]
    """Share of each aligned target that is valid; NaN without such a target."""
    detail: dict[str, list[float]]
    """Column of a target -> `detail_of` each crop."""
    missing: dict[str, str]
    """Metric that was asked for and could not be computed -> why, in one line."""
    precision: str

    @property
    def simulated(self) -> bool:
        """Whether all crops have an ideal picture."""
        return "true_rgb" in self.detail


def score_tiles(
    model: Network,
    index: ShardIndex,
    config: ExperimentConfig,
    tiles: Sequence[Tile],
    *,
    perceptual: bool,
    workers: int | None = None,
) -> Scored:
    """Score the central crops of the tiles, with their aligned targets.

    Args:
        workers: 1: in this process; more: in so many of Ray's; None: in Ray's, as many as fit, where `ray_pays`.

    Raises:
        ShardsError: a shard that cannot be read.
        ClusterError: Ray does not start, has too few CPUs, or lost the workers of a part again and again.
    """
    parts = [tiles[first : first + PART] for first in range(0, len(tiles), PART)]
    if workers == 1 or (workers is None and not ray_pays(len(tiles), SMALL)):
        return joined([_score_part(model, index, config, part, perceptual) for part in parts])
    start_ray()
    pool = plan_scorers(running_nodes(), workers)
    found: dict[int, Scored] = {}
    with closing(_in_pool(pool, model, index, config, parts, perceptual)) as results:
        for number, scored in results:
            found[number] = scored
    if lost := len(parts) - len(found):
        raise ClusterError(
            f"SHARDS, {index.shards}: expected the scores of {len(parts)} parts, got none of {lost}, whose Ray workers "
            f"died {RETRIES + 1} times each, perhaps for memory; use a smaller --workers"
        )
    return joined([found[number] for number in range(len(parts))])


def plan_scorers(nodes: Sequence[Mapping[str, float]], asked: int | None) -> Pool:
    """How many workers score, and what each asks of Ray.

    Args:
        nodes: as plan_pool takes them.
        asked: --workers; None: as many as fit.

    Raises:
        ClusterError: more workers than CPUs.
    """
    fits = plan_pool(nodes, cpus_each=CPUS, per_gpu=PER_GPU)
    if asked is None:
        return fits
    cpus, gpus = (sum(int(node.get(name, 0)) for node in nodes) for name in ("CPU", "GPU"))
    if asked > cpus:
        raise ClusterError(f"--workers {asked}: expected at most one per CPU, got {cpus} CPUs; use --workers {cpus}")
    if asked <= fits.workers:
        return Pool(asked, fits.cpus, fits.gpus)
    if not gpus:
        return Pool(asked, 1.0, 0.0)
    each_gpu = math.ceil(asked / gpus)
    return Pool(asked, fits.cpus * PER_GPU / each_gpu, 1 / each_gpu)


def placed(model: Network) -> ComputePlan:
    """Move the model to this process's GPU, if there is one, and into the layout of the plan that is returned."""
    plan = compute_plan(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(plan.device).to(memory_format=plan.memory_format)
    return plan


def score_crops(model: Network, held: HeldOut, *, perceptual: bool) -> Scored:
    """Score a model and the baselines on loaded crops, on a GPU if there is one; the scores never depend on TF32."""
    plan = placed(model)
    device = plan.device
    scores = score_model(model, held, plan, perceptual=perceptual, by_plane=True)
    sources = {
        source: score_bicubic(model, held, device, source, perceptual=perceptual, by_plane=True)
        for source, column in (("camera", "lr_rgb"), ("rendering", "lr_render"))
        if column in held.batch
    }
    sources |= {protocol: of_protocol(scores, protocol) for protocol in PROTOCOLS}
    mask = held.aligned_mask
    return Scored(
        sources=sources,
        columns=held.columns,
        valid=[math.nan] * len(held) if mask is None else mask.double().mean((1, 2, 3)).tolist(),
        detail={name: detail_of(held.batch[name]) for name in ("hr_rgb", "true_rgb") if name in held.batch},
        missing={name: said for name, (_, why) in metrics.PERCEPTUAL.items() if perceptual and (said := why())},
        precision=plan.precision,
    )


def joined(parts: Sequence[Scored]) -> Scored:
    """The scores of all crops, in order. A score or column that a part lacks is left out: means are over all crops."""
    first = parts[0]

    def of_all(tables: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
        names = [name for name in tables[0] if all(name in table for table in tables)]
        return {name: [value for table in tables for value in table[name]] for name in names}

    names = [name for name in first.sources if all(name in part.sources for part in parts)]
    return Scored(
        sources={name: of_all([part.sources[name] for part in parts]) for name in names},
        columns=[columns for part in parts for columns in part.columns],
        valid=[value for part in parts for value in part.valid],
        detail=of_all([part.detail for part in parts]),
        missing={name: said for part in parts for name, said in part.missing.items()},
        precision=" and ".join(dict.fromkeys(part.precision for part in parts)),
    )


def detail_of(images: Tensor) -> list[float]:
    """How much detail each of the pictures [N, 3, H, W] has: its mean difference of neighbouring pixels."""
    gray = images.float().mean(1)
    return (gray.diff(dim=1).abs().mean((1, 2)) + gray.diff(dim=2).abs().mean((1, 2))).tolist()


def by_detail(detail: Sequence[float], count: int) -> list[int]:
    """`count` crops evenly spaced between the most detailed and the median one, by `detail_of` their targets."""
    order = torch.tensor(detail).argsort(descending=True, stable=True)
    ranks = torch.linspace(0, (len(order) - 1) / 2, min(count, len(order))).round().long()
    return [int(number) for number in order[ranks]]


def _score_part(
    model: Network, index: ShardIndex, config: ExperimentConfig, tiles: Sequence[Tile], perceptual: bool
) -> Scored:
    try:
        return score_crops(model, read_crops(index, config, tiles, align=True), perceptual=perceptual)
    except OSError as error:
        raise ShardsError(
            f"SHARDS, {index.shards}: expected readable shards, got {one_line(error)}; check disk and connection, or "
            "remove this file and preprocess again"
        ) from error
    except torch.OutOfMemoryError as error:
        raise ClusterError(
            f"GPU memory: expected room for {BATCH} crops, got none; close other programs that use the GPU, or use "
            "a smaller --workers"
        ) from error


def _in_pool(
    pool: Pool,
    model: Network,
    index: ShardIndex,
    config: ExperimentConfig,
    parts: Sequence[Sequence[Tile]],
    perceptual: bool,
) -> Generator[tuple[int, Scored]]:
    """(number of the part, its scores) as they arrive; a part whose workers died every time has none."""
    rows = [{"number": number, "tiles": json.dumps(part)} for number, part in enumerate(parts)]
    shared = ray.put((model.cpu(), index, config))
    with quiet_ray_data() as failures:
        threads = max(1, int(pool.cpus))
        for row in mapped(rows, PartScorer, pool, shared=shared, perceptual=perceptual, threads=threads):
            if row["error"]:
                kind = ShardsError if row["kind"] == ShardsError.__name__ else ClusterError
                raise kind(row["error"])
            yield row["number"], Scored(**json.loads(row["scored"]))
        require_only_deaths(failures)


class PartScorer:
    """A row with a part's tiles -> a row with its scores, or with the line of the error that ends the evaluation."""

    def __init__(self, shared: Any, perceptual: bool, threads: int) -> None:
        """
        Args:
            shared: reference to (model, index, config).
        """
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
        self._model, self._index, self._config = ray.get(shared)
        self._perceptual = perceptual

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        tiles = [(pair, tile) for pair, tile in json.loads(row["tiles"])]
        answer = {"number": row["number"], "scored": "", "error": "", "kind": ""}
        try:
            found = _score_part(self._model, self._index, self._config, tiles, self._perceptual)
            return answer | {"scored": json.dumps(asdict(found))}
        except (ShardsError, ClusterError) as error:
            return answer | {"error": str(error), "kind": type(error).__name__}
