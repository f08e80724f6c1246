"""What a sweep costs besides its trainings: `python benchmarks/sweep_costs.py --out DIR PART`.

short      8 settings trained by 8 `sdan train`, half before and half after the same 8 in one `sdan tune` (a grid, no
           trial stopped early). --settings takes the first of them only. "Start" is the time to the first point in
           MLflow, the scores before the first step. Processor seconds are those of the command and of all processes
           below it.
long       the same with longer trainings.
summary    the end of a sweep of --trials stand-in trials, each of which has in MLflow and in the sweep's folder what a
           trial of `sdan tune` has: reading them, judging, table, page. Two ran through Ray Tune; the others are copies
           with other settings and scores, in MLflow's database, Ray Tune's state, Optuna's study and the folder.
resume     that sweep is resumed with one trial more: how long until the trial starts, and from its end to the end.

Without PART all are run and written to benchmarks/RESULTS.md.
"""

import argparse
import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import optuna  # noqa: E402
import psutil  # noqa: E402
from alignment import make_shards  # noqa: E402
from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Metric, Param, RunTag  # noqa: E402
from optuna.trial import create_trial  # noqa: E402
from PIL import Image  # noqa: E402
from results import Tables, provenance, publish  # noqa: E402

from pipelines import cluster, registry  # noqa: E402
from pipelines import config as configs  # noqa: E402
from preprocessing.plan import PreprocessOptions  # noqa: E402
from tuning.folder import CROPS, RECORD, Record, read_json  # noqa: E402
from tuning.search import SLOT, Proposals, SearchPlan, Trials, optuna_space  # noqa: E402
from tuning.space import Space, check_space, choice, loguniform, uniform  # noqa: E402
from tuning.sweep import SweepOptions, _finish, run_sweep  # noqa: E402
from tuning.tracking import OVERRIDES_TAG, TRIAL_TAG, SweepRun  # noqa: E402
from tuning.trial import TILES  # noqa: E402

GRID = {"model.packing_kernel": (2, 4), "loss.align_weight": (0.1, 1.0), "loss.self_reference_weight": (0.0, 1.0)}
"""The 8 settings."""
SEQUENCES = {"val": 5, "train": 4}
SPACE: Space = {
    "model.packing_kernel": choice([2, 4, 8, 16]),
    "loss.align_weight": loguniform(0.05, 2.0),
    "loss.self_reference_weight": uniform(0.0, 2.0),
    "train.learning_rate": loguniform(1e-4, 3e-3),
}
NAME, EPOCHS, CROPS_SCORED, SCENES = "large", 20, 128, 16
"""Of a stand-in trial."""


@dataclass(frozen=True)
class Spent:
    """Of one command."""

    start_s: float
    """Until the first point, summed over its trainings."""
    wall_s: float
    cpu_s: float


