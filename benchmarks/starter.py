"""Make the starter models: `python benchmarks/starter.py all --photographs DIR`; run it again to resume.

    data    simulate zoom sequences of every preset, procedural and from photographs; make shards
    train   train configs `starter` (RAW) and `starter-rgb` (JPG, PNG, TIFF) on them; run again to resume
    card    score the models on the test sequences; write each and its card to pipelines/models/NAME
    all     the three in this order

`--model` chooses one of the two. Half of the training sequences are of preset wide, for cameras and lenses of many
kinds; the other half are of the four older presets, whose test sequences are those of earlier starters.

DIR holds the folders train, val and test, which share no photograph, and LICENCES.md, which names the photographs'
authors and goes into the card. All other files are written below `--out`. All data is simulated, and so are the card's
scores.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from results import provenance  # noqa: E402

from pipelines import cluster  # noqa: E402
from pipelines import config as configs  # noqa: E402
from pipelines.evaluate import Evaluation, evaluate_model, examples  # noqa: E402
from pipelines.loader import index_split  # noqa: E402
from pipelines.scoring.held_out import HeldOut, held_out  # noqa: E402
from pipelines.train import train  # noqa: E402
from pipelines.training import run_folder  # noqa: E402
from preprocessing.shards import PreprocessOptions, preprocess  # noqa: E402
from preprocessing.simulator.sequences import simulate  # noqa: E402
from sdan import checkpoint, starter_folder  # noqa: E402

MODELS = ("starter", "starter-rgb")
PRESETS = ("perfect", "tripod", "default", "handheld")
SEQUENCES = {"train": (9, 6), "val": (1, 1), "test": (3, 3)}
"""Per preset of PRESETS: (number of procedural sequences, number of sequences from photographs)."""
WIDE_SEQUENCES = {"train": (36, 24), "val": (4, 4), "test": (8, 8)}
"""The same for preset wide: as many in train as of the others together."""
WIDTH_PX = 1536
OPTIONS = PreprocessOptions(scale=4, align="ecc", tile_px=48, stride_px=40)
TEST_CROPS = 480


@dataclass(frozen=True)
class Group:
    """Sequences that are simulated in one call."""

    split: str
    preset: str
    photographs: bool
    sequences: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.preset}-{'photographs' if self.photographs else 'procedural'}"


def groups() -> list[Group]:
    """Every group. Seeds differ, so no two groups share a scene."""
    found: list[Group] = []
    for split, counts in SEQUENCES.items():
        for preset in PRESETS:
            for photographs, count in zip((False, True), counts, strict=True):
                found.append(Group(split, preset, photographs, count, seed=1000 + len(found)))
    # Seeds of their own, so that those of the older groups stay.
    for split, counts in WIDE_SEQUENCES.items():
        for photographs, count in zip((False, True), counts, strict=True):
            found.append(Group(split, "wide", photographs, count, seed=1100 + 2 * len(found)))
    return found


def simulate_group(group: Group, photographs: Path, out: Path) -> None:
    """Simulate, and hard-link the sequences under unique names for preprocessing."""
    scenes = photographs / group.split if group.photographs else None
    folders = simulate(
        out / "simulated" / group.name,
        scenes=scenes,
        sequences=group.sequences,
        width_px=WIDTH_PX,
        preset=group.preset,
        # An ARW has one pattern, one pair of levels and one matrix; preset wide (even seeds) varies them.
        raw_format="arw" if group.seed % 2 else "dng",
        seed=group.seed,
    )
    for folder in folders:
        linked = out / "raw" / group.split / f"{group.name}-{folder.name}"
        if not linked.exists():
            aside = linked.with_name(f".{linked.name}")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(folder, aside, copy_function=os.link)
            aside.rename(linked)


def make_data(photographs: Path, out: Path) -> None:
    """Simulate all groups and preprocess them."""
    work = partial(simulate_group, photographs=photographs, out=out)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for group, _ in zip(groups(), pool.map(work, groups()), strict=True):
            print(f"{group.name}: {group.sequences} sequences", flush=True)
    cluster.start_ray()
    report = preprocess(str(out / "raw"), str(out / "shards"), OPTIONS)
    print(f"{report.pairs} pairs, {report.written} written ({report.rows} tiles), {len(report.quarantined)} set aside")


def train_starter(name: str, out: Path, epochs: int | None = None) -> None:
    """Train, or resume an unfinished run; a finished one is kept. `epochs`: instead of the config's."""
    folder = run_folder.run_folder(out / "data", name)
    if run_folder.is_finished(folder):
        print(f"{name}: {folder} is trained")
        return
    resume = run_folder.is_run(folder)
    config = configs.named(name)
    if epochs:
        # One period of the learning rate for the whole run.
        config = configs.override(config, {"train.epochs": epochs, "train.restart_epochs": epochs})
    if torch.cuda.is_available():
        config = configs.override(config, {"train.cuda_graph": True})
    result = train(
        str(out / "shards"),
        config,
        data=out / "data",
        workers=1,
        name=name,
        resume=resume,
        register=None,
    )
    print(result.model, result.scores)


