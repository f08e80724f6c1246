"""A training step against the authors' way, the time of its parts, and the loader: `python benchmarks/training.py`.

Where there is a GPU, or with `--device cuda`, it runs the training tables of benchmarks/gpu.py; their columns are
explained in benchmarks/on_gpu/step_tables.py. This text explains the CPU's.

"Step" is `pipelines.training.step.train_step` of config `paper_4x` (64 features, 16 blocks,
128 x 128 mosaic crops, 512 x 512 targets): forward, eq. 6, backward, Adam. "Authors' way" is the same network with
torchvision's operator on the repeated offset and explicit attention, in float32, contiguous. Ours is channels-last
unless the column says otherwise. The variants of a row take turns; the best time of each is reported.

Each part is timed alone, forward and backward, on detached inputs, in milliseconds per step. The loader reads
simulated 1536 px wide shards. The roofline divides counted work by GPUs' published rates; nothing in it was measured
on a GPU. The tables replace their section of benchmarks/RESULTS.md.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gpu  # puts the repository on the import path
import torch
from authors_operators import authors_way
from measure import best_ms
from results import Tables, provenance, publish
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training_steps import authors_step, our_step, synthetic_inputs

from pipelines import config as configs
from pipelines.config import ExperimentConfig
from pipelines.loader import CropStream, Inputs, index_split, model_inputs, training_batches
from pipelines.training import step
from sdan.losses import sdan_loss
from sdan.network import SDAN, OffsetLearner, SDANOutput, with_flips
from sdan.ops import offset_mask
from sdan.ops.precision import autocast

CPU = torch.device("cpu")
CROP_PX = 128
"""Side of the paper's crop, mosaic pixels."""
PAPER_HOURS, PAPER_GPUS, PAPER_EPOCHS, PAPER_CROPS = 5, 8, 300, 1200
"""The paper's training, as reported there. Crops per epoch: one for each of the 3 pairs of about 400 sequences."""
WAYS: dict[str, dict[str, object]] = {
    "fp32": {"train.precision": "fp32"},
    "fp32, contiguous": {"train.precision": "fp32", "train.layout": "contiguous"},
    "bf16": {"train.precision": "bf16"},
    "bf16, contiguous": {"train.precision": "bf16", "train.layout": "contiguous"},
}
COMPILED: dict[str, dict[str, object]] = {"bf16, compiled": {"train.precision": "bf16", "train.compile": True}}


def start(changes: dict[str, object], batch: int) -> Callable[[], object]:
    """A training step of paper_4x that can be called repeatedly. `changes`: values by dotted name."""
    return our_step(configs.override(configs.paper_4x(), changes), batch, CPU)


def step_rows(seconds: float, compiled: bool) -> Iterator[str]:
    ways = WAYS | (COMPILED if compiled else {})
    names = " | ".join(f"{name}, s" for name in ways)
    yield f"| batch | threads | authors' way, s | {names} | authors' / best of ours |"
    yield "|---" * (len(ways) + 4) + "|"
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for batch in (1, 4):
            steps = {"authors": authors_step(configs.paper_4x(), batch, CPU)} | {
                name: start(way, batch) for name, way in ways.items()
            }
            ms = best_ms(steps, seconds)
            best = min(ms[name] for name in ways)
            cells = [f"{value / 1e3:.2f} ({ms['authors'] / value:.1f}x)" for name, value in ms.items() if name in ways]
            head = f"| {batch} | {threads} | {ms['authors'] / 1e3:.2f} "
            yield f"{head}| {' | '.join(cells)} | **{ms['authors'] / best:.1f}x** |"


@dataclass
class Part:
    """One part of the step, timed alone: its function, inputs and parameters."""

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    weights: tuple[nn.Parameter, ...] = ()

    def forward_backward(self) -> None:
        leaves = [tensor.detach().requires_grad_() for tensor in self.inputs]
        results = self.run(*leaves)
        outputs = [part for part in (results if isinstance(results, tuple) else (results,)) if part.requires_grad]
        grads = [torch.ones_like(part) for part in outputs]
        torch.autograd.grad(outputs, [*leaves, *self.weights], grads, allow_unused=True)


