"""Preprocessing, training and zooming of 500, 5,000 and 50,000 sequences: what they take, and where it breaks first.

    python benchmarks/scale.py                          the tables on paper, from pipelines/costs/rates.py; seconds
    python benchmarks/scale.py --simulate 100000        list and plan so many pairs, then run a stand-in task for each

"On paper" means: a measured rate times a count. The simulation measures what grows with the number of pairs and has no
other measurement: time and memory of the driver while it lists RAW, plans, and runs Ray Data over the plan with a task
that does nothing. docs/scale.md has the tables and what they mean.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

SEQUENCES = (500, 5_000, 50_000)
FRAMES = 7
PAIRS = 3
"""Frames of an SR-RAW sequence, and 4x pairs that they give."""
BASE_MB = 180
"""Of a driver that plans few pairs: Python and its libraries."""
ROW_KB = 2.0
"""A job or a result as a row of Ray Data, about. Frames and tiles never go through the object store."""
RAW_MB, JPG_MB = 24.4, 6.0
"""An uncompressed 14-bit ARW of 12 megapixels, and its JPG at q92, about."""


def on_paper() -> Iterator[str]:
    """The rows of the tables."""
    from pipelines.costs import prices
    from pipelines.costs.rates import CPU_TASK_S, PLAN_MB, PLAN_MB_PAIRS, PLAN_PAIRS, PLAN_S, TASK_MB, TILES_PER_PAIR

    tile_mb = _tile_mb()
    yield "### Preprocessing, 12 megapixels, 4x, tiles of 96"
    yield ""
    yield "| | " + " | ".join(f"{count:,} sequences" for count in SEQUENCES) + " |"
    yield "|---|" + "---|" * len(SEQUENCES)
    pairs = [count * PAIRS for count in SEQUENCES]
    yield _row("pairs = tasks", [f"{number:,}" for number in pairs])
    yield _row("RAW and JPG stored, TB", [f"{count * FRAMES * (RAW_MB + JPG_MB) / 1e6:.2f}" for count in SEQUENCES])
    yield _row("read by the tasks, TB", [f"{number * (RAW_MB + 2 * JPG_MB) / 1e6:.2f}" for number in pairs])
    tiles = [number * TILES_PER_PAIR.value for number in pairs]
    yield _row("tiles", [f"{number:,.0f}" for number in tiles])
    yield _row("shards written, TB", [f"{number * tile_mb / 1e6:.2f}" for number in tiles])
    yield _row("CPU hours", [f"{number * CPU_TASK_S.value / 3600:.1f}" for number in pairs])
    yield _row("memory of a task, MB", [f"{TASK_MB.value:.0f}"] * len(pairs))
    yield _row("driver: planning, minutes", [f"{number * PLAN_S.value / PLAN_PAIRS / 60:.1f}" for number in pairs])
    least = f"under {BASE_MB}"
    memory = [number * PLAN_MB.value / PLAN_MB_PAIRS for number in pairs]
    yield _row("driver: memory to plan, MB", [f"{one:.0f}" if one > BASE_MB else least for one in memory])
    stored = [min(_chunk_tasks(), number) * ROW_KB / 1e3 for number in pairs]
    yield _row("object store, all nodes: rows of jobs and results, MB", [f"{one:.1f}" for one in stored])
    for name in prices.CPU_NODES:
        node = prices.INSTANCES[name]
        for nodes in (1, 4, 16):
            hours = [number * CPU_TASK_S.value / 3600 / (nodes * node.cpus) for number in pairs]
            shown = [f"{_span(one)}, {one * nodes * node.dollars:.2f} $" for one in hours]
            yield _row(f"{nodes} x {name}", shown)
    yield from training_rows(prices)


def training_rows(prices: Any) -> Iterator[str]:
    """The paper's 300 epochs of one crop per pair, by the crops per second of each kind of hardware."""
    from pipelines.costs.estimate import MEASURED_CORES
    from pipelines.costs.rates import CPU_CORE, TRAINING

    yield ""
    yield "### Training paper_4x, 300 epochs of one crop per pair"
    yield ""
    yield "| | crops/s | " + " | ".join(f"{count:,} sequences" for count in SEQUENCES) + " |"
    yield "|---|---|" + "---|" * len(SEQUENCES)
    crops = [300 * count * PAIRS for count in SEQUENCES]
    yield "| crops | | " + " | ".join(f"{number / 1e6:.1f} million" for number in crops) + " |"
    for rate in TRAINING["paper_4x"]:
        on_cpu = rate.hardware == CPU_CORE
        for name in prices.CPU_NODES if on_cpu else prices.nodes_with(rate.hardware):
            node = prices.INSTANCES[name]
            each = rate.value * (node.cpus / MEASURED_CORES if on_cpu else node.gpus)
            hours = [number / each / 3600 for number in crops]
            shown = " | ".join(f"{_span(one)}, {one * node.dollars:,.0f} $" for one in hours)
            units = f"{node.cpus} vCPUs" if on_cpu else f"{node.gpus} x {rate.hardware}"
            yield f"| {name}, {units} | {each:,.1f} | {shown} |"