def make_card(
    name: str, photographs: Path, out: Path, *, checkpoint_folder: Path | None = None, budget: str | None = None
) -> None:
    """Score the model on the test sequences and copy model and card into the installed package.

    Args:
        checkpoint_folder: the model; None: that of the run `name` below `out`.
        budget: how it was trained; None: as `train_starter` does.
    """
    package = starter_folder().with_name(name)
    model = checkpoint_folder or run_folder.run_folder(out / "data", name) / run_folder.MODEL
    stored = checkpoint.load(model)
    config = configs.from_dict(stored.config)
    held = held_out(index_split(str(out / "shards"), "test"), config, limit=TEST_CROPS, align=True)

    def score(chosen: HeldOut) -> Evaluation:
        # Perceptual distances of all crops would take four times as long as the rest.
        return evaluate_model(stored.model, chosen, split="test", crop_px=config.train.crop_px, perceptual=False)

    whole = score(held)
    package.mkdir(parents=True, exist_ok=True)
    shutil.copy(model / "model.safetensors", package)
    shutil.copy(model / "config.json", package)
    weights = (package / "model.safetensors").stat().st_size
    index = index_split(str(out / "shards"), "train")
    words = RGB_WORDS if config.model.is_rgb else RAW_WORDS
    text = CARD.format(
        **words,
        model=name,
        wide=sum(group.sequences for group in groups() if (group.split, group.preset) == ("train", "wide")),
        table=whole.table(),
        groups="\n".join(group_rows(held, score)),
        licences=(photographs / "LICENCES.md").read_text().strip(),
        sequences=sum(group.sequences for group in groups() if group.split == "train"),
        pairs=len(index.paths),
        tiles=index.num_tiles,
        budget=budget
        or f"{config.train.epochs * (config.train.crops_per_epoch or len(index.paths))} crops of "
        f"{config.train.crop_px} packed pixels. Trained at commit {(stored.commit or 'unknown')[:7]}.",
        network=f"{config.model.features} features, {config.model.blocks} blocks, packing kernel "
        f"{config.model.packing_kernel}, {weights / 1e6:.2f} MB",
        origin=provenance(f"python benchmarks/starter.py card --photographs {photographs.name}", ("../pipelines",)),
    )
    (package / "CARD.md").write_text(text)
    Image.fromarray(examples(stored.model, held, 6)).save(out / f"examples-{name}.png")
    print(text)


def group_rows(held: HeldOut, score: Callable[[HeldOut], Evaluation]) -> list[str]:
    """A table row for each kind of test sequence: PSNR against the true picture."""
    rows = ["| test sequences | crops | bicubic, camera JPG | bicubic, rendering | SDAN (self) |", "|---" * 5 + "|"]
    for group in groups():
        places = [number for number, name in enumerate(held.names) if name.startswith(group.name)]
        if not places:
            continue
        found = score(held.select(range(places[0], places[-1] + 1)))  # names are sorted
        psnr = {label: scores["true_psnr"] for label, scores in found.rows.items()}
        kind = "photographs" if group.photographs else "procedural"
        rows.append(
            f"| {group.preset}, {kind} | {found.crops} | {psnr['bicubic of the camera JPG']:.2f} "
            f"| {psnr['bicubic of the rendering']:.2f} | **{psnr['SDAN (self)']:.2f}** |"
        )
    return rows


RAW_WORDS = {
    "title": "The starter model",
    "use": "zooms RAW photographs 4x without any training: `sdan zoom PHOTO.ARW -o zoomed.png` uses it while the\n"
    "registry has no champion; `--model starter` and `--init starter` select it. **It was trained only on simulated\n"
    "RAW**",
    "input": "packed RAW, square-root encoding, skip through the rendering, direct upsampling",
    "tones": "with the tones of the input's rendering (`train.look=rendering`)",
    "limit": "Its tones are those of the rendering of the RAW, not of the camera's JPG.",
}
RGB_WORDS = {
    "title": "The starter model for JPG, PNG and TIFF",
    "use": "zooms pictures 4x without any training. **It was trained only on simulated camera JPGs**",
    "input": "RGB in cells of 2x2 pixels, skip through the picture, direct upsampling",
    "tones": "with the tones of the input picture (`train.look=camera`)",
    "limit": "It keeps the tones of its input, and what a camera's denoising has removed stays removed.",
}
"""What the cards of the two models say differently."""

CARD = """# {title}

A small SDAN that {use},
by `benchmarks/starter.py`. All scores here are simulated, too.

- Network: {network}; config `{model}` ({input}).
- Data: {sequences} simulated zoom sequences ({pairs} pairs, {tiles} tiles): {wide} of preset wide (many cameras, lenses
  and JPG looks), the others of presets perfect, tripod, default and handheld; three fifths procedural, the others from
  photographs.
- Target: the simulator's ideal picture in the input's own view (`loss.self_target=truth`), {tones},
  and the same reference as in use, {{X, X}}.
- Budget: {budget}

## Scores on sequences it has never seen

{table}

PSNR in dB against the true picture, by kind of sequence:

{groups}

{origin}

## What limits it

{limit} The oracle row is only for comparison: the
model never saw a target as reference. It does not invent detail that the lens did not resolve.

## The photographs

{licences}
"""


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["data", "train", "card", "all"])
    parser.add_argument("--model", choices=MODELS, help="default: both")
    parser.add_argument("--epochs", type=int, help="of each training; default: the config's")
    parser.add_argument("--checkpoint", type=Path, help="card: the model; default: that of the run below --out")
    parser.add_argument("--budget", help="card: how that model was trained")
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "starter")
    chosen = parser.parse_args()
    models = [chosen.model] if chosen.model else MODELS
    if chosen.step in ("data", "all"):
        make_data(chosen.photographs, chosen.out)
    for name in models if chosen.step in ("train", "all") else ():
        train_starter(name, chosen.out, chosen.epochs)
    for name in models if chosen.step in ("card", "all") else ():
        make_card(name, chosen.photographs, chosen.out, checkpoint_folder=chosen.checkpoint, budget=chosen.budget)


if __name__ == "__main__":
    main()
