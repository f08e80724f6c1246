"""`sdan demo`: every stage at a small size on this machine, from simulated RAW to a zoomed photograph."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipelines import cluster
from pipelines import config as configs
from pipelines.evaluate import Evaluation, evaluate
from pipelines.monitoring.published import pair_finished
from pipelines.scoring.pictures import labelled_grid
from pipelines.train import TrainResult, train, with_network_of
from pipelines.zoom import Zoomer, move_bar, read_photo, write_png
from preprocessing.shards import PreprocessOptions, preprocess
from preprocessing.simulator.sequences import simulate
from sdan import checkpoint, starter_folder
from sdan.resample import bicubic

PRESET = "tripod"
REGISTERED = "sdan-demo"
"""Registered model of the demo; its own name keeps it apart from models trained on real photographs."""
FINE_TUNING = {
    "train.learning_rate": 5e-5,
    "train.crop_px": 32,
    "loss.align_weight": 0.2,
    "loss.self_reference_weight": 0.0,
}
"""Changes to config demo, which trains from scratch. Self-reference samples compare the output with the input's camera
JPG, which makes the starter model worse (benchmarks/RESULTS.md); registered pairs do not need them."""
OPTIONS = PreprocessOptions(scale=4, align="ecc", tile_px=40, stride_px=32)


@dataclass(frozen=True)
class Size:
    """How much the demo does."""

    folder: str
    """Below DATA."""
    sequences: int
    held_out: tuple[str, ...]
    """The sequences to evaluate on."""
    epochs: int
    crops: int
    """Evaluated crops."""


FULL = Size("demo", 10, ("00009", "00010"), 8, 64)
QUICK = Size("demo-quick", 4, ("00004",), 2, 16)


@dataclass(frozen=True)
class DemoResult:
    """Scores and where to find everything."""

    starter: Evaluation
    """Scores of the starter model, before fine-tuning."""
    evaluation: Evaluation
    """Scores of the fine-tuned model."""
    training: TrainResult
    pictures: list[Path]
    seconds: float


def run(data: Path, *, say: Callable[[str], None], size: Size = FULL) -> DemoResult:
    """Simulate -> preprocess -> fine-tune the starter model -> evaluate -> zoom, below `data`.

    Sequences and shards of an earlier demo are kept.

    Args:
        say: takes one line per stage.
    """
    started = time.perf_counter()
    folder = data / size.folder
    raw, shards, out = folder / "raw", folder / "shards", folder / "pictures"
    say(f"1/5 simulate: {size.sequences} zoom sequences, preset {PRESET} (simulated RAW + camera JPG) -> {raw}")
    cluster.start_ray()
    workers = cluster.workers_that_fit(2)
    with tqdm(total=size.sequences, desc="simulate", unit="sequence") as bar:
        simulate(raw, sequences=size.sequences, preset=PRESET, progress=partial(move_bar, bar))
    say(f"2/5 preprocess -> {shards}")
    starter = checkpoint.load(starter_folder())
    options = replace(OPTIONS, curve=starter.model.config.rendering_curve, val=size.held_out)
    report = preprocess(str(raw), str(shards), options, start_ray=cluster.start_ray, on_pair=pair_finished)
    say(f"    {report.written} pairs written, {report.skipped} finished earlier, {len(report.quarantined)} set aside")
    look = configs.from_dict(starter.config).train.look
    changes = FINE_TUNING | {"train.epochs": size.epochs, "train.restart_epochs": size.epochs, "train.look": look}
    config = with_network_of(starter_folder(), configs.override(configs.demo(), changes), ())
    say(f"3/5 train: fine-tune the starter model, {config.train.epochs} epochs of {config.train.crops_per_epoch} crops")
    trained = train(str(shards), config, data=data, workers=workers, register=REGISTERED, init_from=starter_folder())
    say("4/5 evaluate on held-out sequences")
    score = partial(evaluate, str(shards), split="val", limit=size.crops, perceptual=False)  # for speed
    before, result = score(starter_folder()), score(trained.model, out=out)
    say("5/5 zoom a held-out photograph 4x")
    zoomed = _zoom(raw / size.held_out[0], trained.model, out)
    return DemoResult(before, result, trained, [out / "examples.png", *zoomed], time.perf_counter() - started)


def summary(result: DemoResult, data: Path) -> str:
    """What `sdan demo` prints at the end: scores, pictures, and the next commands."""
    started = result.starter.rows["SDAN (self)"]
    before = ", ".join(f"{target} {started[f'{target}_psnr']:.2f} dB" for target in result.starter.targets)
    model = result.training.model
    lines = [
        f"\nHeld-out sequences:\n\n{result.evaluation.table()}\n",
        f"The starter model before fine-tuning (self): {before}\n",
        *(f"picture: {path}" for path in result.pictures),
        f"model:   {model}",
        f"zoom:    sdan zoom PHOTO -o zoomed.png --model {model}",
        f"MLflow:  sdan --data {data} ui   (or: make ui), then open the address that it prints",
        f"done in {result.seconds / 60:.1f} minutes",
    ]
    return "\n".join(lines)


def _zoom(sequence: Path, model: Path, out: Path) -> list[Path]:
    """Zoom the sequence's 50 mm frame (00005), and write a picture of its centre beside bicubic."""
    zoomer = Zoomer.load(model)
    photo = read_photo(
        next(path for path in sequence.glob("00005.*") if path.suffix.lower() in (".dng", ".arw")),
        zoomer.model.config,
    )
    with tqdm(desc="zoom", unit="tile") as bar:
        image = zoomer.zoom(photo, partial(move_bar, bar))
    full = out / "zoomed_4x.png"
    write_png(image, full)
    plain = bicubic(photo.rendering[None], zoomer.model.config.scale)[0].permute(1, 2, 0).clamp(0, 1).numpy()
    strip = out / "zoom_centre.png"
    panels = [_centre(plain), _centre(image)]
    Image.fromarray(labelled_grid([panels], ["bicubic of the rendering", "SDAN"], "4x zoom, centre (simulated)")).save(
        strip
    )
    return [strip, full]


def _centre(image_HW3: np.ndarray, side_px: int = 640) -> np.ndarray:
    top, left = (image_HW3.shape[0] - side_px) // 2, (image_HW3.shape[1] - side_px) // 2
    return (image_HW3[top : top + side_px, left : left + side_px] * 255).round().astype(np.uint8)
