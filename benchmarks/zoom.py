"""`sdan zoom` of a 12-megapixel RAW with the starter model: `python benchmarks/zoom.py [--device cpu|cuda]`.

Time: the photo, 4240 x 2832 photosites, consists of copies of a simulated frame. A child process zooms it and writes
the PNG; its wall time and its peak resident memory are measured from outside. It also reports its stages, which follow
each other and add up to the total: start (interpreter and imports), model (read it), decode (read and render the RAW),
device (wait until the GPU, which starts while the RAW is read, has the model and its kernels), network (in the forward
passes; on a GPU the part of the time between CUDA events that was waited for), join (everything else until rows are
finished: cutting, copying and blending tiles), write (what filtering, compressing and writing the PNG add: both go on
in threads while rows are computed), end (of the process).

Borders: how far the output where tiles overlap is from that of a run whose tiles overlap by twice as much, in levels of
255, on the simulated frame or on `--photo`. Overlaps are in packed pixels. The computed pixels are those of all tiles,
over those of the photo. The third row is `sdan zoom`'s.

The tables replace their section of benchmarks/RESULTS.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import cast

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from pipelines.zooming.start import large_imports  # noqa: E402

with large_imports() if "--child" in sys.argv else nullcontext():  # the child starts as `sdan zoom` does
    import numpy as np
    import torch
    from results import Tables, provenance, publish
    from torch import Tensor

    from pipelines import zoom as verb
    from preprocessing.raw import decode
    from preprocessing.raw.dng import write_dng
    from sdan import inference, starter_folder, tiles

PHOTO_SIZE = (2832, 4240)
"""Height and width, photosites: the camera of SR-RAW."""
FRAME_PX = 1536
"""Width of the simulated frame."""
TILE_PX = 32
"""The starter model's."""
OVERLAPS = ((4, 12), (6, 8), (6, 12), (8, 12))
"""Of the first and of the second pass, packed pixels."""
STAGES = ("start", "model", "decode", "device", "network", "join", "write", "end")


def simulated_frame(folder: Path) -> Path:
    """The 50 mm frame of a simulated sequence."""
    from preprocessing.simulator.sequences import simulate

    (sequence,) = simulate(folder / "simulated", sequences=1, width_px=FRAME_PX, seed=0)
    return sequence / "00005.dng"


