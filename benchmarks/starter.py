"""Make the starter model: `python benchmarks/starter.py data|train|card --photographs DIR`.

    data    simulate zoom sequences of every preset, procedural and from photographs; make shards (15 minutes, 2 cores)
    train   train config `starter` on them (under an hour on 2 idle cores); run again to resume
    card    score the model on the test sequences; write it and its card to pipelines/models/starter

DIR holds the folders train, val and test, which share no photograph, and LICENCES.md, which names the photographs'
authors and goes into the card. All other files are written below `--out`. All data is simulated, and so are the card's
scores.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

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

PRESETS = ("perfect", "tripod", "default", "handheld")
SEQUENCES = {"train": (20, 10), "val": (1, 1), "test": (3, 3)}
"""Per preset: (number of procedural sequences, number of sequences from photographs)."""
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


def train_starter(out: Path) -> None:
    """Train, or resume an unfinished run."""
    resume = run_folder.is_run(run_folder.run_folder(out / "data", "starter"))
    result = train(
        str(out / "shards"),
        configs.starter(),
        data=out / "data",
        workers=1,
        name="starter",
        resume=resume,
        register=None,
    )
    print(result.model, result.scores)


def make_card(photographs: Path, out: Path, package: Path | None = None) -> None:
    """Score the model on the test sequences and copy model and card into `package` (None: the installed package)."""
    package = package or starter_folder()
    model = run_folder.run_folder(out / "data", "starter") / run_folder.MODEL
    stored = checkpoint.load(model)
    config = configs.from_dict(stored.config)
    held = held_out(index_split(str(out / "shards"), "test"), config, limit=TEST_CROPS, align=True)

    def score(chosen: HeldOut) -> Evaluation:
        return evaluate_model(stored.model, chosen, split="test", crop_px=config.train.crop_px)

    whole = score(held)
    package.mkdir(parents=True, exist_ok=True)
    shutil.copy(model / "model.safetensors", package)
    shutil.copy(model / "config.json", package)
    weights = (package / "model.safetensors").stat().st_size
    index = index_split(str(out / "shards"), "train")
    text = CARD.format(
        # The table's note on LPIPS contains a local path.
        table=re.sub("^LPIPS n/a: .*$", "LPIPS: n/a, its AlexNet weights were not at hand.", whole.table(), flags=re.M),
        groups="\n".join(group_rows(held, score)),
        licences=(photographs / "LICENCES.md").read_text().strip(),
        sequences=sum(group.sequences for group in groups() if group.split == "train"),
        pairs=len(index.paths),
        tiles=index.num_tiles,
        crops=config.train.epochs * (config.train.crops_per_epoch or len(index.paths)),
        network=f"{config.model.features} features, {config.model.blocks} blocks, packing kernel "
        f"{config.model.packing_kernel}, {weights / 1e6:.2f} MB",
        commit=(stored.commit or "unknown")[:7],
        origin=provenance(f"python benchmarks/starter.py card --photographs {photographs.name}", ("../pipelines",)),
    )
    (package / "CARD.md").write_text(text)
    Image.fromarray(examples(stored.model, held, 6)).save(out / "examples.png")
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


CARD = """# The starter model

A small SDAN that zooms RAW photographs 4x without any training: `sdan zoom PHOTO.ARW -o zoomed.png` uses it while the
registry has no champion; `--model starter` and `--init starter` select it. **It was trained only on simulated RAW**,
by `benchmarks/starter.py`. All scores here are simulated, too.

- Network: {network}; config `starter` (packed RAW, square-root encoding, skip through the
  rendering, direct upsampling).
- Data: {sequences} simulated zoom sequences ({pairs} pairs, {tiles} tiles); presets perfect, tripod, default and
  handheld; two thirds procedural, one third from photographs.
- Target: the simulator's ideal picture in the input's own view and tone (`loss.self_target=truth`), with the same
  reference as in use, {{X, X}}.
- Budget: {crops} crops of 32 packed pixels on two CPU cores. Trained at commit {commit}.

## Scores on sequences it has never seen

{table}

PSNR in dB against the true picture, by kind of sequence:

{groups}

{origin}

## What limits it

Its tones are those of the simulated camera; a real camera's JPG differs. The oracle row is only for comparison: the
model never saw a target as reference. It does not invent detail that the lens did not resolve.

## The photographs

{licences}
"""


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["data", "train", "card"])
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "starter")
    chosen = parser.parse_args()
    if chosen.step == "data":
        make_data(chosen.photographs, chosen.out)
    elif chosen.step == "train":
        train_starter(chosen.out)
    else:
        make_card(chosen.photographs, chosen.out)


if __name__ == "__main__":
    main()
