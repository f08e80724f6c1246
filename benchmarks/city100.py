"""Scores on real photographs: `python benchmarks/city100.py --data DIR --out DIR [--steps N]`; run it again to resume.

DIR holds pairs of City100's layout: NNNL.PNG (short focal length) and NNNH.PNG (long) of one scene on one grid. The
short picture holds about 1/2.9 of the long one's detail. Every third pair is judged, the others are for training.

The pairs go through `sdan preprocess` at 4x: the short picture is reduced 4x (304 x 217 of 1218 x 870 pixels), and the
long one is registered to it. Three methods are judged on whole tiles of the held-out pairs, against the long picture:

    bicubic    of the reduced short picture
    SRResNet   the trunk of starter-rgb's network, from scratch, L1
    SDAN       starter-rgb, fine-tuned; its reference is the input itself (self)

and starter-rgb as it is in the package. Both trainings see the same crops, N steps of 8. Real data: no truth, no ideal
picture. Tables and pictures are written to `--out`, nothing of DIR is stored in the repository.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import ray  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from results import provenance  # noqa: E402
from torch.nn.utils import clip_grad_norm_  # noqa: E402

from pipelines import cluster  # noqa: E402
from pipelines import config as configs  # noqa: E402
from pipelines.config import ExperimentConfig  # noqa: E402
from pipelines.evaluate import CONVENTIONS  # noqa: E402
from pipelines.loader import ShardIndex, index_split, model_inputs, training_stream  # noqa: E402
from pipelines.scoring.bootstrap import difference_interval, mean_interval  # noqa: E402
from pipelines.scoring.held_out import HeldOut, held_out  # noqa: E402
from pipelines.scoring.pictures import labelled_grid, to_uint8  # noqa: E402
from pipelines.scoring.scores import PerCrop, score_bicubic, score_model  # noqa: E402
from pipelines.training.step import training_loss  # noqa: E402
from preprocessing.shards import PreprocessOptions, preprocess  # noqa: E402
from sdan import checkpoint, starter_folder  # noqa: E402
from sdan.baselines import Network, SRResNet  # noqa: E402
from sdan.losses import LossConfig  # noqa: E402
from sdan.network import SDAN  # noqa: E402
from sdan.ops.precision import compute_plan  # noqa: E402
from sdan.resample import bicubic  # noqa: E402

START = "starter-rgb"
ZOOM = 2.9
"""The ratio of City100's focal lengths."""
TILE_PX, BATCH, PICTURES = 48, 8, 4
METRICS = ("raw_psnr", "raw_ssim", "raw_st_lpips")
JUDGED = 3
"""Every third pair is judged."""
RATES = {"SDAN": 1e-4, "SRResNet": 4e-4}


def make_shards(data: Path, out: Path) -> Path:
    """Link the pairs into folders train and val, and preprocess them; finished ones are skipped."""
    names = sorted(path.stem[:-1] for path in data.iterdir() if path.stem.endswith("H"))
    for number, name in enumerate(names, 1):
        folder = out / "pairs" / ("train" if number % JUDGED else "val")
        folder.mkdir(parents=True, exist_ok=True)
        for path in data.glob(f"{name}[HL].*"):
            if not (folder / path.name).exists():
                (folder / path.name).symlink_to(path.resolve())
    shards = out / "shards"
    options = PreprocessOptions(scale=4, align="ecc", tile_px=TILE_PX, stride_px=32, zoom=ZOOM)
    report = preprocess(str(out / "pairs"), str(shards), options, start_ray=cluster.start_ray)
    print(f"{report.written} pairs written, {report.fallbacks} not registered", flush=True)
    for entry in report.quarantined:
        print(f"set aside: {entry.sequence} {entry.pair}: {entry.reason}", flush=True)
    ray.shutdown()
    return shards


def config_of(name: str, seed: int) -> ExperimentConfig:
    """The training of one network: starter-rgb's architecture on pairs without an ideal picture."""
    base = configs.named(START)
    model = checkpoint.load(starter_folder(START)).model.config
    loss = LossConfig(kind="charbonnier", align_weight=0.2, self_reference_weight=1.0, border_px=16)
    if name == "SRResNet":
        loss = LossConfig(kind="l1", border_px=16)
    train = replace(base.train, crop_px=32, seed=seed, reduced_share=0.0, learning_rate=RATES[name])
    return replace(base, name=f"city100-{name}", model=model, loss=loss, train=train)


