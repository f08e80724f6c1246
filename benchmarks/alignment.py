"""Learning to align pairs that nobody registered: `python benchmarks/alignment.py --preset default --out DIR`.

Simulates zoom sequences of one preset, makes shards with `--align scale` (the paper's setting: the focal lengths
only), trains one small network per row on them, and scores it on held-out sequences all along. Run it again to resume:
finished sequences, shards and scored steps are kept. `--rows` chooses rows, so that several processes can share the
work; without it the table and the curve of all rows found below DIR are written to benchmarks/RESULTS.md.

    paper       the paper's network: CPA offsets, no skip
    packing     the paper's offset learner, with skip="rendering"
    srresnet    the same trunk without alignment, L1, with skip="rendering"
    pyramid     ours: the pyramid, taught by known shifts, with skip="rendering"

All rows have the same trunk, crops, seed, learning rate and look (the rendering's tones). Errors of offsets are means
over pixels whose true position lies inside the crop, in mosaic pixels. "Gain" is the alignment gain: how much nearer
the bicubic camera JPG, moved by the offsets, comes to the target as shot, beside what the true offsets would give.
"Wrong reference" is the PSNR of the output to the target of *another* scene, whose picture is given as reference, minus
bicubic's: above 0, the reference's picture leaks into the output.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from results import provenance, update_section  # noqa: E402
from torchvision.utils import flow_to_image  # noqa: E402

from pipelines import config as configs  # noqa: E402
from pipelines.config import ExperimentConfig  # noqa: E402
from pipelines.loader import CropStream, index_split, model_inputs, training_stream  # noqa: E402
from pipelines.scoring.held_out import HeldOut, held_out  # noqa: E402
from pipelines.scoring.pictures import labelled_grid, to_uint8  # noqa: E402
from pipelines.scoring.scores import BORDER_PX, mean_scores, score_bicubic, score_model  # noqa: E402
from pipelines.training import step  # noqa: E402
from preprocessing.pairs import process  # noqa: E402
from preprocessing.plan import PreprocessOptions, make_plan  # noqa: E402
from preprocessing.simulator.sequences import simulate  # noqa: E402
from preprocessing.storage import open_folder  # noqa: E402
from sdan import checkpoint  # noqa: E402
from sdan.baselines import Network, SRResNet  # noqa: E402
from sdan.metrics import psnr  # noqa: E402
from sdan.ops.precision import ComputePlan  # noqa: E402
from sdan.resample import bicubic  # noqa: E402

CPU = torch.device("cpu")
WIDTH_PX = 1536
OPTIONS = PreprocessOptions(scale=4, align="scale", tile_px=48, stride_px=24)
MAX_SHIFT_PX = {"perfect": 8, "tripod": 8, "default": 12, "handheld": 24, "wide": 24}
"""model.max_shift_px by preset: what 95 % of the true shifts stay below, mosaic pixels."""
SEEDS = {"train": 2001, "val": 2002}
"""Of the simulated sequences: no scene is in both splits."""
COMMON: dict[str, object] = {
    "model.input": "packed",
    "model.features": 24,
    "model.blocks": 4,
    "model.packing_kernel": 4,
    "model.upsampling": "direct",
    "loss.self_reference_weight": 0.0,
    "train.look": "rendering",
    "train.crop_px": 32,
    "train.learning_rate": 1e-3,
    "train.warmup_steps": 50,
    "train.grad_clip": 1.0,
    "train.ema_decay": 0.995,
    "train.precision": "fp32",
    "train.epochs": 1,
    "train.restart_epochs": 1,
}
ROWS: dict[str, dict[str, object]] = {
    "paper": {"model.skip": "none"},
    "packing": {},
    "srresnet": {},
    "pyramid": {
        "model.offset_learner": "pyramid",
        "loss.known_shift_weight": 0.1,
        "loss.offset_smoothness_weight": 0.01,
    },
}
NAMES = {
    "paper": "the paper's network",
    "packing": "the paper's offset learner, skip",
    "srresnet": "SRResNet, L1, skip",
    "pyramid": "ours: pyramid, known shifts, skip",
}


def make_shards(
    preset: str,
    out: Path,
    sequences: dict[str, int],
    *,
    options: PreprocessOptions = OPTIONS,
    width_px: int = WIDTH_PX,
    shards: Path | None = None,
) -> str:
    """Simulate and preprocess what is missing; the folder of shards.

    Args:
        sequences: split -> number of sequences.
        shards: OUT/shards by default.
    """
    raw, shards = out / "raw", shards or out / "shards"
    for split, count in sequences.items():
        simulate(raw / split, sequences=count, width_px=width_px, preset=preset, seed=SEEDS[split])
        source, target = open_folder(str(raw / split)), open_folder(str(shards))
        for job in make_plan(source, options, {}).jobs:
            job = replace(job, split=split, sequence=f"{split}{job.sequence}")
            if not (shards / job.shard).exists():
                result = process(job, source, target, options)
                print(job.shard, result.status, result.reason or f"{result.rows} tiles", flush=True)
    return str(shards)


def row_config(row: str, crops: int, batch: int, seed: int, changes: dict[str, Any]) -> ExperimentConfig:
    """The config of a row. `changes`: dotted name -> value."""
    budget = {"train.crops_per_epoch": crops, "train.batch_per_worker": batch, "train.seed": seed}
    return configs.override(configs.srraw_4x(), COMMON | ROWS[row] | budget | changes)


def start(row: str, config: ExperimentConfig) -> step.Training:
    """The row's network with its optimizer."""
    chosen = replace(config, architecture="SRResNet") if row == "srresnet" else config
    return step.start(chosen, None, CPU, lambda model: model)


