"""`sdan demo`: the whole road, small, on this machine, from simulated RAW to a zoomed photograph."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipelines import cluster, registry
from pipelines import config as configs
from pipelines.evaluate import Evaluation, evaluate
from pipelines.scoring.pictures import labelled_grid
from pipelines.train import TrainResult, train, with_network_of
from pipelines.zoom import Zoomer, read_photo, write_png
from preprocessing.shards import PreprocessOptions, preprocess
from preprocessing.simulator.sequences import simulate
from sdan.baselines import bicubic

SEQUENCES = 10
HELD_OUT = ("00009", "00010")
PRESET = "tripod"
EVALUATED_CROPS = 64
REGISTERED = "sdan-demo"
"""The demo's model has a name of its own, so that it is never taken for one that was trained on your photographs."""
FINE_TUNING = {
    "train.epochs": 8,
    "train.restart_epochs": 8,
    "train.learning_rate": 5e-5,
    "train.crop_px": 32,
    "loss.align_weight": 0.2,
    "loss.self_reference_weight": 0.0,
}
"""What differs from config demo, which starts from nothing. Self-reference samples, held to the camera's JPG of the
input, would take back what the starter model can do (benchmarks/RESULTS.md); registered pairs do without them."""
OPTIONS = PreprocessOptions(scale=4, align="ecc", tile_px=40, stride_px=32, val=HELD_OUT)


@dataclass(frozen=True)
class DemoResult:
    """Where everything is."""

    starter: Evaluation
    """Of the model that was started from."""
    evaluation: Evaluation
    training: TrainResult
    pictures: list[Path]
    seconds: float


def run(data: Path, *, say: Callable[[str], None]) -> DemoResult:
    """Simulate -> preprocess -> fine-tune the starter model -> evaluate -> zoom, under `data`/demo.

    What is there already is kept.
    """
    started = time.perf_counter()
    folder = data / "demo"
    raw, shards, out = folder / "raw", folder / "shards", folder / "pictures"
    say(f"1/5 simulate: {SEQUENCES} zoom sequences, preset {PRESET} (simulated RAW + camera JPG) -> {raw}")
    cluster.start_ray()
    workers = cluster.workers_that_fit(2)
    with tqdm(total=SEQUENCES, desc="simulate", unit="sequence") as bar:
        simulate(raw, sequences=SEQUENCES, preset=PRESET, progress=lambda done, total: _move(bar, done))
    say(f"2/5 preprocess -> {shards}")
    report = preprocess(str(raw), str(shards), OPTIONS)
    say(f"    {report.written} pairs written, {report.skipped} there already, {len(report.quarantined)} set aside")
    config = with_network_of(registry.STARTER_FOLDER, configs.override(configs.demo(), FINE_TUNING), ())
    say(f"3/5 train: the starter model goes on, {config.train.epochs} epochs of {config.train.crops_per_epoch} crops")
    trained = train(
        str(shards), config, data=data, workers=workers, register=REGISTERED, init_from=registry.STARTER_FOLDER
    )
    say("4/5 evaluate on sequences that training has not seen")
    before = evaluate(str(shards), registry.STARTER_FOLDER, split="val", limit=EVALUATED_CROPS)
    result = evaluate(str(shards), trained.model, split="val", limit=EVALUATED_CROPS, out=out)
    say("5/5 zoom a held-out photograph 4x")
    zoomed = _zoom(raw / HELD_OUT[0], trained.model, out)
    return DemoResult(before, result, trained, [out / "examples.png", *zoomed], time.perf_counter() - started)


def _move(bar: tqdm, done: int) -> None:
    bar.update(done - bar.n)


def _zoom(sequence: Path, model: Path, out: Path) -> list[Path]:
    """Zoom the sequence's 50 mm frame (00005) and set its centre beside bicubic and the 240 mm frame's own picture."""
    zoomer = Zoomer.load(model)
    photo = read_photo(
        next(path for path in sequence.glob("00005.*") if path.suffix.lower() in (".dng", ".arw")),
        zoomer.model.config.input,
    )
    with tqdm(desc="zoom", unit="tile") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            _move(bar, done)

        image = zoomer.zoom(photo, progress)
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