class Processor:
    """Processor seconds of a process and of all processes below it, looked up twice a second."""

    def __init__(self, pid: int) -> None:
        self.root, self.seconds = psutil.Process(pid), dict[tuple[int, float], float]()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        while not self.over.wait(0.5):
            try:
                below = [self.root, *self.root.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            for each in below:
                try:
                    spent = each.cpu_times()
                    self.seconds[each.pid, each.create_time()] = spent.user + spent.system
                except psutil.NoSuchProcess:
                    continue

    def total(self) -> float:
        self.over.set()
        self.thread.join()
        return sum(self.seconds.values())


def settings() -> list[dict[str, Any]]:
    """All of GRID."""
    return [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]


def run(command: list[str], data: Path, log: Path) -> tuple[float, float, float]:
    """Run `sdan COMMAND`: (seconds since 1970 when it began, its seconds, processor seconds).

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SDAN_DATA": str(data)}
    began = time.time()
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *command], env=environment, stdout=file, stderr=file
        )
        processor = Processor(process.pid)
        code = process.wait()
    seconds, spent = time.time() - began, processor.total()
    if code:
        raise RuntimeError(f"sdan {' '.join(command)}: exit code {code}; {log.read_text()[-2000:]}")
    return began, seconds, spent


def points(data: Path, experiment: str) -> list[tuple[float, float]]:
    """(time of the first, of the last validation) of each training in MLflow, in order; seconds since 1970."""
    client = MlflowClient(registry.default_tracking_uri(data))
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id], max_results=1000) if found else []
    times = [[point.timestamp / 1000 for point in client.get_metric_history(each.info.run_id, "main/val_psnr")]
             for each in runs]  # fmt: skip
    return sorted((min(each), max(each)) for each in times if each)


def by_hand(shards: str, data: Path, config: list[str], chosen: list[dict[str, Any]]) -> Spent:
    """The settings by one `sdan train` each."""
    before, starts, wall, cpu = len(points(data, registry.EXPERIMENT)), 0.0, 0.0, 0.0
    for number, setting in enumerate(chosen, before):
        changes = [text for name, value in setting.items() for text in ("--set", f"{name}={value}")]
        began, seconds, spent = run(
            ["train", shards, *config, *changes, "--name", f"hand{number}"], data, data / "hand.log"
        )
        starts += points(data, registry.EXPERIMENT)[-1][0] - began
        wall, cpu = wall + seconds, cpu + spent
    return Spent(starts, wall, cpu)


def in_a_sweep(shards: str, data: Path, config: list[str], epochs: int, chosen: list[dict[str, Any]]) -> Spent:
    """The settings by one `sdan tune`."""
    space = data / "grid.py"
    lines = [f"    {name!r}: choice({list(values)!r})," for name, values in GRID.items()]
    constraint = ["def CONSTRAINT(values):", f"    return None if dict(values) in {chosen!r} else 'another day'"]
    text = ["from tuning.space import choice", "", "SPACE = {", *lines, "}", "", "", *constraint, ""]
    space.write_text("\n".join(text))
    many = len(chosen)
    began, wall, cpu = run(
        ["tune", shards, *config, "--space", str(space), "--search", "grid", "--trials", str(many), "--grace",
         str(epochs)],
        data, data / "sweep.log",
    )  # fmt: skip
    found = points(data, "sdan-sweeps")
    if len(found) != many:
        raise RuntimeError(f"{data}: expected {many} trials, got {len(found)}")
    ends = [began, *(last for _, last in found)]
    return Spent(sum(first - end for (first, _), end in zip(found, ends, strict=False)), wall, cpu)


def hand_rows(out: Path, name: str, chosen: list[dict[str, Any]], epochs: int, crops: int) -> Iterator[str]:
    """The table of `short` or `long`."""
    options = PreprocessOptions(scale=4, align="ecc", tile_px=32, stride_px=16)
    shards = make_shards("default", out, SEQUENCES, options=options, width_px=768)
    values = {"train.epochs": epochs, "train.crops_per_epoch": crops, "train.validate_every": max(1, epochs // 2),
              "train.crop_px": 16, "train.val_crops": 16, "model.features": 16, "model.blocks": 2}  # fmt: skip
    config = ["--config", "demo", *(text for key, value in values.items() for text in ("--set", f"{key}={value}"))]
    data = out / f"{name}-{time.strftime('%H%M%S')}"
    data.mkdir(parents=True)
    half = len(chosen) // 2
    first = by_hand(shards, data, config, chosen[:half])
    sweep = in_a_sweep(shards, data, config, epochs, chosen)
    last = by_hand(shards, data, config, chosen[half:])
    hand = Spent(first.start_s + last.start_s, first.wall_s + last.wall_s, first.cpu_s + last.cpu_s)
    yield f"| {len(chosen)} trainings | starts, s | rest, s | whole, s | processor s |"
    yield "|---|---|---|---|---|"
    for text, each in (("by hand", hand), ("in a sweep", sweep)):
        rest = each.wall_s - each.start_s
        yield f"| {text} | {each.start_s:.0f} | {rest:.0f} | {each.wall_s:.0f} | {each.cpu_s:.0f} |"
    yield ""
    yield (
        f"{epochs} epochs of {crops} crops each. The sweep takes {sweep.wall_s / hand.wall_s:.2f} of the time by hand "
        f"and {sweep.cpu_s / hand.cpu_s:.2f} of the processor time; {sweep.wall_s / (hand.wall_s - hand.start_s):.2f} "
        "of the time by hand without its starts."
    )


def stand_in(overrides: Mapping[str, Any], report: Any) -> dict[str, float]:
    """Write what a trial of EPOCHS epochs writes: params, tags, points, machine metrics, tiles' scores, a picture."""
    began, random = time.time(), Random(report.trial_id)
    kernel = overrides["model.packing_kernel"]
    level = 25 - abs(kernel - 4) / 20 - (overrides["loss.align_weight"] - 0.5) ** 2 / 10 + random.gauss(0, 0.05)
    client = MlflowClient(tracking_uri=os.environ["SDAN_STAND_IN_URI"])
    flat = configs.flatten(configs.demo())
    client.log_batch(
        report.run_id,
        params=[Param(name, str(value)) for name, value in flat.items() if name not in overrides],
        tags=[RunTag(f"env.{number}", "x" * 20) for number in range(12)],
    )
    for epoch in range(1, EPOCHS + 1):
        now = int(time.time() * 1000)
        score = level - 2 / epoch
        names = ("loss", "learning_rate", "crops_per_s", *(f"val_self/{number}" for number in range(30)))
        loads = [Metric(f"system/{number}", random.random(), now, epoch) for number in range(12)]
        client.log_batch(report.run_id, metrics=[Metric(name, score, now, epoch) for name in names] + loads)
        tiles = {
            f"{tile % SCENES:05}/00006-00002@{tile},0": score + tile % SCENES + random.gauss(0, 0.1)
            for tile in range(CROPS_SCORED)
        }
        report({"epoch": epoch, "val_psnr": sum(tiles.values()) / CROPS_SCORED}, tiles)
    crops = Path("sweeps") / NAME / CROPS
    crops.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((200, 60), 60).convert("RGB").save(crops / f"{report.trial_id}.jpg", quality=88)
    Path("times").write_text(f"{began} {time.time()}")
    return {"ms_per_megapixel": 100.0 / kernel}


def sweep_of_stand_ins(many: int, *, resume: bool) -> None:
    """Start or resume the sweep `large` in the working folder."""
    uri = os.environ["SDAN_STAND_IN_URI"]
    run_sweep(
        stand_in, SPACE, name=NAME, storage_path="sweeps", tracking_uri=uri,
        experiment_id=registry.open_experiment(uri, "sdan-sweeps"), num_trials=many, max_epochs=EPOCHS,
        grace_epochs=EPOCHS, resume=resume, options=SweepOptions(default={"model.packing_kernel": 8}),
    )  # fmt: skip


@dataclass(frozen=True)
class Copy:
    """A copy of a trial, with a setting and a score of its own."""

    trial_id: str
    overrides: dict[str, Any]
    gain: float
    """dB over the trial that is copied."""

    @property
    def run_id(self) -> str:
        return f"{self.trial_id:0>32}"


def draw_copies(count: int) -> list[Copy]:
    """Copies with random settings of SPACE."""
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=sampler)
    asked = [study.ask(optuna_space(check_space(SPACE))) for _ in range(count)]
    random = Random(0)
    return [Copy(f"{number:08x}", trial.params, random.gauss(0, 0.1)) for number, trial in enumerate(asked)]


