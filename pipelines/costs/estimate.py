"""What `--dry-run` says of preprocess, train, tune and zoom: tasks, hours, gigabytes and dollars."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from pipelines.cluster import Workers
from pipelines.config import CONFIGS, ExperimentConfig, named
from pipelines.costs import prices, rates
from pipelines.costs.rates import CPU_CORE, Rate
from pipelines.loader import ShardIndex, index_split, with_curve_of
from pipelines.sweeping.resources import crops_per_s, training_s
from preprocessing.estimate import Estimate
from preprocessing.storage import open_folder
from sdan.network import SDAN
from tuning.plan import repeated_trials, rounds

MEASURED_CORES = 2
"""Cores of the machine on which training and zooming on a CPU were measured."""
HERE = "here"
CHECKPOINT_COPIES = 4
"""A checkpoint has the averaged weights, the weights and Adam's two moments."""
CHECKPOINTS_KEPT = 2


class PriceError(ValueError):
    """A value of --dollars-per-hour that is no price."""


@dataclass(frozen=True)
class Prices:
    """Dollars per hour of the named instance types, and of a machine here if it was given."""

    instances: Mapping[str, prices.Instance]
    here: float | None = None


def parse_prices(given: Iterable[str] | None) -> Prices:
    """--dollars-per-hour values: NAME=DOLLARS replaces a listed price, DOLLARS is that of this machine or cluster.

    Raises:
        PriceError: no number, a negative one, or an unknown name.
    """
    found, here = dict(prices.INSTANCES), None
    for text in given or ():
        name, _, number = text.rpartition("=")
        try:
            dollars = float(number)
        except ValueError:
            dollars = -1.0
        if not 0 <= dollars < float("inf"):
            raise PriceError(f"--dollars-per-hour: expected a number or NAME=NUMBER, got {text!r}")
        if not name:
            here = dollars
        elif name not in found:
            raise PriceError(f"--dollars-per-hour: expected one of {', '.join(found)}, got {name!r}")
        else:
            found[name] = replace(found[name], dollars=dollars)
    return Prices(found, here)


class SweepSize(Protocol):
    """What the cost of a sweep depends on of pipelines.tune.Options."""

    @property
    def trials(self) -> int: ...
    @property
    def repeats(self) -> int: ...


@dataclass(frozen=True)
class Cost:
    """What a command will take."""

    tasks: str
    gigabytes: str
    machines: tuple[tuple[str, float, float | None], ...]
    """(what runs it, hours, dollars or None without a price)."""
    sources: tuple[str, ...]
    """The rates, and what is assumed."""

    def __str__(self) -> str:
        lines = [f"dry run: {self.tasks}; {self.gigabytes}"]
        for name, hours, dollars in self.machines:
            lines.append(f"  {name}: {_hours(hours)}" + (f", {dollars:.2f} $" if dollars is not None else ""))
        if not self.machines:
            lines.append("  hours: unknown, because no run with this network was measured; try --epochs 1")
        lines += [f"  by {source}" for source in self.sources]
        if any(dollars is not None for _, _, dollars in self.machines):
            lines.append(
                f"  prices: approximate, on demand, {prices.DATE}; --dollars-per-hour [NAME=]DOLLARS replaces them"
            )
        return "\n".join(lines)


def preprocessing(todo: int, estimate: Estimate, *, registers: bool, asked: Prices) -> Cost:
    """Of `sdan preprocess`.

    Args:
        todo: pairs.
        estimate: tiles and bytes, and the time by the rate of SHARDS if it has one.
        registers: whether the pairs are registered (--align ecc).
    """
    if estimate.seconds is not None:
        cpu_s, source = estimate.seconds * estimate.cpus, "the rate of the last run into these SHARDS"
    else:
        parts = [rates.CPU_TASK_S, *([rates.ECC_TASK_S] if registers else [])]
        cpu_s = sum(part.value for part in parts) * estimate.tiles / rates.TILES_PER_PAIR.value
        source = " and ".join(str(part) for part in parts) + ", by the number of tiles"
    machines = [_machine(f"{HERE}, {estimate.cpus:g} CPUs", cpu_s / estimate.cpus, asked.here)]
    for name in prices.CPU_NODES:
        node = asked.instances[name]
        machines.append(_machine(f"{name}, {node.cpus} vCPUs", cpu_s / node.cpus, node.dollars))
    size = f"about {estimate.tiles:,} tiles, {estimate.bytes / 1e9:.2f} GB of shards"
    return Cost(f"{todo:,} tasks, one per pair", size, tuple(machines), (source,))