def full_photo(frame: Path, folder: Path) -> Path:
    """A DNG of PHOTO_SIZE: copies of the frame's mosaic beside and below each other."""
    sensor = decode.load(frame).sensor
    height, width = sensor.mosaic_HW.shape
    copies = [-(-side // own) for side, own in zip(PHOTO_SIZE, (height, width), strict=True)]
    mosaic = np.tile(sensor.mosaic_HW, copies)[: PHOTO_SIZE[0], : PHOTO_SIZE[1]]
    levels = {"black_level": sensor.black_level.tolist(), "white_level": int(sensor.white_level)}
    write_dng(folder / "photo.dng", mosaic, wb=(sensor.wb / sensor.wb[1])[[0, 1, 3]].tolist(), **levels)
    return folder / "photo.dng"


class Clock:
    """Adds up the time of the calls that it wraps; on CUDA the time that the device computes them."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.spent_s, self.calls = device.type == "cuda", 0.0, 0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(x: Tensor, *others: Tensor) -> Tensor:
            self.calls += x.shape[0]
            mark, began = time.perf_counter(), self._event()
            result = function(x, *others)
            self.spent_s += time.perf_counter() - mark
            if began is not None:
                self.events.append((began, cast(torch.cuda.Event, self._event())))
            return result

        return timed

    def _event(self) -> torch.cuda.Event | None:
        if not self.cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Call it after all work is done."""
        return sum(began.elapsed_time(ended) for began, ended in self.events) / 1e3 if self.cuda else self.spent_s


def zoom_once(photo: Path, out: Path, began_s: float) -> dict[str, float]:
    """Zoom as `sdan zoom` does, from `began_s` (Unix time). Returns each stage's seconds, tiles and output size."""
    times = {"start": time.time() - began_s}
    mark = time.perf_counter()
    zoomer = verb.Zoomer.load(starter_folder())
    times["model"] = time.perf_counter() - mark
    mark = time.perf_counter()
    decoded = verb.read_photo(photo, zoomer.model.config)
    times["decode"] = time.perf_counter() - mark
    mark = time.perf_counter()
    zoomer.wait()
    times["device"] = time.perf_counter() - mark
    clock, waited = Clock(next(zoomer.model.parameters()).device), 0.0
    zoomer.model.find_offset = clock(zoomer.model.find_offset)  # type: ignore[method-assign]
    zoomer.model.zoom_at = clock(zoomer.model.zoom_at)  # type: ignore[method-assign]

    def timed(parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        nonlocal waited
        while True:
            asked = time.perf_counter()
            part = next(parts, None)
            waited += time.perf_counter() - asked
            if part is None:
                return
            yield part

    mark = time.perf_counter()
    size = zoomer.size(decoded)
    verb.write_levels(timed(zoomer.levels(decoded, 8)), out, size, 8)
    total = time.perf_counter() - mark
    network = min(clock.seconds(), waited)  # a GPU also computes while rows are written
    times |= {"network": network, "join": waited - network, "write": total - waited}
    return times | {"tiles": clock.calls, "width": size[0], "height": size[1]}


def measured_zoom(photo: Path, out: Path, device: str) -> dict[str, float]:
    """`zoom_once` in a child process, with `total` (seconds) and `peak_mb` as seen from outside."""
    environment = os.environ | ({} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})
    began_s, mark = time.time(), time.perf_counter()
    command = [sys.executable, __file__, "--child", str(photo), str(out), str(began_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
        assert child.stdout is not None
        text = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"zoom: expected exit code 0, got {child.returncode}")
    total = time.perf_counter() - mark
    run: dict[str, float] = json.loads(text.splitlines()[-1])
    end = total - sum(run[stage] for stage in STAGES[:-1])
    return run | {"end": end, "total": total, "peak_mb": usage.ru_maxrss / 1024}


def time_rows(frame: Path, folder: Path, device: str, repeats: int) -> Iterator[str]:
    photo = full_photo(frame, folder)
    yield (
        "| device | tiles | total, s | "
        + ", s | ".join(STAGES)
        + ", s | without start, s | peak resident MB | PNG MB |"
    )
    yield "|---" * (len(STAGES) + 6) + "|"
    for _ in range(repeats):
        out = folder / "zoomed.png"
        run = measured_zoom(photo, out, device)
        cells = [device, f"{run['tiles']:.0f}", f"**{run['total']:.1f}**", *(f"{run[stage]:.1f}" for stage in STAGES)]
        cells += [f"{run['total'] - run['start']:.1f}", f"{run['peak_mb']:.0f}", f"{out.stat().st_size / 1e6:.0f}"]
        yield "| " + " | ".join(cells) + " |"


def border_rows(photo: Path) -> Iterator[str]:
    zoomer = verb.Zoomer.load(starter_folder())
    zoomer.wait()
    decoded = verb.read_photo(photo, zoomer.model.config)
    size, upscale, input_tile_px = (decoded.raw.shape[1], decoded.raw.shape[2]), zoomer.model.config.upscale, TILE_PX

    def run(overlap_px: int, second_px: int) -> Tensor:
        inference.OVERLAP_PX = second_px
        return inference.zoom(
            zoomer.model,
            decoded.raw,
            decoded.rendering,
            input_tile_px=input_tile_px,
            overlap_px=overlap_px,
            precision="fp32",
        )

    yield "| overlaps of the passes | their pixels / the photo's | mean | 99 % | 99.9 % | most |"
    yield "|---" * 6 + "|"
    for overlap_px, second_px in OVERLAPS:
        first = tiles.cover(size, (input_tile_px, input_tile_px), overlap_px)
        height, width = (tiles.fitted(side, inference.TILE_PX, second_px) for side in size)
        second = tiles.cover(size, (height, width), second_px)
        along = overlapping(first, upscale) | overlapping(second, upscale)
        levels = 255 * (run(overlap_px, second_px) - run(2 * overlap_px, 2 * second_px)).abs()[:, along].flatten()
        shares = [len(tiling) * tiling.height * tiling.width / (size[0] * size[1]) for tiling in (first, second)]
        ends = [float(levels.kthvalue(int(share * levels.numel())).values) for share in (0.99, 0.999)]
        cells = [f"{overlap_px}, {second_px}", f"{shares[0]:.2f}, {shares[1]:.2f}", f"{float(levels.mean()):.3f}"]
        cells += [f"{ends[0]:.2f}", f"**{ends[1]:.2f}**", f"{float(levels.max()):.1f}"]
        yield "| " + " | ".join(cells) + " |"


def overlapping(tiling: tiles.Tiling, upscale: int) -> Tensor:
    """[upscale H, upscale W]: whether a pixel lies in two tiles or more."""
    rows, cols = (sum_of(starts, side) for starts, side in ((tiling.tops, tiling.height), (tiling.lefts, tiling.width)))
    return ((rows[:, None] > 1) | (cols > 1)).repeat_interleave(upscale, 0).repeat_interleave(upscale, 1)


def sum_of(starts: Iterable[int], side: int) -> Tensor:
    """How many tiles cover each position along one axis."""
    starts = list(starts)
    count = torch.zeros(starts[-1] + side, dtype=torch.int32)
    for start in starts:
        count[start : start + side] += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=("time", "borders"), help="print one table instead of updating RESULTS.md")
    parser.add_argument("--photo", type=Path, help="RAW for the borders, instead of the simulated frame")
    parser.add_argument("--repeats", type=int, default=2, help="rows of the table of times")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        photo, out, began_s = chosen.child
        print(json.dumps(zoom_once(Path(photo), Path(out), float(began_s))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frame = simulated_frame(folder)
        tables: Tables = {
            "time": (
                "A 12-megapixel RAW to 192 megapixels",
                partial(time_rows, frame, folder, chosen.device, chosen.repeats),
            ),
            "borders": ("Along the borders of tiles, levels of 255", partial(border_rows, chosen.photo or frame)),
        }
        origin = provenance("python benchmarks/zoom.py", ("../sdan", "../pipelines"))
        publish("zoom" if chosen.device == "cpu" else "zoom on a GPU", origin, tables, chosen.only)


if __name__ == "__main__":
    main()