def trained(name: str, index: ShardIndex, out: Path, steps: int, seed: int) -> Network:
    """The network after `steps` steps; a finished training is read from `out`."""
    folder = out / f"{name}-{steps}-steps-seed-{seed}"
    if folder.is_dir():
        return checkpoint.load(folder).model
    config = config_of(name, seed)
    torch.manual_seed(seed)
    model: Network = SRResNet(config.model) if name == "SRResNet" else SDAN(config.model)
    if name == "SDAN":
        model.load_state_dict(checkpoint.load(starter_folder(START)).model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), config.train.learning_rate, betas=config.train.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    stream = training_stream(index, config)
    for step in range(steps):
        crops = [stream.crop(BATCH * step + number) for number in range(BATCH)]
        batch = {name: torch.stack([torch.from_numpy(crop[name]) for crop in crops]) for name in crops[0]}
        loss = training_loss(model, model_inputs(batch, config.model, torch.device("cpu")), config.loss)["loss"]
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            print(f"{name}: step {step} of {steps}, loss {float(loss.detach()):.4f}", flush=True)
    checkpoint.save(folder, model, config=configs.to_dict(config), scores={})
    return model.eval()


def judge(networks: dict[str, Network], held: HeldOut) -> dict[str, PerCrop]:
    """Label -> scores of each tile."""
    plan = compute_plan(torch.device("cpu"))
    scores = {"bicubic": score_bicubic(networks["SDAN (self)"], held, plan.device, "camera", perceptual=True)}
    for label, model in networks.items():
        found = score_model(model, held, plan, ("self",), perceptual=True)
        scores[label] = {name.removeprefix("self_"): values for name, values in found.items()}
        print(f"judged: {label}", flush=True)
    return scores


def table(scores: dict[str, PerCrop], held: HeldOut, footer: str) -> Iterator[str]:
    yield "| method | PSNR, dB | SSIM | ST-LPIPS | PSNR - bicubic's (95 %) | ST-LPIPS / bicubic's |"
    yield "|---|---|---|---|---|---|"
    base = scores["bicubic"]
    for label, found in scores.items():
        psnr, ssim, distance = (mean_interval(found[name], held.sequences).mean for name in METRICS)
        gain = difference_interval(found[METRICS[0]], base[METRICS[0]], held.sequences)
        share = distance / mean_interval(base[METRICS[2]], held.sequences).mean
        yield (
            f"| {label} | {psnr:.2f} | {ssim:.4f} | {distance:.4f} | {gain.mean:+.2f} ({gain.low:+.2f} to "
            f"{gain.high:+.2f}) | {share:.2f} |"
        )
    yield ""
    yield f"{footer} {CONVENTIONS}"


def sheet(networks: dict[str, Network], held: HeldOut) -> Image.Image:
    """Tiles of evenly spaced pairs: bicubic, the networks, the long picture."""
    plan = compute_plan(torch.device("cpu"))
    places = torch.linspace(0, len(held) - 1, PICTURES).round().long().tolist()
    rows = []
    for place in places:
        part = held.select(range(place, place + 1))
        inputs = model_inputs(part.batch, networks["SDAN (self)"].config, plan.device)
        panels = {"bicubic": bicubic(inputs.camera, 4)}
        for label, model in networks.items():
            with plan.inference():
                panels[label] = model(inputs.x, inputs.self_reference, inputs.rendering).zoomed
        panels["long focal length"] = inputs.target
        rows.append([to_uint8(panel[0]) for panel in panels.values()])
    return Image.fromarray(labelled_grid(rows, list(panels), "4x zoom of held-out City100 pairs (real)"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of NNNL.PNG and NNNH.PNG")
    parser.add_argument("--out", type=Path, required=True, help="folder for shards, networks, table and pictures")
    parser.add_argument("--steps", type=int, default=2000, help="steps of each training; 0: only make the shards")
    parser.add_argument("--tiles", type=int, help="the largest number of judged tiles; default: all")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    options = f"--steps {asked.steps} --seed {asked.seed}" + (f" --tiles {asked.tiles}" if asked.tiles else "")
    origin = provenance(f"python benchmarks/city100.py {options}", ("../sdan", "../pipelines", "../preprocessing"))
    shards = make_shards(asked.data, asked.out)
    if not asked.steps:
        return
    index = index_split(str(shards), "train")
    networks: dict[str, Network] = {
        "SRResNet (L1)": trained("SRResNet", index, asked.out, asked.steps, asked.seed),
        f"{START}, as it is": checkpoint.load(starter_folder(START)).model,
        "SDAN (self)": trained("SDAN", index, asked.out, asked.steps, asked.seed),
    }
    config = config_of("SDAN", asked.seed)
    config = replace(config, train=replace(config.train, crop_px=TILE_PX))
    held = held_out(index_split(str(shards), "val"), config, limit=asked.tiles, align=False)
    footer = (
        f"Real photographs: {len(index.paths)} pairs for training, {len(set(held.sequences))} judged, "
        f"{len(held)} tiles; {asked.steps} steps of {BATCH} crops each, seed {asked.seed}."
    )
    lines = [*table(judge(networks, held), held, footer), "", origin]
    (asked.out / "table.md").write_text("\n".join(lines) + "\n")
    sheet(networks, held).save(asked.out / "tiles.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