def parts_of(config: ExperimentConfig, batch: int) -> dict[str, Callable[[], object]]:
    """Name -> a call that runs one part of the step, forward and backward, on the inputs it has in the step."""
    training, inputs = step.start(config, None, CPU, lambda model: model), synthetic_inputs(config, batch, CPU)
    assert isinstance(training.model, SDAN)
    parts = network_parts(training.model, inputs, config)
    for parameter in training.model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def cast(run: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        def cast_run(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
            with autocast(config.train.precision, CPU):
                return run(*tensors)

        return cast_run

    runs: dict[str, Callable[[], object]] = {}
    for name, part in parts.items():
        part.run = cast(part.run)
        runs[name] = part.forward_backward
    whole = {"whole step": lambda: step.train_step(training, inputs, config, 1e-4)}
    return runs | {"optimizer": training.optimizer.step} | whole


def network_parts(model: SDAN, inputs: Inputs, config: ExperimentConfig) -> dict[str, Part]:
    """Name -> the part's function, its inputs in a step of `inputs`, and its parameters."""
    alignment, trunk = model.alignment, model.super_resolution
    learner = alignment.offset_learner
    assert isinstance(learner, OffsetLearner)  # paper_4x's

    def head(x: Tensor) -> Tensor:
        return model.head(x).relu()

    def reference(image: Tensor) -> Tensor:
        return alignment.reference_conv(with_flips(image)).relu()

    def deform(features: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        from sdan import network  # looked up at call time, since authors_way() replaces it

        moved = network.squared_deform_conv2d(features, offset, alignment.deform.weight, alignment.deform.bias).relu()
        return moved, alignment.to_rgb(moved)

    def body(features: Tensor) -> Tensor:
        return features + trunk.join(trunk.blocks(features))

    def loss(zoomed: Tensor, aligned: Tensor) -> Tensor:
        mask = offset_mask(offset.detach())
        output = SDANOutput(zoomed.float(), aligned.float(), mask, offset)
        return sdan_loss(output, inputs.oracle_reference, inputs.target, config.loss).total

    def own(*modules: nn.Module) -> tuple[nn.Parameter, ...]:
        return tuple(parameter for module in modules for parameter in module.parameters())

    with torch.no_grad(), autocast(config.train.precision, CPU):
        features, seen = head(inputs.x), reference(inputs.oracle_reference)
        both = torch.cat((features, seen), dim=1)
        hidden, offset = learner.conv1(both), learner(both)
        moved, aligned = deform(features, offset)
        deep = body(moved)
        zoomed = trunk.upsample(deep)
    return {
        "head": Part(head, (inputs.x,), own(model.head)),
        "flips, reference": Part(reference, (inputs.oracle_reference,), own(alignment.reference_conv)),
        "offset learner": Part(learner, (both,), own(learner)),
        "one of its two CPAs": Part(learner.attention1, (hidden,), own(learner.attention1)),
        "SDCN, X'": Part(deform, (features, offset), own(alignment.deform, alignment.to_rgb)),
        "body": Part(body, (moved,), own(trunk.blocks, trunk.join)),
        "tail": Part(trunk.upsample, (deep,), own(trunk.enlarge, trunk.last)),
        "loss": Part(loss, (zoomed, aligned)),
    }


def part_rows(seconds: float, batch: int = 4) -> Iterator[str]:
    torch.set_num_threads(2)
    paper = configs.paper_4x()
    paper = replace(paper, train=replace(paper.train, batch_per_worker=batch))
    plain = replace(paper, train=replace(paper.train, layout="contiguous"))
    half = replace(paper, train=replace(paper.train, precision="bf16"))

    def theirs(run: Callable[[], object]) -> Callable[[], object]:
        def patched() -> None:
            with authors_way():
                run()

        return patched

    columns = {
        "authors' way, fp32": {name: theirs(run) for name, run in parts_of(plain, batch).items()},
        "ours, fp32": parts_of(paper, batch),
        "ours, bf16": parts_of(half, batch),
    }
    yield f"| part, batch {batch} | {' | '.join(f'{name}, ms' for name in columns)} | share of ours, bf16 |"
    yield "|---" * (len(columns) + 2) + "|"
    rows: dict[str, dict[str, float]] = {}
    for part in columns["ours, fp32"]:
        rows[part] = best_ms({name: column[part] for name, column in columns.items()}, seconds)
    whole = rows["whole step"]["ours, bf16"]
    for part, ms in rows.items():
        cells = " | ".join(f"{ms[name]:.1f}" for name in columns)
        yield f"| {part} | {cells} | {100 * ms['ours, bf16'] / whole:.0f} % |"


def loader_rows(work: Path) -> Iterator[str]:
    """Rate of the loader alone, then of a training run that it feeds."""
    # Only this table needs Ray, which a GPU machine that is lent for a measurement may lack.
    from pipelines import cluster
    from pipelines.train import train
    from pipelines.training.run_folder import last_report
    from preprocessing.shards import PreprocessOptions, preprocess
    from preprocessing.simulator.sequences import simulate

    cluster.start_ray()
    simulate(work / "raw", sequences=3, width_px=1536, preset="tripod", seed=5)
    preprocess(str(work / "raw"), str(work / "shards"), PreprocessOptions(align="ecc", val=("00003",)), progress=False)
    yield "| config, batch | loader alone, crops/s | step, crops/s | loader / step | waiting for data |"
    yield "|---|---|---|---|---|"
    for name, batch, steps in (("paper_4x", 4, 6), ("starter", 8, 60)):
        base = configs.named(name)
        loss = replace(base.loss, self_target="pair", reference_weight=1.0) if name == "starter" else base.loss
        train_config = replace(
            base.train,
            epochs=3,
            crops_per_epoch=steps * batch,
            batch_per_worker=batch,
            precision="bf16",
            validate_every=3,
            val_crops=1,
        )
        config = replace(base, loss=loss, train=train_config)
        stream = CropStream(index_split(str(work / "shards"), "train"), 0, config.train.crop_px, augment=True)
        alone = _loader_rate(stream, config, batch)
        train(str(work / "shards"), config, data=work / "data", workers=1, name=name, register=None, progress=False)
        report = last_report(work / "data" / "runs" / name)
        rate, wait = report["crops_per_s"], report["data_wait"]
        cells = f"{alone:.0f} | {rate:.1f} | **{alone / rate:.0f}x** | **{100 * wait:.1f} %**"
        yield f"| {name}, {batch} | {cells} |"


def _loader_rate(stream: CropStream, config: ExperimentConfig, batch: int, crops: int = 800) -> float:
    """Crops per second, converted to the network's inputs. The first 10 batches, while readers start, do not count."""
    batches = training_batches(stream, batch=batch, rank=0, world=1, first_crop=0, last_crop=crops + 10 * batch)
    started = 0.0
    for number, crop in enumerate(batches):
        if number == 10:
            started = time.perf_counter()
        model_inputs(crop, config.model, CPU)
    return crops / (time.perf_counter() - started)


GPUS = {  # dense half-precision TFLOP/s with float32 accumulation, and GB/s, from the makers' data sheets
    "RTX 2080 Ti (fp16)": (53.8, 616),
    "A100 80 GB (bf16)": (312.0, 2039),
    "H100 SXM (bf16)": (989.0, 3350),
}
USABLE = 0.4
"""Assumed share of the published rates that training steps of such networks reach."""


def roofline_rows() -> Iterator[str]:
    """Expected rates from PyTorch's FLOP count and from each convolution reading and writing its features once."""
    config = configs.paper_4x()
    training, inputs = step.start(config, None, CPU, lambda model: model), synthetic_inputs(config, 1, CPU)
    moved = 0

    def count(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        moved += 2 * (given[0].numel() + output.numel())

    for module in training.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, authors_way():  # counts torchvision's operator as 0 FLOP
        step.training_loss(training.model, inputs, config.loss)["loss"].backward()
    sdcn = 2 * 3 * 64 * 64 * 9 * CROP_PX**2
    flop, bytes_moved = counter.get_total_flops() + sdcn, 3 * moved  # forward once, backward twice
    paper = PAPER_EPOCHS * PAPER_CROPS / (3600 * PAPER_HOURS * PAPER_GPUS)
    yield f"A crop of paper_4x, forward and backward: {flop / 1e9:.0f} GFLOP, {bytes_moved / 1e9:.2f} GB of features;"
    yield f"{100 * USABLE:.0f} % of the makers' rates are assumed. The paper's training, {PAPER_HOURS} hours on"
    crops = f"{PAPER_EPOCHS} epochs of about {PAPER_CROPS} crops"
    yield f"{PAPER_GPUS} 2080 Ti for {crops}, is {paper:.1f} crops/s per GPU.\n"
    yield "| GPU | compute, ms a crop | memory, ms a crop | expected crops/s | the paper's training on 8 of them |"
    yield "|---|---|---|---|---|"
    for name, (tflops, gb_s) in GPUS.items():
        compute, memory = flop / (USABLE * tflops * 1e9), bytes_moved / (USABLE * gb_s * 1e6)
        rate = 1e3 / max(compute, memory)
        minutes = PAPER_EPOCHS * PAPER_CROPS / (8 * rate) / 60
        yield f"| {name} | {compute:.2f} | {memory:.2f} | {rate:.0f} | {minutes:.0f} min |"


def cpu_tables(seconds: float, compiled: bool, work: Path) -> Tables:
    """The CPU's tables, with about `seconds` for each row; the loader's data goes below `work`."""
    return {
        "step": ("A training step of paper_4x", lambda: step_rows(seconds, compiled)),
        "parts": ("Time of each part", lambda: part_rows(seconds / 4)),
        "loader": ("The loader, 2 cores shared with the step", lambda: loader_rows(work)),
        "roofline": ("Expected on GPUs (roofline)", roofline_rows),
    }


def main() -> int:
    """Measure, print each row when it is ready, and update RESULTS.md; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="CPU: time per row, at least two turns each")
    parser.add_argument("--compiled", action="store_true", help="CPU: also time torch.compile (minutes of compiling)")
    with tempfile.TemporaryDirectory() as work:
        gpu.add_device_options(parser, cpu_tables(0.0, False, Path(work)), gpu.TRAINING)
        chosen = parser.parse_args()
        command = " ".join(["python benchmarks/training.py", *sys.argv[1:]])
        if chosen.device == "cuda":
            return gpu.run_some(gpu.TRAINING, chosen.only, command)
        origin = provenance(command, ("../sdan", "../pipelines"))
        publish("training", origin, cpu_tables(chosen.seconds, chosen.compiled, Path(work)), chosen.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
