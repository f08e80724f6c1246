"""A training step beside the authors' way, where its time goes, and the loader: `python benchmarks/training.py` (CPU).

"Step" is `pipelines.training.step.train_step` of config `paper_4x` (64 features, 16 blocks, 128 x 128 mosaic
crops, 512 x 512 targets): forward, eq. 6, backward, Adam. "Authors' way" is the same network with torchvision's
operator on the repeated offset and explicit attention, in float32, contiguous; ours is channels-last unless it says
otherwise. Contestants of a row take turns; the best time of each counts.
The parts are timed one by one with their inputs cut off, forward and backward, in milliseconds a step. The loader runs
on simulated 1536 px wide shards. The roofline multiplies counted work with GPUs' published rates: nothing in it was
measured on a GPU. The tables replace their section of benchmarks/RESULTS.md.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from operators import Tables, authors_way, best_ms, provenance, publish  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from pipelines import cluster  # noqa: E402
from pipelines import config as configs  # noqa: E402
from pipelines.config import RunConfig  # noqa: E402
from pipelines.loader import CropStream, Inputs, index_split, model_inputs, training_batches  # noqa: E402
from pipelines.train import train  # noqa: E402
from pipelines.training import step  # noqa: E402
from pipelines.training.progress import last_report  # noqa: E402
from preprocessing.shards import PreprocessOptions, preprocess  # noqa: E402
from preprocessing.simulator.sequences import simulate  # noqa: E402
from sdan.losses import low_pass, sdan_loss  # noqa: E402
from sdan.network import SDANOutput, with_flips  # noqa: E402
from sdan.ops import offset_mask  # noqa: E402
from sdan.ops.precision import autocast  # noqa: E402

CPU = torch.device("cpu")
CROP_PX = 128
"""Side of the paper's crop, mosaic pixels."""
PAPER_HOURS, PAPER_GPUS, PAPER_EPOCHS, PAPER_CROPS = 5, 8, 300, 1200
"""What the paper says of its training; crops an epoch: one for each of 3 pairs of about 400 sequences."""
WAYS: dict[str, dict[str, object]] = {
    "fp32": {},
    "fp32, contiguous": {"layout": "contiguous"},
    "bf16": {"precision": "bf16"},
    "bf16, contiguous": {"precision": "bf16", "layout": "contiguous"},
}
COMPILED: dict[str, dict[str, object]] = {"bf16, compiled": {"precision": "bf16", "compile": True}}


def made_up(batch: int, seed: int = 0) -> Inputs:
    """Smooth pictures of the paper's sizes."""
    random = torch.Generator().manual_seed(seed)
    target = nn.functional.interpolate(torch.rand(batch, 3, 64, 64, generator=random), size=4 * CROP_PX, mode="bicubic")
    target = target.clamp(0, 1)
    low = low_pass(target, 4)
    return Inputs(low[:, 1:2].contiguous(), low, low, low, low, target, None)


def start(changes: dict[str, object], batch: int) -> Callable[[], object]:
    """A training step of paper_4x, ready to run again and again."""
    paper = configs.paper_4x()
    config = replace(paper, train=replace(paper.train, batch_per_worker=batch, **changes))  # type: ignore[arg-type]
    training, inputs = step.start(config, None, CPU, lambda model: model), made_up(batch)
    return lambda: step.train_step(training, inputs, config, 1e-4)


def authors_step(batch: int) -> Callable[[], object]:
    ours = start({"layout": "contiguous"}, batch)

    def run() -> None:
        with authors_way():
            ours()

    return run


def step_rows(seconds: float, compiled: bool) -> Iterator[str]:
    ways = WAYS | (COMPILED if compiled else {})
    names = " | ".join(f"{name}, s" for name in ways)
    yield f"| batch | threads | authors' way, s | {names} | authors' / best of ours |"
    yield "|---" * (len(ways) + 4) + "|"
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for batch in (1, 4):
            steps = {"authors": authors_step(batch)} | {name: start(way, batch) for name, way in ways.items()}
            ms = best_ms(steps, seconds)
            best = min(ms[name] for name in ways)
            cells = [f"{value / 1e3:.2f} ({ms['authors'] / value:.1f}x)" for name, value in ms.items() if name in ways]
            head = f"| {batch} | {threads} | {ms['authors'] / 1e3:.2f} "
            yield f"{head}| {' | '.join(cells)} | **{ms['authors'] / best:.1f}x** |"