def training(shards: str, config: ExperimentConfig, data: Path, *, workers: Workers | None, asked: Prices) -> Cost:
    """Of `sdan train`; a range of workers counts with its most. Raises ShardsError: no pairs to train on."""
    workers = workers[1] if isinstance(workers, tuple) else workers
    index = index_split(shards, "train")
    held = index_split(shards, "val")
    config = with_curve_of(index, config)
    crops = config.train.epochs * (config.train.crops_per_epoch or len(index.paths))
    machines, sources = _trainings(config, len(index.paths), data, workers, asked)
    steps = -(-crops // (config.train.batch_per_worker * (workers or 1)))
    validations = -(-config.train.epochs // config.train.validate_every)
    tasks = f"{crops:,} crops in {steps:,} steps of {workers or 1} workers, {validations} validations"
    return Cost(
        tasks, f"{_gigabytes(index, held):.2f} GB of shards, {_checkpoint_gb(config):.2f} GB kept", machines, sources
    )


def sweep(
    shards: str, config: ExperimentConfig, data: Path, options: SweepSize, *, workers: int | None, asked: Prices
) -> Cost:
    """Of `sdan tune`, if no trial is stopped early; trials that train another network take another time."""
    index = index_split(shards, "train")
    held = index_split(shards, "val")
    config = with_curve_of(index, config)
    one, sources = _trainings(config, len(index.paths), data, workers, asked)
    again = repeated_trials(options.repeats)
    machines = []
    for name, hours, dollars in one:
        # A node with several GPUs trains as many trials at once: the same work, one rate per GPU.
        at_once = next((node.gpus for key, node in asked.instances.items() if name.startswith(f"{key},")), 0) or 1
        factor = (rounds(options.trials, at_once) + rounds(again, at_once)) * at_once
        machines.append((name, hours * factor, None if dollars is None else dollars * factor))
    tasks = f"{options.trials} trials" + (f", and {again} repeats of the best and the default" if again else "")
    kept = _checkpoint_gb(config) * (options.trials + again)
    notes = (*sources, "every trial trained to its end; ASHA stops many earlier")
    return Cost(tasks, f"{_gigabytes(index, held):.2f} GB of shards, {kept:.2f} GB kept", tuple(machines), notes)


def zooming(photographs: int, there: int, *, asked: Prices) -> Cost:
    """Of `sdan zoom`, for photographs of 12 megapixels, 4x, with a starter model.

    Args:
        there: photographs that an earlier run has finished.
    """
    todo = photographs - there
    machines = []
    for rate in rates.ZOOM:
        seconds = todo * rate.value
        if rate.hardware == CPU_CORE:
            cores = os.cpu_count() or 1
            machines.append(_machine(f"{HERE}, {cores} CPUs", seconds * MEASURED_CORES / cores, asked.here))
        machines += [
            _machine(f"{name}, {node.gpus} GPUs", seconds / node.gpus, node.dollars)
            for name, node in asked.instances.items()
            if node.gpu == rate.hardware
        ]
    sources = (
        *(str(rate) for rate in rates.ZOOM),
        f"photographs of {rates.MEGAPIXELS:g} megapixels; time grows with their pixels. Several GPUs, or more cores, "
        "are assumed to share the photographs evenly",
    )
    size = f"about {todo * rates.ZOOMED_MB.value / 1e3:.1f} GB as PNG of 8 bits"
    return Cost(f"{todo:,} of {photographs:,} photographs, a task each", size, tuple(machines), sources)


def _trainings(
    config: ExperimentConfig, pairs: int, data: Path, workers: int | None, asked: Prices
) -> tuple[tuple[tuple[str, float, float | None], ...], tuple[str, ...]]:
    """((machine, hours, dollars) of a training, where the rates come from)."""
    machines, sources = [], []
    own = crops_per_s(data, config, workers or 1)
    if (seconds := training_s(config, pairs=pairs, rate=own)) is not None:
        machines.append(_machine(f"{HERE}, {workers or 1} workers", seconds, asked.here))
        sources.append(f"{own:.1f} crops/s of an earlier run in {data} with the same network, validations not counted")
    for rate in _measured(config):
        if rate.hardware == CPU_CORE and own is None:
            cores = os.cpu_count() or 1
            seconds = training_s(config, pairs=pairs, rate=rate.value * cores / MEASURED_CORES) or 0.0
            machines.append(_machine(f"{HERE}, {cores} CPUs, no GPU", seconds, asked.here))
        elif rate.hardware != CPU_CORE:
            for name, node in asked.instances.items():
                if node.gpu == rate.hardware:
                    seconds = training_s(config, pairs=pairs, rate=rate.value * node.gpus) or 0.0
                    machines.append(_machine(f"{name}, {node.gpus} GPUs", seconds, node.dollars))
        else:
            continue
        sources.append(f"{rate}; more cores or GPUs are assumed to be as much faster, which was not measured")
    return tuple(machines), tuple(sources)


def _measured(config: ExperimentConfig) -> Sequence[Rate]:
    """The rates of the named config that this one has the network, crop and batch of."""
    if config.name not in CONFIGS or config.name not in rates.TRAINING:
        return ()
    base = named(config.name)
    same = replace(config.model, rendering_curve=base.model.rendering_curve) == base.model
    same &= config.train.crop_px == base.train.crop_px
    return rates.TRAINING[config.name] if same else ()


def _machine(name: str, seconds: float, dollars_per_hour: float | None) -> tuple[str, float, float | None]:
    hours = seconds / 3600
    return name, hours, None if dollars_per_hour is None else hours * dollars_per_hour


def _gigabytes(*parts: ShardIndex) -> float:
    """Size of the shards of these splits."""
    sizes = [sum(entry.size for entry in open_folder(part.shards).files(f"split={part.split}")) for part in parts]
    return sum(sizes) / 1e9


def _checkpoint_gb(config: ExperimentConfig) -> float:
    parameters = sum(parameter.numel() for parameter in SDAN(config.model).parameters())
    return CHECKPOINTS_KEPT * CHECKPOINT_COPIES * 4 * parameters / 1e9


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{max(hours * 60, 0.1):.1f} minutes"
