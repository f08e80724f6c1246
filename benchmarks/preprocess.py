"""From RAW to shards to crops: `python benchmarks/preprocess.py` (simulated 12 MP frames; minutes on 2 cores).

The variants in a table take turns, each in a new process with one thread; the best time of each is reported. "Bare" is
the minimum that any preprocessing must do: open the RAW and copy its counts, render it at half size, decode two JPGs,
compress and write the same tiles. `--long` adds the cost of 10 to 200 sequences and a tree of 100,000 frames. The
tables replace their section of benchmarks/RESULTS.md.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from measure import peak_mb  # noqa: E402

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
TABLES = ("pair", "crops", "cpus", "growth", "tiny", "tree")
PAIR = "00006-00002"
Measured = dict[str, Any]


def measure(name: str, work: Path, seconds: float) -> Measured:
    """Run one of VARIANTS in a new process: {"ms": best time, "peak_mb": ..., ...}."""
    command = [sys.executable, __file__, "--variant", name, "--work", str(work), "--seconds", str(seconds)]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def turns(names: tuple[str, ...], work: Path, seconds: float, rounds: int = 3) -> dict[str, Measured]:
    """Run the variants in turns, `rounds` times each. Returns the best round of each, with its highest memory peak."""
    found: dict[str, list[Measured]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            found[name].append(measure(name, work, seconds))
    return {
        name: min(results, key=lambda one: one["ms"]) | {"peak_mb": max(one["peak_mb"] for one in results)}
        for name, results in found.items()
    }


def repeat(step: Callable[[], object], seconds: float) -> float:
    """Best time of a step in milliseconds; it runs for about `seconds` and at least three times."""
    best, count, end = float("inf"), 0, time.perf_counter() + seconds
    while count < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        best, count = min(best, time.perf_counter() - start), count + 1
    return 1e3 * best


def the_pair(work: Path) -> Any:
    """(job, RAW folder, options) of the 12 MP pair."""
    from preprocessing.plan import PreprocessOptions, make_plan
    from preprocessing.storage import open_folder

    options = PreprocessOptions()
    source = open_folder(str(work / "raw"))
    return next(job for job in make_plan(source, options, {}).jobs if job.pair == PAIR), source, options


def ours(work: Path, seconds: float) -> Measured:
    from preprocessing.pairs import process
    from preprocessing.storage import open_folder

    job, source, options = the_pair(work)
    target = open_folder(str(work / "out"))
    return {"ms": repeat(lambda: process(job, source, target, options), seconds)}


def bare(work: Path, seconds: float) -> Measured:
    import cv2
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import rawpy
    from PIL import Image

    from preprocessing.pairs import _parquet, pair_rows
    from preprocessing.schema import ShardInfo
    from preprocessing.storage import open_folder

    cv2.setNumThreads(1)
    job, source, options = the_pair(work)
    rows, info = pair_rows(source, job, options), ShardInfo(options.tile_px, options.scale, options.shard_options)
    target = open_folder(str(work / "bare"))
    tiles = io.BytesIO(_parquet(rows, info).to_pybytes())
    del rows
    groups = [pq.ParquetFile(tiles).read_row_group(number) for number in range(pq.ParquetFile(tiles).num_row_groups)]
    parts: Measured = {}

    def timed(name: str, step: Callable[[], object]) -> None:
        start = time.perf_counter()
        step()
        parts[name] = min(parts.get(name, 1e9), 1e3 * (time.perf_counter() - start))

    def raw() -> None:
        with rawpy.imread(io.BytesIO(source.read(job.lr_raw))) as opened:
            opened.raw_image_visible.copy()
            opened.postprocess(half_size=True, use_camera_wb=True, no_auto_bright=True)

    def pictures() -> None:
        for path in (job.lr_jpg, job.hr_jpg):
            np.asarray(Image.open(io.BytesIO(source.read(path))))

    def write() -> None:
        sink = pa.BufferOutputStream()
        options = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(sink, groups[0].schema, **options) as writer:
            for group in groups:
                writer.write_table(group)
        target.put("x.parquet", sink.getvalue())

    def step() -> None:
        timed("raw_ms", raw)
        timed("jpg_ms", pictures)
        timed("write_ms", write)

    return {"ms": repeat(step, seconds)} | parts


def authors_crops(work: Path, seconds: float) -> Measured:
    import authors_loader
    import cv2
    import numpy as np
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    folder = work / "raw/00001"
    pair = authors_loader.Pair(
        folder / "00006.ARW", folder / "00006.JPG", folder / "00002.JPG", 35, 150, 240, np.eye(2, 3, dtype=np.float32)
    )
    random = np.random.default_rng(0)
    return {"ms": repeat(lambda: authors_loader.crop(pair, random), seconds)}


def our_crops(work: Path, seconds: float) -> Measured:
    import itertools

    import torch

    from pipelines.loader import CropStream, index_split

    torch.set_num_threads(1)
    stream = CropStream(index_split(str(work / "out"), "train"), seed=0, crop_px=64, augment=True)
    numbers = itertools.count()
    turn = 50  # crops per turn: report the mean of the best turn, not the best crop
    return {"ms": repeat(lambda: [stream.crop(next(numbers)) for _ in range(turn)], seconds) / turn}


VARIANTS = {"ours": ours, "bare": bare, "authors_crops": authors_crops, "our_crops": our_crops}


def pair_rows_table(work: Path, seconds: float) -> Iterator[str]:
    found = turns(("bare", "ours"), work, seconds)
    one, two = found["bare"], found["ours"]
    yield "| | ms | RAW / JPGs / compressing and writing | peak MB of the process |"
    yield "|---|---|---|---|"
    yield (
        f"| bare decoding and writing | {one['ms']:.0f} | {one['raw_ms']:.0f} / {one['jpg_ms']:.0f} / "
        f"{one['write_ms']:.0f} | - |"
    )
    yield f"| a task | {two['ms']:.0f} | | **{two['peak_mb']:.0f}** |"
    yield f"| a task / bare | **{two['ms'] / one['ms']:.2f}** | | |"


def crops_table(work: Path, seconds: float) -> Iterator[str]:
    if not (work / "out").exists():
        measure("ours", work, 0)  # writes the pair's shard, if the first table did not run
    found = turns(("authors_crops", "our_crops"), work, seconds)
    theirs, mine = found["authors_crops"], found["our_crops"]
    yield "| | ms a crop | crops/s on a core | peak MB |"
    yield "|---|---|---|---|"
    yield f"| the authors' way | {theirs['ms']:.0f} | {1e3 / theirs['ms']:.1f} | {theirs['peak_mb']:.0f} |"
    yield f"| from shards | {mine['ms']:.2f} | {1e3 / mine['ms']:.0f} | {mine['peak_mb']:.0f} |"
    yield f"| ratio | | **{theirs['ms'] / mine['ms']:.0f}** | |"


def many(work: Path, template: Path, count: int) -> Path:
    """A folder of `count` sequences, all hard links to `template`."""
    root = work / f"many-{count}"
    for number in range(0 if root.exists() else count):
        (root / f"{number:05d}").mkdir(parents=True)
        for file in template.iterdir():
            if file.is_file():
                os.link(file, root / f"{number:05d}" / file.name)
    return root


def run_job(raw: Path, shards: Path, cpus: int, options: dict[str, int]) -> Measured:
    """The whole job in a new driver process: seconds after Ray's start, pairs, driver's peak memory above its start."""
    code = (
        "import sys,json,re,time,ray;from pathlib import Path;from preprocessing.shards import *;"
        f"ray.init(num_cpus={cpus},include_dashboard=False,log_to_driver=False);"
        "mb=lambda k:int(re.search(k+r':\\s+(\\d+)',Path('/proc/self/status').read_text()).group(1))/1024;"
        "before=mb('VmRSS');start=time.perf_counter();"
        f"r=preprocess({str(raw)!r},{str(shards)!r},PreprocessOptions(**{options!r}),progress=False);"
        "print(json.dumps({'s':time.perf_counter()-start,'pairs':r.written+len(r.quarantined),'written':r.written,"
        "'task_s':r.task_seconds,'driver_mb':mb('VmHWM')-before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    shutil.rmtree(shards, ignore_errors=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def cpus_table(work: Path, _: float) -> Iterator[str]:
    raw = many(work, work / "raw/00001", 6)
    yield "| CPUs | pairs | seconds | pairs/minute | seconds a task |"
    yield "|---|---|---|---|---|"
    for cpus in (1, 2):
        one = run_job(raw, work / "jobs", cpus, {})
        yield (
            f"| {cpus} | {one['written']} | {one['s']:.1f} | **{60 * one['written'] / one['s']:.0f}** | "
            f"{one['task_s'] / one['written']:.2f} |"
        )


def growth_table(work: Path, counts: tuple[int, ...]) -> Iterator[str]:
    yield "| sequences (768x512) | pairs | seconds | ms a sequence | driver's peak, MB above its start |"
    yield "|---|---|---|---|---|"
    for count in counts:
        raw = many(work, work / "small/00001", count)
        one = run_job(raw, work / "jobs", 2, {"tile_px": 32, "stride_px": 21})
        each = 1e3 * one["s"] / count
        yield f"| {count} | {one['written']} | {one['s']:.1f} | **{each:.0f}** | {one['driver_mb']:.0f} |"


def tiny_table(work: Path, count: int) -> Iterator[str]:
    """Pairs with an empty RAW, to measure the job's overhead alone."""
    root = work / f"tiny-{count}"
    template = work / "small/00001"
    for number in range(0 if root.exists() else count):
        folder = root / f"{number:05d}"
        folder.mkdir(parents=True)
        for stem in ("00006", "00002"):
            os.link(template / f"{stem}.JPG", folder / f"{stem}.JPG")
            (folder / f"{stem}.ARW").touch()
    one = run_job(root, work / "jobs", 2, {})
    yield "| pairs with an empty RAW | seconds | ms a pair | driver's peak, MB above its start |"
    yield "|---|---|---|---|"
    yield f"| {one['pairs']} | {one['s']:.1f} | {1e3 * one['s'] / one['pairs']:.1f} | **{one['driver_mb']:.0f}** |"