@dataclass
class Part:
    """A stretch of the step, on its own: what it is fed, and the parameters it holds."""

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    weights: tuple[nn.Parameter, ...] = ()

    def both_ways(self) -> None:
        leaves = [tensor.detach().requires_grad_() for tensor in self.inputs]
        results = self.run(*leaves)
        outputs = [part for part in (results if isinstance(results, tuple) else (results,)) if part.requires_grad]
        grads = [torch.ones_like(part) for part in outputs]
        torch.autograd.grad(outputs, [*leaves, *self.weights], grads, allow_unused=True)


def parts_of(config: RunConfig, batch: int) -> dict[str, Callable[[], object]]:
    """Every part of a step with the inputs that it has there."""
    training, inputs = step.start(config, None, CPU, lambda model: model), made_up(batch)
    model, optimizer = training.model, training.optimizer
    alignment, trunk = model.alignment, model.super_resolution
    learner = alignment.offset_learner

    def cast(run: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        def cast_run(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
            with autocast(config.train.precision, CPU):
                return run(*tensors)

        return cast_run

    def head(x: Tensor) -> Tensor:
        return model.head(x).relu()

    def reference(image: Tensor) -> Tensor:
        return alignment.reference_conv(with_flips(image)).relu()

    def deform(features: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        from sdan import network  # looked up late: the authors' way replaces it there

        moved = network.squared_deform_conv2d(features, offset, alignment.deform.weight, alignment.deform.bias).relu()
        return moved, alignment.to_rgb(moved)

    def body(features: Tensor) -> Tensor:
        return features + trunk.join(trunk.blocks(features))

    def tail(features: Tensor) -> Tensor:
        for conv in trunk.enlarge:
            features = trunk.activation(nn.functional.pixel_shuffle(conv(features), 2))
        return nn.functional.pixel_shuffle(trunk.last(features), trunk.shuffle)

    def loss(zoomed: Tensor, aligned: Tensor) -> Tensor:
        mask = offset_mask(offset.detach(), 3)
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
        zoomed = tail(deep)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found = {
        "head": Part(head, (inputs.x,), own(model.head)),
        "flips, reference": Part(reference, (inputs.oracle_reference,), own(alignment.reference_conv)),
        "offset learner": Part(learner, (both,), own(learner)),
        "of it one of two CPA": Part(learner.attention1, (hidden,), own(learner.attention1)),
        "SDCN, X'": Part(deform, (features, offset), own(alignment.deform, alignment.to_rgb)),
        "body": Part(body, (moved,), own(trunk.blocks, trunk.join)),
        "tail": Part(tail, (deep,), own(trunk.enlarge, trunk.last)),
        "loss": Part(loss, (zoomed, aligned)),
    }
    runs: dict[str, Callable[[], object]] = {}
    for name, part in found.items():
        part.run = cast(part.run)
        runs[name] = part.both_ways
    return runs | {"optimizer": optimizer.step, "whole step": lambda: step.train_step(training, inputs, config, 1e-4)}


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
    """The loader by itself, then a training that it feeds."""
    cluster.start_ray()
    simulate(work / "raw", sequences=3, width_px=1536, preset="tripod", seed=5)
    preprocess(str(work / "raw"), str(work / "shards"), PreprocessOptions(align="ecc", val=("00003",)), progress=False)
    yield "| config, batch | loader alone, crops/s | step, crops/s | loader / step | waiting for data |"
    yield "|---|---|---|---|---|"
    for name, batch, steps in (("paper_4x", 4, 6), ("starter", 8, 60)):
        base = configs.named(name)
        loss = replace(base.loss, self_target="pair", reference_weight=1.0) if name == "starter" else base.loss
        settings = {
            "epochs": 3,
            "crops_per_epoch": steps * batch,
            "batch_per_worker": batch,
            "precision": "bf16",
            "validate_every": 3,
            "val_crops": 1,
        }
        config = replace(base, loss=loss, train=replace(base.train, **settings))
        stream = CropStream(index_split(str(work / "shards"), "train"), 0, config.train.crop_px, augment=True)
        alone = _loader_rate(stream, config, batch)
        train(str(work / "shards"), config, data=work / "data", workers=1, name=name, register=None, progress=False)
        report = last_report(work / "data" / "runs" / name)
        rate, wait = report["crops_per_s"], report["data_wait"]
        cells = f"{alone:.0f} | {rate:.1f} | **{alone / rate:.0f}x** | **{100 * wait:.1f} %**"
        yield f"| {name}, {batch} | {cells} |"


def _loader_rate(stream: CropStream, config: RunConfig, batch: int, crops: int = 800) -> float:
    """Crops a second, decoded, cut and brought into the network's form; without the first ones, while readers start."""
    batches = training_batches(stream, batch=batch, rank=0, world=1, first_crop=0, last_crop=crops + 10 * batch)
    started = 0.0
    for number, crop in enumerate(batches):
        if number == 10:
            started = time.perf_counter()
        model_inputs(crop, config.model, CPU)
    return crops / (time.perf_counter() - started)


GPUS = {  # dense half-precision TFLOP/s with float32 sums, GB/s: the makers' data sheets
    "RTX 2080 Ti (fp16)": (53.8, 616),
    "A100 80 GB (bf16)": (312.0, 2039),
    "H100 SXM (bf16)": (989.0, 3350),
}
USABLE = 0.4
"""Share of the published rates that well-fed training steps of such networks reach; an assumption."""


def roofline_rows() -> Iterator[str]:
    """FLOP counted by PyTorch, bytes as if every layer read its input and wrote its output once, in half precision."""
    config = configs.paper_4x()
    training, inputs = step.start(config, None, CPU, lambda model: model), made_up(1)
    moved = 0

    def count(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        moved += 2 * (given[0].numel() + output.numel())

    for module in training.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, authors_way():  # counts torchvision's operator as nothing
        step.training_loss(training.model, inputs, config.loss)["loss"].backward()
    sdcn = 2 * 3 * 64 * 64 * 9 * CROP_PX**2
    flop, bytes_moved = counter.get_total_flops() + sdcn, 3 * moved  # forward once, backward twice
    paper = PAPER_EPOCHS * PAPER_CROPS / (3600 * PAPER_HOURS * PAPER_GPUS)
    yield f"A crop of paper_4x, forward and backward: {flop / 1e9:.0f} GFLOP, {bytes_moved / 1e9:.2f} GB of features;"
    yield f"{100 * USABLE:.0f} % of the makers' rates are counted on. The paper's own training, {PAPER_HOURS} hours on"
    yield f"{PAPER_GPUS} 2080 Ti for {PAPER_EPOCHS} epochs of some {PAPER_CROPS} crops, is {paper:.1f} crops/s a GPU.\n"
    yield "| GPU | compute, ms a crop | memory, ms a crop | expected crops/s | the paper's training on 8 of them |"
    yield "|---|---|---|---|---|"
    for name, (tflops, gb_s) in GPUS.items():
        compute, memory = flop / (USABLE * tflops * 1e9), bytes_moved / (USABLE * gb_s * 1e6)
        rate = 1e3 / max(compute, memory)
        minutes = PAPER_EPOCHS * PAPER_CROPS / (8 * rate) / 60
        yield f"| {name} | {compute:.2f} | {memory:.2f} | {rate:.0f} | {minutes:.0f} min |"


def main() -> None:
    """Measure, print as it goes, and update RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="time per row beyond the two turns that each takes")
    parser.add_argument("--compiled", action="store_true", help="torch.compile as well (minutes of compiling)")
    parser.add_argument("--only", choices=["step", "parts", "loader", "roofline"], help="one table, printed")
    chosen = parser.parse_args()
    origin = provenance(" ".join(["python benchmarks/training.py", *sys.argv[1:]]), ("../sdan", "../pipelines"))
    with tempfile.TemporaryDirectory() as work:
        tables: Tables = {
            "step": ("A training step of paper_4x", lambda: step_rows(chosen.seconds, chosen.compiled)),
            "parts": ("Where its time goes", lambda: part_rows(chosen.seconds / 4)),
            "loader": ("The loader, 2 cores shared with the step", lambda: loader_rows(Path(work))),
            "roofline": ("What GPUs should make of it, on paper", roofline_rows),
        }
        publish("training", origin, tables, chosen.only)


if __name__ == "__main__":
    main()