def _span(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def _chunk_tasks() -> int:
    """Tasks of one Ray Data job on up to 64 CPUs (preprocessing/shards.py)."""
    from preprocessing import shards

    return max(shards._CHUNK_PAIRS, shards._CHUNK_PAIRS_PER_CPU * 64)


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _tile_mb() -> float:
    """Compressed size of a tile of 96 packed pixels at 4x, by the ratio that is assumed before a first run."""
    from preprocessing.estimate import COMPRESSION_RATIO, tile_bytes
    from preprocessing.plan import PreprocessOptions

    return tile_bytes(PreprocessOptions(), truth=False) * COMPRESSION_RATIO / 1e6


def simulate(pairs: int, work: Path) -> Iterator[str]:
    """List, plan and schedule this many pairs; a row per phase."""
    from preprocess import many, prepare

    prepare(work)
    raw = many(work, work / "small/00001", -(-pairs // PAIRS))
    yield "| phase | pairs | seconds | ms a pair | driver's peak, MB |"
    yield "|---|---|---|---|---|"
    plan = work / f"plan-{pairs}.json"
    for variant in ("plan", "schedule"):
        command = [sys.executable, __file__, "--variant", variant, "--raw", str(raw), "--plan", str(plan)]
        # stderr stays the console's: `schedule` reports its progress there.
        done = subprocess.run(
            [*command, "--pairs", str(pairs)], stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT
        )
        if done.returncode:
            raise RuntimeError(f"{variant}: exit code {done.returncode}")
        for phase, found in json.loads(done.stdout.splitlines()[-1]).items():
            count, seconds = found["count"], found["s"]
            yield f"| {phase} | {count:,} | {seconds:.1f} | {1e3 * seconds / count:.2f} | {found['mb']:.0f} |"


def plan_variant(raw: Path, plan: Path) -> dict[str, dict[str, float]]:
    """Measure listing and planning; write the jobs to `plan`."""
    from preprocessing.frames import discover
    from preprocessing.plan import PreprocessOptions, make_plan
    from preprocessing.storage import open_folder

    source = open_folder(str(raw))
    start = time.perf_counter()
    frames = sum(len(sequence.frames) for sequence in discover(source))
    listed, listed_mb = time.perf_counter() - start, _peak_mb()
    start = time.perf_counter()
    jobs = make_plan(source, PreprocessOptions(), {}).jobs
    planned, planned_mb = time.perf_counter() - start, _peak_mb()
    plan.write_text(json.dumps([asdict(job) for job in jobs]))
    return {
        f"listing {frames:,} frames": {"count": len(jobs), "s": listed, "mb": listed_mb},
        "planning, with tags and fingerprints": {"count": len(jobs), "s": planned, "mb": planned_mb},
    }


def schedule_variant(plan: Path, pairs: int) -> dict[str, dict[str, float]]:
    """Measure Ray Data over the plan, with a task that does nothing."""
    import ray

    from pipelines.cluster import start_ray
    from preprocessing.plan import PairJob
    from preprocessing.shards import run_tasks

    todo = [PairJob.from_dict(one) for one in json.loads(plan.read_text())][:pairs]
    start_ray()
    before, start, count = _now_mb(), time.perf_counter(), 0
    for result in run_tasks(todo, stand_in):
        count += result.status == "written"
        if count % 5000 == 0:
            print(f"{count} {time.perf_counter() - start:.0f} s {_now_mb():.0f} MB", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    store = ray.cluster_resources().get("object_store_memory", 0.0) / 1e6
    print(f"object store {store:.0f} MB; driver before {before:.0f} MB", file=sys.stderr)
    return {"scheduling a stand-in task each": {"count": count, "s": seconds, "mb": _peak_mb()}}


def stand_in(row: dict[str, Any]) -> dict[str, Any]:
    """A task that takes a job and returns a result, as preprocessing does, and does nothing else."""
    from preprocessing.pairs import PairResult
    from preprocessing.plan import PairJob

    job = PairJob.from_dict(json.loads(row["job"]))
    return asdict(PairResult(job.key, "written", rows=40, bytes=60_000_000, seconds=1.6))


def _peak_mb() -> float:
    return _status("VmHWM")


def _now_mb() -> float:
    return _status("VmRSS")


def _status(name: str) -> float:
    # Not ru_maxrss, which a process inherits from its parent.
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1e3 if found else 0.0


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", type=int, metavar="PAIRS", help="measure the driver with so many pairs")
    parser.add_argument("--work", type=Path, help="keep the simulated frames in this folder for later runs")
    for hidden in ("--variant", "--raw", "--plan"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.variant == "plan":
        print(json.dumps(plan_variant(Path(chosen.raw), Path(chosen.plan))))
    elif chosen.variant == "schedule":
        print(json.dumps(schedule_variant(Path(chosen.plan), chosen.pairs)))
    elif chosen.simulate:
        with tempfile.TemporaryDirectory() as temporary:
            work = (chosen.work or Path(temporary)).absolute()
            work.mkdir(parents=True, exist_ok=True)
            for line in simulate(chosen.simulate, work):
                print(line, flush=True)
    else:
        for line in on_paper():
            print(line)


if __name__ == "__main__":
    main()