def train_row(
    label: str, row: str, config: ExperimentConfig, shards: str, held: HeldOut, out: Path, every: int
) -> None:
    """Train one row, and append its scores to DIR/curves/LABEL.jsonl every `every` crops."""
    curve, folder = out / "curves" / f"{label}.jsonl", out / "checkpoints" / label
    curve.parent.mkdir(parents=True, exist_ok=True)
    training, stream = start(row, config), training_stream(index_split(shards, "train"), config)
    if (folder / "trainer.pt").exists():
        training.restore(folder)
    else:
        curve.unlink(missing_ok=True)
        append(curve, {"row": row, "crops": 0, **scores_of(training.averaged, held, training.plan)})
    last, batch = config.train.crops_per_epoch or 0, config.train.batch_per_worker
    while training.crops < last:
        terms = train_until(training, stream, config, min(training.crops + every, last), batch)
        scores = scores_of(training.averaged, held, training.plan)
        append(curve, {"row": row, "crops": training.crops, **terms, **scores})
        checkpoint.save(
            folder, training.averaged, config=configs.to_dict(config), scores=scores, trainer_state=training.state()
        )
        shown = ("oracle_epe_inside_px", "oracle_alignment_gain", "oracle_raw_psnr", "self_true_psnr")
        print(label, training.crops, {name: round(scores[name], 3) for name in shown}, terms, flush=True)


def append(curve: Path, line: dict[str, Any]) -> None:
    """Add a line of scores to a curve."""
    with curve.open("a") as file:
        file.write(json.dumps(line) + "\n")


def train_until(
    training: step.Training, stream: CropStream, config: ExperimentConfig, last: int, batch: int
) -> dict[str, float]:
    """Train to `last` crops; the mean loss terms."""
    sums: dict[str, float] = {}
    steps = 0
    total = config.train.crops_per_epoch or 1
    while training.crops < last:
        crops = [stream.crop(training.crops + number) for number in range(batch)]
        stacked = {name: torch.stack([torch.from_numpy(crop[name]) for crop in crops]) for name in crops[0]}
        # restart_epochs is 1: one period of the cosine for the whole budget.
        rate = step.learning_rate(training.step, min(training.crops / total, 0.999), config.train)
        terms = step.train_step(training, model_inputs(stacked, config.model, CPU), config, rate)
        training.crops += batch
        steps += 1
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return {name: round(value / max(steps, 1), 5) for name, value in sums.items()}