def copy_runs(database: Path, trial_id: str, copies: list[Copy]) -> None:
    """Copy a trial's MLflow run with all its points."""
    with sqlite3.connect(database) as connection:
        connection.row_factory = sqlite3.Row
        (run_id,) = connection.execute(
            "SELECT run_uuid FROM tags WHERE key = ? AND value = ?", (TRIAL_TAG, trial_id)
        ).fetchone()
        for table in ("runs", "tags", "params", "metrics", "latest_metrics"):
            query = f"SELECT * FROM {table} WHERE run_uuid = ?"  # noqa: S608
            rows = [dict(row) for row in connection.execute(query, (run_id,))]
            marks = ", ".join(f":{name}" for name in rows[0])
            copied = (changed(row, copy) for copy in copies for row in rows)
            connection.executemany(f"INSERT INTO {table} ({', '.join(rows[0])}) VALUES ({marks})", copied)  # noqa: S608


def changed(row: dict[str, Any], copy: Copy) -> dict[str, Any]:
    """A row of one of MLflow's tables, for a copy."""
    key, value = row.get("key"), row.get("value")
    if key in ("val_psnr", "best_val_psnr"):
        value = row["value"] + copy.gain
    known = {TRIAL_TAG: copy.trial_id, OVERRIDES_TAG: json.dumps(copy.overrides), **copy.overrides}
    new = row | {"run_uuid": copy.run_id} | ({"value": str(known[key]) if key in known else value} if key else {})
    return {name: each.replace(row["run_uuid"], copy.run_id) if name == "artifact_uri" else each
            for name, each in new.items()}  # fmt: skip


def copy_state(folder: Path, trial_id: str, copies: list[Copy]) -> None:
    """Copy a trial in Ray Tune's state and in Optuna's study."""
    state_file = max(folder.glob("experiment_state-*.json"))
    state = json.loads(state_file.read_text())
    original = next(each for each in state["trial_data"] if trial_id in each[0])
    state["trial_data"] += [[text.replace(trial_id, copy.trial_id) for text in original] for copy in copies]
    state_file.write_text(json.dumps(state))
    run = SweepRun(NAME, "", "", "", "val_psnr", "max", EPOCHS)
    searched = Trials(Proposals(check_space(SPACE), run, SearchPlan(1, 1, 0, 1), folder, None), folder)
    searched.restore_from_dir(str(folder))
    proposals: Any = searched.searcher
    study = proposals._ot_study
    known = study.trials[0]
    for number, copy in enumerate(copies, len(study.trials)):
        study.add_trial(
            create_trial(
                params=copy.overrides,
                distributions=known.distributions,
                value=known.value + copy.gain,
                intermediate_values=known.intermediate_values,
            )
        )
        proposals._ot_trials[copy.trial_id] = optuna.trial.Trial(study, number)
        proposals._completed_trials.add(copy.trial_id)
    searched._counter += len(copies)
    searched.save_to_dir(str(folder), session_str=state_file.stem.removeprefix("experiment_state-"))


