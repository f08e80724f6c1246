"""Crops read by Ray tasks, as `sdan train` does, beside Ray Train's own `datasets`: `python benchmarks/feeding.py`.

Both variants run the same training (`pipelines.train.train`) and differ in the source of the worker's batches only.

"Ray tasks" is `pipelines.loader.training_batches`. "Datasets" gives Ray Train a Ray Data dataset of crop numbers, which
Ray Data's tasks turn into crops and Ray Train splits among the workers. The dataset's executor runs in an actor of its
own. Nothing that Ray Train calls knows both the number of workers and the position of a resumed run, so rank 0 tells
them to a further actor, which the readers ask. Each batch carries its crops' numbers, and the worker checks them.

Columns: crops/s and waiting between the 20th batch and the last; start-up: from the worker's request for its first
batch until it has it; the whole command; CPU per crop of the train workers, of the readers, and of the rest (Ray Data's
executor, Ray itself, MLflow). The variants take turns, and medians are reported. The table of equal crops compares
digests of every batch. The tables replace their section of benchmarks/RESULTS.md.
"""

import argparse
import hashlib
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, cast
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import ray  # noqa: E402
import ray.data  # noqa: E402
import ray.train  # noqa: E402
import torch  # noqa: E402
from ray.train.v2.torch.torch_trainer import TorchTrainer  # noqa: E402
from results import Tables, provenance, publish  # noqa: E402
from torch import Tensor  # noqa: E402

from pipelines import cluster  # noqa: E402
from pipelines import config as configs  # noqa: E402
from pipelines import train as training  # noqa: E402
from pipelines.config import ExperimentConfig  # noqa: E402
from pipelines.loader import TASK_CROPS, CropStream, crop_numbers, num_steps, training_stream  # noqa: E402
from pipelines.train import TrainError  # noqa: E402
from pipelines.training.worker import TrainJob, TrainWorker  # noqa: E402
from preprocessing.shards import PreprocessOptions, preprocess  # noqa: E402
from preprocessing.simulator.sequences import simulate  # noqa: E402

WARM_UP = 20
"""Batches before the measurement."""


class Position:
    """Where the run stands. Rank 0 sets it when it has restored its checkpoint, before Ray Data's executor starts."""

    def __init__(self) -> None:
        self.first_crop, self.world, self.blocks = 0, 1, 0

    def set(self, first_crop: int, world: int) -> None:
        self.first_crop, self.world, self.blocks = first_crop, world, 0

    def get(self) -> tuple[int, int]:
        self.blocks += 1
        return self.first_crop, self.world

    def blocks_read(self) -> int:
        """How many readers have asked; each reads one block."""
        return self.blocks


class ReadCrops:
    """Ray Data's map: the number of a block -> its crops. Block k goes to rank k modulo the number of workers."""

    def __init__(self, stream: CropStream, position: ray.actor.ActorHandle, batch: int) -> None:
        self.stream, self.position, self.batch = stream, position, batch

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        torch.set_num_threads(1)
        first_crop, world = cast(tuple[int, int], ray.get(self.position.get.remote()))
        (block,), each = rows["item"], block_crops(self.batch)
        places = block // world * each + np.arange(each)
        numbers = crop_numbers(places, batch=self.batch, rank=block % world, world=world, first_crop=first_crop)
        samples = [self.stream.crop(int(number)) for number in numbers]
        return {"number": numbers, **{name: np.stack([crop[name] for crop in samples]) for name in samples[0]}}