def scores_of(model: Network, held: HeldOut, plan: ComputePlan) -> dict[str, float]:
    """Means over the held-out crops of both protocols' scores, and of the wrong-reference test."""
    return mean_scores(score_model(model, held, plan)) | {"wrong_reference_db": wrong_reference(model, held, plan)}


@torch.no_grad()
def wrong_reference(model: Network, held: HeldOut, plan: ComputePlan, batch: int = 8) -> float:
    """PSNR to another scene's target, given that target as reference, minus bicubic's; dB, mean over the crops."""
    inputs = model_inputs(held.batch, model.config, CPU)
    half = len(held) // 2  # crops are in the order of their sequences
    reference, target = (torch.roll(picture, half, 0) for picture in (inputs.oracle_reference, inputs.target))
    gains = []
    for first in range(0, len(held), batch):
        some = slice(first, first + batch)
        with plan.inference():
            zoomed = model(inputs.x[some], reference[some], inputs.rendering[some]).zoomed
        plain = bicubic(inputs.rendering[some], model.config.scale)
        found, base = (psnr(each.float().clamp(0, 1), target[some], border_px=BORDER_PX) for each in (zoomed, plain))
        gains += (found - base).tolist()
    return sum(gains) / len(gains)


def read_curves(out: Path) -> dict[str, list[dict[str, float]]]:
    """Label -> its scores through training."""
    files = sorted((out / "curves").glob("*.jsonl"))
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


