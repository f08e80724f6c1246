"""The paper's open question at CPU size: `python benchmarks/sweep.py --out DIR`.

Which packing kernel, which weight of X' (loss.align_weight) and which share of self-reference samples
(loss.self_reference_weight), on registered (`--align ecc`) and on unregistered pairs (`--align scale`)? Every setting
of GRID is trained on both, with each seed, on the same simulated scenes, and scored on the same held-out crops. All
settings of a seed see the same training crops in the same order.

The settings are trained one after the other in this process, by the steps of pipelines/training, without Ray: at this
size a trial lasts seconds, and `sdan tune` would spend more on starting it. Judging and page are those of `sdan tune`
(tuning/winners.py, tuning/page.py). Run it again to resume: sequences, shards and scored trials are kept. With
`--minutes` it ends in time. Tables of all settings, or of the first half if the second is not whole, are written to
benchmarks/RESULTS.md, and DIR/ecc and DIR/scale get a sweep.html each.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from alignment import CPU, make_shards  # noqa: E402
from results import provenance, update_section  # noqa: E402

from pipelines import config as configs  # noqa: E402
from pipelines.config import ExperimentConfig  # noqa: E402
from pipelines.loader import index_split, model_inputs, training_stream, with_curve_of  # noqa: E402
from pipelines.scoring.held_out import HeldOut, held_out  # noqa: E402
from pipelines.scoring.scores import mean_scores, score_bicubic, score_model  # noqa: E402
from pipelines.sweeping.trainer import save_crops  # noqa: E402
from pipelines.training import step  # noqa: E402
from preprocessing.plan import PreprocessOptions  # noqa: E402
from sdan import checkpoint  # noqa: E402
from sdan.network import SDAN  # noqa: E402
from tuning import page  # noqa: E402
from tuning.folder import Record, Refused, setting_key  # noqa: E402
from tuning.space import Choice, Value  # noqa: E402
from tuning.tracking import SECONDS, TrialRow  # noqa: E402
from tuning.winners import Scored, Verdict, compare, judge, setting_text  # noqa: E402

GRID: dict[str, tuple[Value, ...]] = {
    "model.packing_kernel": (2, 8),
    "loss.align_weight": (0.1, 1.0),
    "loss.self_reference_weight": (0.0, 1.0),
}
ALIGNS = ("ecc", "scale")
PRESET, WIDTH_PX = "default", 768
TILE_PX, STRIDE_PX = 32, 16
SEQUENCES = {"val": 10, "train": 10}
COMMON: dict[str, object] = {
    "model.input": "packed",
    "model.features": 16,
    "model.blocks": 2,
    "model.upsampling": "direct",
    "train.look": "rendering",
    "train.crop_px": 16,
    "train.batch_per_worker": 4,
    "train.learning_rate": 1e-3,
    "train.warmup_steps": 20,
    "train.grad_clip": 1.0,
    "train.ema_decay": 0.99,
    "train.precision": "fp32",
    "train.restart_epochs": 1,
    "train.epochs": 1,
}
METRIC = "val_psnr"
TARGETS = ("aligned", "true")
"""Of the self protocol, as deployed; the first decides, as in `sdan tune`."""


@dataclass(frozen=True)
class Trial:
    """One setting on one kind of pairs with one seed."""

    align: str
    overrides: Mapping[str, Value]
    seed: int

    @property
    def key(self) -> str:
        return f"{self.align}, seed {self.seed}: {setting_key(self.overrides)}"


def grid() -> list[dict[str, Value]]:
    """All settings. The first half is a fraction in which each value of a parameter meets each value of another as
    often: it gives the parameters' effects, if no two of them act on each other, for half the time."""
    places = itertools.product(*(range(len(values)) for values in GRID.values()))
    ordered = sorted(places, key=lambda place: sum(place) % 2)
    return [
        {name: values[number] for (name, values), number in zip(GRID.items(), place, strict=True)} for place in ordered
    ]


def config_of(overrides: Mapping[str, Value], crops: int, seed: int) -> ExperimentConfig:
    """The config of a trial: `crops` in one epoch, which is one period of the learning rate's cosine."""
    budget = {"train.crops_per_epoch": crops, "train.seed": seed}
    return configs.override(configs.srraw_4x(), COMMON | budget | dict(overrides))