def tree_table(work: Path, sequences: int = 14_286) -> Iterator[str]:
    code = (
        "import sys,time;from preprocessing.frames import discover;from preprocessing.storage import *;"
        "from preprocessing.plan import *;f=open_folder(sys.argv[1]);t=time.perf_counter();"
        "n=sum(len(s.frames) for s in discover(f));a=time.perf_counter()-t;"
        # Do not use ru_maxrss, which a process inherits from its parent.
        "m=lambda:round(int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])/1e3);k=m();"
        "t=time.perf_counter();p=make_plan(f,PreprocessOptions(),{});b=time.perf_counter()-t;"
        "print(n,round(a,1),k,len(p.jobs),round(b,1),m())"
    )
    raw = many(work, work / "small/00001", sequences)
    done = subprocess.run([sys.executable, "-c", code, raw], cwd=ROOT, capture_output=True, text=True, check=True)
    frames, listing, mb, pairs, planning, all_mb = done.stdout.split()
    yield "| frames | listing, s | resident MB | pairs | planning, with tags and fingerprints, s | resident MB |"
    yield "|---|---|---|---|---|---|"
    yield f"| {frames} | **{listing}** | **{mb}** | {pairs} | {planning} | {all_mb} |"


def prepare(work: Path) -> None:
    """Simulate a 12 MP sequence and a small one, if missing, and delete their truth, which no camera writes."""
    from preprocessing.simulator.sequences import simulate

    for name, width, raw_format in (("raw", 4240, "arw"), ("small", 768, "dng")):
        if not (work / name / "00001").exists():
            simulate(work / name, sequences=1, width_px=width, raw_format=raw_format, preset="tripod")
            shutil.rmtree(work / name / "00001/truth")