@torch.no_grad()
def picture(out: Path, held: HeldOut, file: Path, count: int = 3) -> None:
    """Offsets of the rows' last checkpoints as colours, beside the true ones; the crops with median true shifts."""
    lengths = held.batch["true_flow"].float().norm(dim=1).mean((1, 2))
    chosen = lengths.argsort()[len(held) // 2 : len(held) // 2 + count].sort().values
    batch = {name: value[chosen] for name, value in held.batch.items()}
    config = row_config("paper", 1, 1, 0, {})
    inputs = model_inputs(batch, config.model, CPU)
    fields = {"true": 2 * batch["true_flow"].float()}  # mosaic pixels, as all below
    moved = {}
    for folder in sorted((out / "checkpoints").iterdir()):
        stored = checkpoint.load(folder)
        if stored.model.offset_channels or stored.model.config.offset_learner == "pyramid":
            output = stored.model(inputs.x, inputs.oracle_reference, inputs.rendering)
            fields[folder.name], moved[folder.name] = 2 * output.offset.float(), output.aligned
    largest = fields["true"].norm(dim=1).max()
    # flow_to_image takes (dx, dy) and scales each batch to its largest value, so all fields are one batch.
    scaled = [
        (field * (largest / field.norm(dim=1, keepdim=True).clamp_min(1e-6)).clamp(max=1)).flip(1)
        for field in fields.values()
    ]
    colours = (flow_to_image(torch.cat(scaled)).float() / 255).chunk(len(scaled))
    cells = {"input": inputs.rendering, "reference Y'": inputs.oracle_reference}
    cells |= {f"offsets, {name}": each for name, each in zip(fields, colours, strict=True)}
    cells |= {f"X', {name}": each for name, each in moved.items()}
    cells = {name: F.interpolate(images, size=160, mode="nearest") for name, images in cells.items()}
    rows = [[to_uint8(images[number]) for images in cells.values()] for number in range(count)]
    title = f"simulated, preset {out.name}; colour: direction, saturation: length up to {float(largest):.1f} mosaic px"
    Image.fromarray(labelled_grid(rows, list(cells), title)).save(file)


COLUMNS = {
    "crops": ("crops", "{:.0f}"),
    "offsets' error, px": ("oracle_epe_inside_px", "{:.2f}"),
    "roughness": ("oracle_offset_roughness", "{:.3f}"),
    "gain, dB": ("oracle_alignment_gain", "{:+.2f}"),
    "of true offsets": ("oracle_true_alignment_gain", "{:+.2f}"),
    "oracle raw": ("oracle_raw_psnr", "{:.2f}"),
    "self aligned": ("self_aligned_psnr", "{:.2f}"),
    "self true": ("self_true_psnr", "{:.2f}"),
    "{X, X} offsets, px": ("self_offset_px", "{:.2f}"),
    "wrong reference, dB": ("wrong_reference_db", "{:+.2f}"),
}


def table(out: Path, held: HeldOut) -> Iterator[str]:
    """The last scores of each row, below bicubic's."""
    yield "| row | " + " | ".join(COLUMNS) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    plain = SRResNet(row_config("srresnet", 1, 1, 0, {}).model)
    for source in ("camera", "rendering"):
        scores = mean_scores(score_bicubic(plain, held, CPU, source))
        values = {f"{protocol}_{name}": value for protocol in ("self", "oracle") for name, value in scores.items()}
        yield row_text(f"bicubic of the {source}", values)
    for label, lines in read_curves(out).items():
        values = lines[-1]
        hidden = ("oracle_offset_roughness", "self_offset_px") if values["row"] == "srresnet" else ()
        yield row_text(NAMES.get(label, label), {name: value for name, value in values.items() if name not in hidden})


def row_text(name: str, values: dict[str, float]) -> str:
    cells = (form.format(values[key]) if key in values else "" for key, form in COLUMNS.values())
    return f"| {name} | " + " | ".join(cells) + " |"


def curve_rows(out: Path, most: int = 12) -> Iterator[str]:
    """Offsets' error / self true PSNR through training."""
    curves = read_curves(out)
    steps = sorted({int(line["crops"]) for lines in curves.values() for line in lines})
    steps = [steps[round(place * (len(steps) - 1) / max(most - 1, 1))] for place in range(most)]
    yield "| crops | " + " | ".join(f"{NAMES.get(label, label)}: px / dB" for label in curves) + " |"
    yield "|---" * (len(curves) + 1) + "|"
    for crops in sorted(set(steps)):
        at = [next((line for line in lines if line["crops"] == crops), None) for lines in curves.values()]
        cells = (f"{a['oracle_epe_inside_px']:.2f} / {a['self_true_psnr']:.2f}" if a else "" for a in at)
        yield f"| {crops} | " + " | ".join(cells) + " |"


def main() -> int:
    """Make the data, train, report; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="default", help="of the simulated sequences (sdan simulate --help)")
    parser.add_argument("--out", type=Path, required=True, help="for sequences, shards, curves and checkpoints")
    parser.add_argument("--sequences", type=int, default=14, help="to train on")
    parser.add_argument("--val-sequences", type=int, default=6)
    parser.add_argument("--crops", type=int, default=12_000, help="to train each row on")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--every", type=int, default=1_000, help="crops between scores")
    parser.add_argument("--val-crops", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="*", choices=ROWS, help="train these only, and write no report")
    parser.add_argument("--label", help="name of the curve, with one row")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="change single values of the rows")
    parser.add_argument("--report-only", action="store_true", help="write the report of the curves that there are")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="also draw the rows' offsets beside the true ones")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    out = chosen.out / chosen.preset
    shards = make_shards(chosen.preset, out, {"val": chosen.val_sequences, "train": chosen.sequences})
    changes = {"model.max_shift_px": MAX_SHIFT_PX[chosen.preset]} | configs.parse_assignments(chosen.set)
    configs_of = {row: row_config(row, chosen.crops, chosen.batch, chosen.seed, changes) for row in chosen.rows or ROWS}
    held = held_out(index_split(shards, "val"), next(iter(configs_of.values())), limit=chosen.val_crops, align=True)
    for row, config in () if chosen.report_only else configs_of.items():
        label = chosen.label or (row if chosen.seed == 0 else f"{row}-seed{chosen.seed}")
        train_row(label, row, config, shards, held, out, chosen.every)
    if chosen.picture:
        picture(out, held, chosen.picture)
    if chosen.rows is None:
        command = " ".join(["python benchmarks/alignment.py", *sys.argv[1:]])
        lines = [provenance(command, ("../sdan", "../pipelines")), "", f"### Preset {chosen.preset}", ""]
        lines += [*table(out, held), "", *curve_rows(out)]
        print("\n".join(lines))
        update_section(f"alignment-{chosen.preset}", "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