def copy_files(folder: Path, trial_id: str, copies: list[Copy]) -> None:
    """Copy a trial's scores of each tile, and its picture."""
    kept, picture = folder / TILES / f"{trial_id}.json", folder / CROPS / f"{trial_id}.jpg"
    scores = json.loads(kept.read_text())
    for copy in copies:
        random = Random(copy.trial_id)
        tiles = {name: value + copy.gain + random.gauss(0, 0.05) for name, value in scores["tiles"].items()}
        kept.with_stem(copy.trial_id).write_text(json.dumps({"score": scores["score"] + copy.gain, "tiles": tiles}))
        shutil.copy(picture, picture.with_stem(copy.trial_id))


def make_large(out: Path, many: int) -> Path:
    """Make the finished sweep in `out`, if it is not there yet, and return its folder."""
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    os.environ["SDAN_STAND_IN_URI"] = uri = registry.default_tracking_uri(out)
    folder = out / "sweeps" / NAME
    if not (out / "copied").exists():
        registry.prepare_database(uri)
        cluster.start_ray(resources={SLOT: 1.0})
        sweep_of_stand_ins(2, resume=(folder / RECORD).exists())
        trial_id, *others = sorted(path.stem for path in (folder / TILES).glob("*.json"))
        copies = draw_copies(many - 1 - len(others))
        copy_runs(out / "mlflow.db", trial_id, copies)
        copy_state(folder, trial_id, copies)
        copy_files(folder, trial_id, copies)
        (out / "copied").touch()
    return folder


def summary_rows(out: Path, many: int) -> Iterator[str]:
    """The table of `summary`."""
    folder = make_large(out, many)
    record, uri = read_json(folder / RECORD, Record), os.environ["SDAN_STAND_IN_URI"]
    run = SweepRun(
        record.name, uri, registry.open_experiment(uri, record.experiment), record.parent_run_id, record.metric,
        record.mode, record.max_epochs,
    )  # fmt: skip
    began, spent = time.time(), time.process_time()
    result = _finish(run, folder, check_space(SPACE), SweepOptions(), in_time=True)
    yield "| trials | summary, s | processor s |"
    yield "|---|---|---|"
    yield f"| {len(result.trials)} | {time.time() - began:.1f} | {time.process_time() - spent:.1f} |"


def resume_rows(out: Path, many: int) -> Iterator[str]:
    """The table of `resume`."""
    make_large(out, many)
    cluster.start_ray(resources={SLOT: 1.0})
    began, spent = time.time(), time.process_time()
    sweep_of_stand_ins(many + 1, resume=True)
    ended, spent = time.time(), time.process_time() - spent
    started, trained = (float(text) for text in (out / "times").read_text().split())
    yield "| until the next trial starts, s | from its end to the end of the command, s | processor s of the command |"
    yield "|---|---|---|"
    yield f"| {started - began:.1f} | {ended - trained:.1f} | {spent:.1f} |"


def main() -> int:
    """Measure, print, and write the section; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", nargs="?", choices=("short", "long", "summary", "resume"), help="only this; nothing is written"
    )
    parser.add_argument("--out", type=Path, required=True, help="for shards, runs and sweeps")
    parser.add_argument("--epochs", type=int, nargs=2, default=(2, 40), help="of the short and of the long trainings")
    parser.add_argument("--crops", type=int, nargs=2, default=(8, 160), help="in an epoch")
    parser.add_argument("--settings", type=int, default=8, help="of the trainings by hand and in a sweep")
    parser.add_argument("--trials", type=int, default=1000, help="finished stand-in trials")
    chosen = parser.parse_args()
    out = chosen.out.resolve()
    some = settings()[: chosen.settings]
    short, long = zip(chosen.epochs, chosen.crops, strict=True)
    tables: Tables = {
        "summary": (f"Summary of {chosen.trials} finished trials", lambda: summary_rows(out / NAME, chosen.trials)),
        "resume": (f"Resume after {chosen.trials} finished trials", lambda: resume_rows(out / NAME, chosen.trials)),
        "short": ("Short trainings by hand and in a sweep", lambda: hand_rows(out, "short", some, *short)),
        "long": ("Longer trainings by hand and in a sweep", lambda: hand_rows(out, "long", some, *long)),
    }
    command = " ".join(["python benchmarks/sweep_costs.py", *sys.argv[1:]])
    origin = provenance(command, ("../sdan", "../pipelines", "../tuning"))
    publish("sweep-costs", origin, tables, chosen.part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