def main() -> None:
    """Measure, print each row when it is ready, and update RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="time per variant and round")
    parser.add_argument(
        "--long",
        action="store_true",
        help="10, 50 and 200 sequences instead of 5 and 20, ten times the small tasks, and 100,000 frames",
    )
    parser.add_argument("--only", choices=TABLES, help="print this table only")
    parser.add_argument("--work", type=Path, help="keep the simulated frames in this folder for later runs")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.variant:
        result = VARIANTS[chosen.variant](chosen.work, chosen.seconds)
        print(json.dumps(result | {"peak_mb": peak_mb()}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = chosen.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        report(work.absolute(), chosen)


def report(work: Path, chosen: argparse.Namespace) -> None:
    from results import Tables, provenance, publish

    shown = [argument for argument in sys.argv[1:] if argument != "--work" and argument != str(chosen.work)]
    origin = provenance(" ".join(["python benchmarks/preprocess.py", *shown]), ("../preprocessing", "../pipelines"))
    prepare(work)
    counts = (10, 50, 200) if chosen.long else (5, 20)
    tables: Tables = {
        "pair": ("A 12 MP pair, 35 and 150 mm, --align scale, 40 tiles", lambda: pair_rows_table(work, chosen.seconds)),
        "crops": ("Crops into training, target 512 px", lambda: crops_table(work, chosen.seconds)),
        "cpus": ("Throughput, 12 MP", lambda: cpus_table(work, chosen.seconds)),
        "growth": ("Cost per sequence", lambda: growth_table(work, counts)),
        "tiny": ("Many small tasks", lambda: tiny_table(work, 20_000 if chosen.long else 2_000)),
        "tree": ("A large tree", lambda: tree_table(work)),
    }
    if not chosen.long and chosen.only != "tree":
        del tables["tree"]
    publish("preprocessing", origin, tables, chosen.only)


if __name__ == "__main__":
    main()