def block_crops(batch: int) -> int:
    """Crops in a block: whole batches, about as many crops as in a task of training_batches."""
    return batch * max(1, TASK_CROPS // batch)


def crop_dataset(
    stream: CropStream, position: ray.actor.ActorHandle, *, batch: int, crops: int, readers: int, workers: int
) -> ray.data.Dataset:
    """A dataset of at least `crops` crops for any number of workers up to `workers`."""
    each = block_crops(batch)
    blocks = -(-crops // each) + 2 * workers
    # Not ray.data.range or from_arrow: their tasks request a CPU, and never start if the workers have reserved all.
    numbers = ray.data.from_items(list(range(blocks)), override_num_blocks=blocks)
    return numbers.map_batches(
        ReadCrops(stream, position, batch).__call__,
        batch_size=None,
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=readers * workers),
    )


@dataclass(frozen=True)
class Watch:
    """What the workers of a run note in `folder` beside the training."""

    folder: Path
    digests: bool = False
    kill_at: int | None = None
    """The batch at which rank 0 kills its process, once in this folder."""


class WatchedWorker(TrainWorker):
    """Trains on the batches of training_batches, and notes times and digests."""

    watch: Watch

    def source(self) -> Iterator[dict[str, Tensor]]:
        """The batches."""
        return super()._batches()

    def read_ahead(self, batches: int) -> int:
        """Crops that are read when this worker has had `batches` batches, at most."""
        return (self.job.readers + 1) * block_crops(self.config.train.batch_per_worker)

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        position, began, waits, times, ahead = self.training.crops, time.perf_counter(), [], [], 0
        batches = self.source()
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            times.append(time.perf_counter())
            waits.append(times[-1] - asked)
            if len(times) == 1:
                self._note("starts", [times[0] - began])
            if len(times) == WARM_UP:
                ahead = self.read_ahead(WARM_UP)
            if self.watch.digests:
                self._note(f"digests{self.rank}", [position, self.world, self.rank, digest(batch)])
            if len(times) == self.watch.kill_at:
                self._die_once()
            position += self.crops_per_step
            yield batch
        if len(times) > WARM_UP:
            elapsed = times[-1] - times[WARM_UP - 1]
            crops = (len(times) - WARM_UP) * self.crops_per_step
            self._note("speed", [crops / elapsed, sum(waits[WARM_UP:]) / elapsed, ahead])

    def _note(self, name: str, values: list[object]) -> None:
        if self.rank == 0 or name.startswith("digests"):
            with (self.watch.folder / f"{name}.jsonl").open("a") as file:
                file.write(json.dumps(values) + "\n")

    def _die_once(self) -> None:
        marker = self.watch.folder / "killed"
        if self.rank == 0 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class DatasetWorker(WatchedWorker):
    """Trains on the dataset of crop_dataset."""

    position: ray.actor.ActorHandle

    def source(self) -> Iterator[dict[str, Tensor]]:
        batch, first_crop = self.config.train.batch_per_worker, self.training.crops
        if self.rank == 0:
            ray.get(self.position.set.remote(first_crop, self.world))
        steps = num_steps(first_crop, self.config.train.epochs * self.crops_per_epoch, self.crops_per_step)
        shard = ray.train.get_dataset_shard("train")
        # The dataset is longer than the rest of the run.
        for step, crops in zip(range(steps), shard.iter_torch_batches(batch_size=batch, drop_last=True), strict=False):
            places = step * batch + np.arange(batch)
            expected = crop_numbers(places, batch=batch, rank=self.rank, world=self.world, first_crop=first_crop)
            got = crops.pop("number").tolist()
            if got != expected.tolist():
                raise RuntimeError(f"step {step}, rank {self.rank}: expected crops {expected}, got {got}")
            yield crops

    def read_ahead(self, batches: int) -> int:
        blocks = cast(int, ray.get(self.position.blocks_read.remote()))
        batch = self.config.train.batch_per_worker
        return blocks * block_crops(batch) - batches * batch * self.world


KINDS: dict[str, type[WatchedWorker]] = {"Ray tasks": WatchedWorker, "datasets": DatasetWorker}


def digest(batch: dict[str, Tensor]) -> str:
    """16 hex digits over every value of the batch."""
    found = hashlib.sha256()
    for name in sorted(batch):
        found.update(name.encode() + batch[name].numpy().tobytes())
    return found.hexdigest()[:16]


class CpuMeter:
    """CPU seconds of this process and its descendants by role, from the first batch to the end of the last epoch."""

    ROLES = ("train workers", "readers", "rest")

    def __init__(self, folder: Path) -> None:
        self.begin, self.end = folder / "starts.jsonl", folder / "speed.jsonl"
        self.spent: dict[tuple[int, float], tuple[str, float]] = {}
        self.before: dict[str, float] | None = None
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopped.set()
        self.thread.join()

    def seconds(self) -> dict[str, float]:
        """By role; dead processes count with what they had spent when last seen."""
        before = self.before or dict.fromkeys(self.ROLES, 0.0)
        return {role: seconds - before[role] for role, seconds in self._totals().items()}

    def _follow(self) -> None:
        while not self.stopped.wait(0.5) and not self.end.exists():
            begun = self.before is None and self.begin.exists()
            root = psutil.Process()
            for process in [root, *root.children(recursive=True)]:
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    key = (process.pid, process.create_time())
                    self.spent[key] = (self._role(" ".join(process.cmdline())), times.user + times.system)
            if begun:
                self.before = self._totals()

    def _totals(self) -> dict[str, float]:
        return {role: sum(spent for of, spent in self.spent.values() if of == role) for role in self.ROLES}

    @staticmethod
    def _role(title: str) -> str:
        if "RayTrainWorker" in title:
            return "train workers"
        reading = any(title.startswith(f"ray::{name}") for name in ("_read", "IDLE", "MapBatches", "Map("))
        return "readers" if reading else "rest"


def loop_of(kind: type[WatchedWorker], watch: Watch, position: ray.actor.ActorHandle) -> Callable[..., None]:
    """pipelines.training.worker.train_worker with another class of worker."""

    def loop(config: dict[str, TrainJob]) -> None:
        from pipelines.training import worker

        kind.watch = watch
        if issubclass(kind, DatasetWorker):
            kind.position = position
        with mock.patch.object(worker, "TrainWorker", kind):
            worker.train_worker(config)

    return loop


def trainer_of(variant: str, watch: Watch, **options: Any) -> TorchTrainer:
    """The TorchTrainer of `sdan train` with the worker, and where it has one the dataset, of a variant of KINDS.

    options   what pipelines.train gives to TorchTrainer
    """
    job: TrainJob = options["train_loop_config"]["job"]
    position: Any = ray.remote(num_cpus=0)(Position).remote()
    if variant == "datasets":
        train, workers = job.config.train, options["scaling_config"].num_workers
        build = partial(
            crop_dataset,
            training_stream(job.shards.train, job.config),
            position,
            batch=train.batch_per_worker,
            crops=train.epochs * (train.crops_per_epoch or len(job.shards.train.paths)),
            readers=job.readers,
            workers=max(workers) if isinstance(workers, tuple) else workers,
        )
        ordered = ray.data.ExecutionOptions(preserve_order=True)
        options |= {"datasets": {"train": build}, "dataset_config": ray.train.DataConfig(execution_options=ordered)}
    return TorchTrainer(loop_of(KINDS[variant], watch, position), **options)


def run(variant: str, shards: str, config: ExperimentConfig, data: Path, workers: int = 1, **options: Any) -> None:
    """Train one variant of KINDS in the run folder data/runs/run, with the workers' notes in `data`.

    options   kill_at and digests of Watch; others go to pipelines.train.train
    """
    data.mkdir(parents=True, exist_ok=True)
    watch = Watch(data, digests=options.pop("digests", False), kill_at=options.pop("kill_at", None))

    def trainer(_: object, **given: Any) -> TorchTrainer:
        return trainer_of(variant, watch, **given)

    with mock.patch.object(training, "TorchTrainer", trainer):
        training.train(shards, config, data=data, workers=workers, name="run", register=None, progress=False, **options)


def notes(data: Path, name: str) -> list[list[Any]]:
    """The lines that workers wrote to one file."""
    return [json.loads(line) for path in sorted(data.glob(f"{name}*.jsonl")) for line in path.read_text().splitlines()]


def crops_of(data: Path) -> dict[tuple[int, int, int], str]:
    """(stream position, number of workers, rank) -> digest of the batch. A batch that was repeated must be the same."""
    found: dict[tuple[int, int, int], str] = {}
    for position, world, rank, value in notes(data, "digests"):
        if found.setdefault((position, world, rank), value) != value:
            raise AssertionError(f"{data}: the batch at {position} of rank {rank} differs when it is repeated")
    return found


def equal_rows(shards: str, work: Path, scenarios: tuple[str, ...] = ()) -> Iterator[str]:
    """Whether both variants' batches are equal, for each scenario."""
    yield "| run of config smoke | batches compared | different | seconds to the first batch after a restart |"
    yield "|---|---|---|---|"
    changes = {"train.epochs": 3, "train.crops_per_epoch": 30}
    config = configs.override(configs.smoke(), changes)
    cluster.start_ray()
    for name in scenarios or SCENARIOS:
        found, restarts = {}, {}
        for variant in KINDS:
            data = work / f"equal {variant} {name}"
            SCENARIOS[name](partial(run, variant, shards, config, data, digests=True))
            found[variant] = crops_of(data)
            restarts[variant] = [seconds for (seconds,) in notes(data, "starts")[1:]]
        ours, theirs = found["Ray tasks"], found["datasets"]
        both = ours.keys() & theirs.keys()
        assert {key[0] for key in both} >= set(range(0, 90, 4)), "a part of the run is missing"
        different = sum(ours[key] != theirs[key] for key in both)
        again = ", ".join(f"{variant} {seconds:.1f}" for variant, own in restarts.items() for seconds in own)
        yield f"| {name} | {len(both)} | **{different}** | {again} |"


def killed_and_resumed(start: Callable[..., None]) -> None:
    """Two workers; rank 0 is killed and the run ends; one worker resumes it."""
    with suppress(TrainError):
        start(workers=2, kill_at=12, max_failures=0)
    start(workers=1, resume=True)


SCENARIOS: dict[str, Callable[[Callable[..., None]], None]] = {
    "1 worker": lambda start: start(workers=1),
    "2 workers, one killed": lambda start: start(workers=2, kill_at=12),
    "2 workers, killed, resumed with 1": killed_and_resumed,
}


def speed_rows(shards: str, work: Path, turns: int, steps: int) -> Iterator[str]:
    """A row for each variant, config starter with one worker: medians over the turns."""
    shares = " | ".join(f"CPU of {role}, ms a crop" for role in CpuMeter.ROLES)
    yield f"| crops from | crops/s | waiting | first batch after, s | whole command, s | crops read ahead | {shares} |"
    yield "|---" * 9 + "|"
    base = configs.starter()
    crops = steps * base.train.batch_per_worker
    changes = {"train.epochs": 1, "train.crops_per_epoch": crops, "train.val_crops": 1, "train.validate_every": 1}
    config = configs.override(base, changes | {"train.restart_epochs": 1})
    found: dict[str, list[list[float]]] = {variant: [] for variant in KINDS}
    for turn in range(turns):
        for variant, runs in found.items():
            data, began = work / f"speed {variant} {turn}", time.perf_counter()
            cluster.start_ray()
            with CpuMeter(data) as meter:
                run(variant, shards, config, data)
            ray.shutdown()
            whole = time.perf_counter() - began
            (start,), (rate, waiting, ahead) = notes(data, "starts")[0], notes(data, "speed")[0]
            spent = [1e3 * seconds / crops for seconds in meter.seconds().values()]
            runs.append([rate, 100 * waiting, start, whole, ahead, *spent])
            print(f"  {variant}: {' '.join(f'{value:.1f}' for value in runs[-1])}", file=sys.stderr, flush=True)
    for variant, runs in found.items():
        rate, waiting, start, whole, ahead, *spent = (statistics.median(values) for values in zip(*runs, strict=True))
        cells = f"{rate:.1f} | {waiting:.1f} % | {start:.1f} | {whole:.0f} | {ahead:.0f} |"
        yield f"| {variant} | {cells} {' | '.join(f'{value:.1f}' for value in spent)} |"


def make_shards(folder: Path) -> str:
    """Shards of three simulated sequences, if the folder has none; returns the folder."""
    if not (folder / "shards").exists():
        cluster.start_ray()
        simulate(folder / "raw", sequences=3, width_px=1536, preset="tripod", seed=5)
        options = PreprocessOptions(align="ecc", tile_px=48, stride_px=40, val=("00003",))
        preprocess(str(folder / "raw"), str(folder / "shards"), options, progress=False)
        ray.shutdown()
    return str(folder / "shards")


def main() -> None:
    """Measure, and update RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="runs of each variant for the table of speed")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each")
    parser.add_argument("--only", choices=("speed", "equal"), help="print one table; RESULTS.md stays as it is")
    parser.add_argument("--data", type=Path, help="where the simulated shards are kept; default: nowhere")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shards = make_shards(chosen.data or work)
        tables: Tables = {
            "speed": ("Speed, config starter", lambda: speed_rows(shards, work, chosen.turns, chosen.steps)),
            "equal": ("The crops are the same", lambda: equal_rows(shards, work)),
        }
        command = " ".join(["python benchmarks/feeding.py", *sys.argv[1:]])
        publish("feeding", provenance(command, ("../sdan", "../pipelines")), tables, chosen.only)


if __name__ == "__main__":
    main()