class Pairs:
    """The shards of one kind of pairs: held-out crops, and the training crops of a seed in memory."""

    def __init__(self, align: str, out: Path, val_crops: int) -> None:
        options = PreprocessOptions(scale=4, align=align, tile_px=TILE_PX, stride_px=STRIDE_PX)
        self.shards = make_shards(
            PRESET, out, SEQUENCES, options=options, width_px=WIDTH_PX, shards=out / align / "shards"
        )
        self.train, val = index_split(self.shards, "train"), index_split(self.shards, "val")
        self.config = with_curve_of(self.train, config_of(grid()[0], 1, 0))
        self.held = held_out(val, self.config, limit=val_crops, align=True)
        self.cached: tuple[int, list[dict[str, np.ndarray]]] = (-1, [])

    def crops(self, seed: int, count: int, limit: int = 2048) -> list[dict[str, np.ndarray]]:
        """The first crops of a seed's stream; longer trainings repeat them."""
        if self.cached[0] != seed:
            stream = training_stream(self.train, with_curve_of(self.train, config_of(grid()[0], 1, seed)))
            self.cached = seed, [stream.crop(number) for number in range(min(count, limit))]
        return self.cached[1]


def train_trial(trial: Trial, pairs: Pairs, crops: int, folder: Path) -> dict[str, Any]:
    """Train one trial; its scores of each held-out crop, and processor seconds of the training."""
    config = with_curve_of(pairs.train, config_of(trial.overrides, crops, trial.seed))
    stock, batch = pairs.crops(trial.seed, crops), config.train.batch_per_worker
    training = step.start(config, None, CPU, lambda model: model)
    began = time.process_time()
    while training.crops < crops:
        chosen = [stock[(training.crops + number) % len(stock)] for number in range(batch)]
        stacked = {name: torch.from_numpy(np.stack([crop[name] for crop in chosen])) for name in chosen[0]}
        rate = step.learning_rate(training.step, min(training.crops / crops, 0.999), config.train)
        step.train_step(training, model_inputs(stacked, config.model, CPU), config, rate)
        training.crops += batch
    spent = time.process_time() - began
    scores = score_model(training.averaged, pairs.held, training.plan)
    saved = checkpoint.save(folder / "model", training.averaged, config=configs.to_dict(config), scores={})
    save_crops(saved, pairs.held.select(range(0, len(pairs.held), len(pairs.held) // 3)), folder / "crops.jpg")
    return {
        "key": trial.key,
        "score": mean_scores(scores)[f"self_{TARGETS[0]}_psnr"],
        "tiles": {
            target: dict(zip(pairs.held.names, scores[f"self_{target}_psnr"], strict=True)) for target in TARGETS
        },
        "epe_px": mean_scores(scores)["oracle_epe_inside_px"],
        "seconds": spent,
        "crops": crops,
    }


def train_missing(out: Path, pairs: Mapping[str, Pairs], seeds: int, crops: int, ends_at: float) -> None:
    """Train what has no line in DIR/trials.jsonl: the first half of the settings with every seed on both kinds of
    pairs, then the second."""
    done, half = read_trials(out), len(grid()) // 2
    for part, seed, align in itertools.product((grid()[:half], grid()[half:]), range(seeds), ALIGNS):
        for overrides in part:
            trial = Trial(align, overrides, seed)
            if trial.key in done:
                continue
            if time.time() > ends_at:
                return
            line = train_trial(trial, pairs[align], crops, folder_of(out, trial))
            with (out / "trials.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{trial.key}: {line['score']:.3f} dB, {line['seconds']:.0f} s", flush=True)


def folder_of(out: Path, trial: Trial) -> Path:
    """For the trial's model and its picture."""
    return out / trial.align / "trials" / f"{setting_key(trial.overrides).replace(', ', '_')}-{trial.seed}"


def read_trials(out: Path) -> dict[str, dict[str, Any]]:
    """Trial.key -> its line in DIR/trials.jsonl."""
    path = out / "trials.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {line["key"]: line for line in lines}


def whole(done: Mapping[str, dict[str, Any]], seeds: int) -> list[dict[str, Value]]:
    """The settings to report: all, or the first half, whichever was trained with every seed on both kinds of pairs."""
    for part in (grid(), grid()[: len(grid()) // 2]):
        if all(Trial(align, each, seed).key in done for align in ALIGNS for each in part for seed in range(seeds)):
            return part
    return []


def settings_of(align: str, done: Mapping[str, dict[str, Any]], target: str, seeds: int) -> list[Scored]:
    """The settings of `whole` with their scores of each crop against `target`, one mapping per seed."""
    found = []
    for number, overrides in enumerate(whole(done, seeds)):
        lines = [done[Trial(align, overrides, seed).key] for seed in range(seeds)]
        seconds = sum(line["seconds"] for line in lines) / seeds
        tiles = tuple({name: _number(score) for name, score in line["tiles"][target].items()} for line in lines)
        found.append(Scored(f"{number:02}", overrides, tiles, seconds))
    return found


def _number(score: float | None) -> float:
    return math.nan if score is None else float(score)


def effect_rows(align: str, done: Mapping[str, dict[str, Any]], seeds: int) -> Iterator[str]:
    """One row per value of each parameter: the mean over all settings with it, by target, and its difference from the
    parameter's first value with the interval that holds for the parameter's values at once (95 %)."""
    yield "| value | " + " | ".join(f"self {target}, dB | difference" for target in TARGETS) + " | processor s |"
    yield "|---" * (2 + 2 * len(TARGETS)) + "|"
    for name, values in GRID.items():
        cells: dict[Value, list[str]] = {value: [] for value in values}
        for target in TARGETS:
            levels = [_level(settings_of(align, done, target, seeds), name, value) for value in values]
            found = compare(levels, mode="max")
            if found is None:
                return
            first = found.number(str(values[0]))
            assert first is not None
            for value in values:
                number = found.number(str(value))
                assert number is not None
                gain = found.difference(number, first)
                text = "" if number == first else f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
                cells[value] += [f"{found.means[number]:.3f}", text]
        for value in values:
            spent = _level(settings_of(align, done, TARGETS[0], seeds), name, value).seconds
            yield f"| {setting_text({name: value})} | " + " | ".join(cells[value]) + f" | {spent:.0f} |"


def _level(settings: list[Scored], name: str, value: Value) -> Scored:
    """All settings with one value of a parameter as one: per seed the mean of each crop's scores."""
    same = [each for each in settings if each.overrides[name] == value]
    seeds = range(len(same[0].tiles))
    tiles = tuple(
        {crop: float(np.mean([each.tiles[seed][crop] for each in same])) for crop in same[0].tiles[seed]}
        for seed in seeds
    )
    seconds = float(np.mean([each.seconds for each in same if each.seconds is not None]))
    return Scored(str(value), {name: value}, tiles, seconds)


def setting_rows(align: str, done: Mapping[str, dict[str, Any]], seeds: int) -> Iterator[str]:
    """One row per setting, best first: its scores by target, each seed's, the offsets' error, and processor time."""
    by_seed = [f"seed {seed}" for seed in range(seeds)]
    yield "| setting | self aligned, dB | " + " | ".join(by_seed) + " | self true, dB | offsets' error, px | s |"
    yield "|---" * (5 + seeds) + "|"
    aligned, true = (settings_of(align, done, target, seeds) for target in TARGETS)
    rows = sorted(zip(aligned, true, strict=True), key=lambda each: -_mean(each[0]))
    for first, second in rows:
        lines = [done[Trial(align, first.overrides, seed).key] for seed in range(seeds)]
        epe = sum(line["epe_px"] for line in lines) / seeds
        each = " | ".join(f"{line['score']:.3f}" for line in lines)
        yield (
            f"| {setting_text(first.overrides)} | {_mean(first):.3f} | {each} | {_mean(second):.3f} | {epe:.2f} | "
            f"{first.seconds:.0f} |"
        )


def _mean(each: Scored) -> float:
    return float(np.nanmean([list(tiles.values()) for tiles in each.tiles]))


def bicubic_row(held: HeldOut, config: ExperimentConfig) -> str:
    """Scores of bicubic enlargement on the same crops."""
    plain = SDAN(config.model)
    texts = []
    for source in ("camera", "rendering"):
        scores = mean_scores(score_bicubic(plain, held, CPU, source))
        texts.append(f"bicubic of the {source}: " + ", ".join(f"{t} {scores[f'{t}_psnr']:.3f}" for t in TARGETS))
    return "; ".join(texts) + " dB"


def write_page(align: str, out: Path, done: Mapping[str, dict[str, Any]], seeds: int, crops: int) -> Verdict:
    """DIR/ALIGN/sweep.html, and what it says."""
    folder = out / align
    default = {name: configs.flatten(config_of({}, crops, 0))[name] for name in GRID}
    settings = settings_of(align, done, TARGETS[0], seeds)
    of_default = next((each.trial_id for each in settings if each.overrides == default), None)
    verdict = judge(settings, metric=METRIC, default=of_default)
    rows, crops_folder = [], folder / "crops"
    crops_folder.mkdir(parents=True, exist_ok=True)
    for number, overrides in enumerate(whole(done, seeds)):
        for seed in range(seeds):
            trial = Trial(align, overrides, seed)
            trial_id = f"{number:02}" + (f"-r{seed}" if seed else "")
            picture = folder_of(out, trial) / "crops.jpg"
            (crops_folder / f"{trial_id}.jpg").write_bytes(picture.read_bytes())
            rows.append(_row(trial, trial_id, done[trial.key]))
    rows.sort(key=lambda row: -(row.score or 0.0))
    record = Record(
        align, "", "", {name: f"choice {values}" for name, values in GRID.items()}, METRIC, "max", len(rows), 1, 1, 0,
        "grid", {}, seeds,
    )  # fmt: skip
    space = {name: Choice(values) for name, values in GRID.items()}
    report = page.Report(
        f"--align {align}", {METRIC: "max"}, rows, verdict, Refused(), space, default, "", crops_folder, record, ""
    )
    page.write(report, folder)
    return verdict


def _row(trial: Trial, trial_id: str, line: Mapping[str, Any]) -> TrialRow:
    score = float(line["score"])
    return TrialRow(
        trial_id, "", dict(trial.overrides), "finished", score, 1, ((1, score),), "", trial.seed,
        trial_id.partition("-")[0] if trial.seed else "", {METRIC: score, SECONDS: line["seconds"]},
    )  # fmt: skip


def report(out: Path, pairs: Mapping[str, Pairs], seeds: int, crops: int, command: str) -> str:
    """The section of RESULTS.md."""
    done = read_trials(out)
    settings = f"{len(whole(done, seeds))} of {len(grid())} settings; seeds: {seeds}; {crops} crops each"
    lines = [provenance(command, ("../sdan", "../pipelines", "../tuning")) + f"; beside other work; {settings}"]
    for align, title in zip(ALIGNS, ("Registered pairs", "Unregistered pairs"), strict=True):
        held = pairs[align].held
        lines += ["", f"### {title} (`--align {align}`)", "", str(write_page(align, out, done, seeds, crops)), ""]
        lines += [*effect_rows(align, done, seeds), "", *setting_rows(align, done, seeds), ""]
        lines += [f"{len(held)} held-out crops of {len(set(held.sequences))} sequences; "
                  f"{bicubic_row(held, pairs[align].config)}."]  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    """Make the data, train what is missing, report; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="for sequences, shards, models and pages")
    parser.add_argument("--crops", type=int, default=640, help="to train each trial on")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--val-crops", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no further trial after this time")
    parser.add_argument("--print-only", action="store_true", help="do not write benchmarks/RESULTS.md")
    chosen = parser.parse_args()
    ends_at = time.time() + 60 * chosen.minutes
    torch.set_num_threads(1)
    pairs = {align: Pairs(align, chosen.out, chosen.val_crops) for align in ALIGNS}
    train_missing(chosen.out, pairs, chosen.seeds, chosen.crops, ends_at)
    if not whole(read_trials(chosen.out), chosen.seeds):
        print(
            f"{chosen.out}: expected half of the settings with {chosen.seeds} seeds, got fewer; run it again to go on",
            file=sys.stderr,
        )
        return 1
    text = report(
        chosen.out, pairs, chosen.seeds, chosen.crops, " ".join(["python benchmarks/sweep.py", *sys.argv[1:]])
    )
    print(text)
    if not chosen.print_only:
        update_section("sweep", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
