"""Zoom a whole photo, from top to bottom, in two passes over overlapping tiles.

The first pass finds the offsets, in tiles of the size that the network was trained on: cross packing attention sums
over its tile and the flips mirror it, so their results depend on its size. The second pass does the rest. It consists
of convolutions and sampling, where a pixel depends on its neighbourhood only, so its tiles are larger and fewer pixels
are computed twice. The first pass runs just ahead of the second.

At the borders of tiles the network sees zero padding. What that spoils is dropped or blended, see `tiles.Tiling`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TypeVar

import torch
from torch import Tensor

from sdan.baselines import Network
from sdan.network import CHANNELS, SDANConfig
from sdan.ops.precision import ComputePlan, compute_plan
from sdan.raw_input import mosaic_to_packed, packed_to_mosaic, rgb_to_packed
from sdan.resample import bicubic, low_pass
from sdan.tiles import Outputs, Tiling, cover, fitted

T = TypeVar("T")


class InferenceError(ValueError):
    """A model whose result cannot be used; the message is one line that says what to do."""


Progress = Callable[[int, int], None]
"""Called with (tiles done, total tiles)."""

TILE_PX = 128
"""Largest side of the second pass's tiles, pixels of x."""
OVERLAP_PX = 12
"""Their overlap. With the first pass's default, the starter model's output where tiles overlap is within 0.70 of 255
levels (99.9th percentile) of a run with twice the overlaps; see benchmarks/zoom.py for others."""
_CPU_PIXELS = 2**13
"""Pixels of x in a batch on a CPU: 8 of the starter model's tiles, with 4 to 16 about as fast."""
_GPU_PIXELS = 2**19
"""Pixels of x in a batch on a GPU with enough memory."""
_MEMORY_SHARE = 0.5
"""Share of a GPU's free memory for the feature maps of a batch; the rest is for what their estimate leaves out."""


def zoom(
    model: Network,
    x: Tensor,
    rendering: Tensor,
    *,
    input_tile_px: int,
    overlap_px: int | None = None,
    batch: int | None = None,
    precision: str = "auto",
    strength: float = 1.0,
    progress: Progress | None = None,
) -> Tensor:
    """Zoom one photo with its rendering as reference ({X, X}); no target is needed.

    Returns:
        float32 [3, upscale H, upscale W] in [0, 1], on the CPU. Arguments and errors: as `zoom_rows`.
    """
    parts = zoom_rows(
        model,
        x,
        rendering,
        input_tile_px=input_tile_px,
        overlap_px=overlap_px,
        batch=batch,
        precision=precision,
        strength=strength,
        progress=progress,
    )
    output = torch.empty(3, *(model.config.upscale * side for side in x.shape[-2:]))
    done = 0
    for part in parts:
        output[:, done : done + part.shape[1]] = part
        done += part.shape[1]
    return output


def zoom_rows(
    model: Network,
    x: Tensor,
    rendering: Tensor,
    *,
    input_tile_px: int,
    overlap_px: int | None = None,
    batch: int | None = None,
    precision: str = "auto",
    bits: int | None = None,
    strength: float = 1.0,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """As `zoom`, but yields the result from top to bottom, at most `TILE_PX * upscale` pixel rows at a time.

    Memory beyond the arguments: one row of tiles of the output, and the feature maps of a batch.

    Args:
        model: it is put into eval mode and into the layout of `compute_plan`, and runs on its own device.
        x: one photo as the network's input, [C,H,W] in [0, 1] (raw_input.normalise), any size.
        rendering: [3,H,W] ([3,2H,2W] for packed input) sRGB in [0, 1], of the same RAW; for RGB input x itself.
        input_tile_px: side of the first pass's tiles, pixels of x; use the training crop's.
        overlap_px: their overlap, pixels of x; default 3/16 of the tile, at least 8 mosaic pixels.
        batch: most tiles per forward pass; default what suits the device. Halved where a GPU's memory is too small.
        precision: auto, fp32, bf16 or fp16 (ops.precision.resolve).
        bits: None for float32 in [0, 1]; 8 for levels as uint8, 16 as uint16.
        strength: 1 for the network's output, 0 for the rendering enlarged bicubically, between them a linear mixture.
        progress: called with (tiles done, total tiles); both passes count.

    Yields:
        [3, pixel rows, upscale W] on the CPU, channels-last in memory as image files are.

    Raises:
        ValueError, at once: sizes that do not match, an overlap outside 8 mosaic pixels to half a tile, other bits.
        InferenceError, with the first such rows: the network's output is NaN or infinite.
        torch.OutOfMemoryError: a GPU without memory for a single tile.
    """
    if bits not in (None, 8, 16):
        raise ValueError(f"bits: expected None, 8 or 16, got {bits}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: expected a value in [0, 1], got {strength}")
    overlap_px = _check(model.config, x, rendering, input_tile_px, overlap_px)
    plan = compute_plan(next(model.parameters()).device, precision)
    model.eval().to(memory_format=plan.memory_format)
    rows = _zoomed(model, x, rendering, (input_tile_px, overlap_px), batch, plan, strength, progress)
    return _to_host(rows, bits, plan.device)


def warm_up(model: Network, *, input_tile_px: int, precision: str = "auto") -> None:
    """Zoom a blank photo of one tile, so that a GPU has its libraries and kernels when the first photo comes.

    Arguments and errors: as `zoom_rows`.
    """
    config = model.config
    x = torch.zeros(CHANNELS[config.input], TILE_PX, TILE_PX)
    rendering = torch.zeros(3, *(config.mosaic_factor * side for side in _size(x)))
    for _ in zoom_rows(model, x, rendering, input_tile_px=input_tile_px, precision=precision, bits=8):
        pass


@torch.inference_mode()
def _zoomed(
    model: Network,
    x: Tensor,
    rendering: Tensor,
    first_tile: tuple[int, int],
    batch: int | None,
    plan: ComputePlan,
    strength: float,
    progress: Progress | None,
) -> Iterator[Tensor]:
    """Pixel rows of the zoomed photo on the model's device, not clipped, valid until the next are asked for.

    Args:
        first_tile: side and overlap of the first pass's tiles.
    """
    config, factor, device = model.config, model.config.mosaic_factor, plan.device
    step = 2 if config.input == "mosaic" else 1  # a mosaic's tiles start on an R photosite
    height, width = (fitted(side, TILE_PX, OVERLAP_PX, step) for side in _size(x))
    large = cover(_size(x), (height, width), OVERLAP_PX, step=step, upscale=config.upscale)
    slabs = _slabs((x, rendering), (1, factor), large, device)
    padded = _padded(config, x, rendering, first_tile[0])
    small = cover(_size(padded[0]), (first_tile[0], first_tile[0]), first_tile[1], step=step)
    count = _counter(progress, len(large) + (len(small) if model.offset_channels else 0))
    offsets: Iterator[Tensor] = repeat(torch.empty(0, height, x.shape[2], device=device))
    if model.offset_channels:
        first = _Pass(small, (1, factor), _offset_finder(model), plan, batch or _suitable(config, small, device), count)
        rows = first.rows(_slabs(padded, (1, factor), small, device), model.offset_channels)
        offsets = _windows(rows, large)
    second = _Pass(
        large, (1, factor, 1), _zoomer(model, strength), plan, batch or _suitable(config, large, device), count
    )
    yield from second.rows(((*slab, offset) for slab, offset in zip(slabs, offsets, strict=False)), 3)


def _offset_finder(model: Network) -> Callable[..., Tensor]:
    return lambda x, rendering: model.find_offset(x, low_pass(rendering, model.config.mosaic_factor))


def _zoomer(model: Network, strength: float) -> Callable[..., Tensor]:
    def run(x: Tensor, rendering: Tensor, offset: Tensor) -> Tensor:
        zoomed = model.zoom_at(x, offset, rendering)
        return zoomed if strength == 1 else bicubic(rendering, model.config.scale).lerp(zoomed, strength)

    return run


@dataclass
class _Pass:
    """One pass over a photo: runs the network on batches of tiles and joins its outputs.

    The tiles of a batch lie side by side.
    """

    tiling: Tiling
    factors: Sequence[int]
    """Size of each input of `run` over that of x."""
    run: Callable[..., Tensor]
    """A batch of tiles of each input -> their outputs [n, C, upscale tile height, upscale tile width]."""
    plan: ComputePlan
    batch: int
    """Most tiles per call of `run`."""
    count: Callable[[int], None]
    """Called with the number of tiles that each call has done."""

    def rows(self, slabs: Iterable[Sequence[Tensor]], channels: int) -> Iterator[Tensor]:
        """The output's pixel rows. `slabs`: each input's pixels under each row of tiles, [C, H, W]."""
        return self.tiling.join((self._outputs(inputs) for inputs in slabs), channels, self.plan.device)

    def _outputs(self, slabs: Sequence[Tensor]) -> Iterator[Outputs]:
        done, columns = 0, range(len(self.tiling.lefts))
        while done < len(columns):
            some = columns[done : done + self.batch]
            outputs = self._try(slabs, some)
            if outputs is None:
                self.batch = len(some) // 2
                torch.cuda.empty_cache()
                continue
            yield some, outputs
            done += len(some)
            self.count(len(some))

    def _try(self, slabs: Sequence[Tensor], columns: Sequence[int]) -> Tensor | None:
        """The outputs of one batch; None if the device has no memory for it (for a single tile, the error)."""
        try:
            tiles = [self._cut(slab, columns, factor) for slab, factor in zip(slabs, self.factors, strict=True)]
            with self.plan.inference():
                return self.run(*tiles)
        except torch.OutOfMemoryError:
            if len(columns) == 1:
                raise
        return None

    def _cut(self, slab: Tensor, columns: Sequence[int], factor: int) -> Tensor:
        """[n, C, factor tile height, factor tile width] float32, in the plan's layout."""
        lefts, width = [factor * self.tiling.lefts[column] for column in columns], factor * self.tiling.width
        tiles = torch.stack([slab[:, :, left : left + width] for left in lefts])
        return tiles.float().contiguous(memory_format=self.plan.memory_format)


def _suitable(config: SDANConfig, tiling: Tiling, device: torch.device) -> int:
    """The number of tiles in a batch for this device."""
    pixels = tiling.height * tiling.width
    if device.type != "cuda":
        return max(1, _CPU_PIXELS // pixels)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # Values per pixel of x: the feature maps that live at once, and the output with the copies that its making needs.
    enlarged = 3 * config.features if config.upsampling == "stages" else 0
    values = 16 * config.features + tiling.upscale**2 * (enlarged + 6 * 3)
    return max(1, min(int(_MEMORY_SHARE * free) // (4 * values), _GPU_PIXELS) // pixels)


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that adds to the number of tiles done and reports it."""
    done = 0

    def count(tiles: int) -> None:
        nonlocal done
        done += tiles
        if progress is not None:
            progress(done, total)

    return count


def _windows(rows: Iterator[Tensor], tiling: Tiling) -> Iterator[Tensor]:
    """For each row of tiles, the pixels under it [C, tile height, W], of pixel rows that come from top to bottom."""
    held, first = next(rows).clone(), 0
    for top in tiling.tops:
        held, first = held[:, top - first :], top
        while held.shape[1] < tiling.height:
            held = torch.cat((held, next(rows)), dim=1)
        yield held[:, : tiling.height]


def _slabs(
    photos: Sequence[Tensor], factors: Sequence[int], tiling: Tiling, device: torch.device
) -> Iterator[Sequence[Tensor]]:
    """For each row of tiles, the pixels of each photo under it, [C, factor tile height, factor W] on the device.

    On CUDA the next row's pixels are on their way while a row is computed. A CPU has no idle core for that.
    """

    def cut(top: int) -> list[Tensor]:
        height = tiling.height
        return [photo[:, top * k : (top + height) * k] for photo, k in zip(photos, factors, strict=True)]

    if device.type != "cuda":
        yield from ([part.to(device) for part in cut(top)] for top in tiling.tops)
        return
    stream = torch.cuda.Stream(device)

    def send(top: int) -> tuple[list[Tensor], torch.cuda.Event]:
        with torch.cuda.stream(stream):
            sent = [_pinned(part).copy_(part).to(device, non_blocking=True) for part in cut(top)]
            return sent, stream.record_event()

    for sent, arrived in _one_ahead(map(send, tiling.tops)):
        current = torch.cuda.current_stream(device)
        current.wait_event(arrived)
        for part in sent:
            part.record_stream(current)
        yield sent


def _to_host(rows: Iterator[Tensor], bits: int | None, device: torch.device) -> Iterator[Tensor]:
    """Finished pixel rows on the CPU; on CUDA they are copied while the next are computed."""
    if device.type != "cuda":
        for part in rows:
            _check_finite(_all_finite(part))
            yield _finished(part, bits)
        return
    stream = torch.cuda.Stream(device)

    def fetch(part: Tensor) -> tuple[list[Tensor], torch.cuda.Event]:
        sent = [_all_finite(part), _finished(part, bits)]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            host = [_pinned(each).copy_(each, non_blocking=True) for each in sent]
            for each in sent:
                each.record_stream(stream)
            return host, stream.record_event()

    for (finite, host), arrived in _one_ahead(map(fetch, rows)):
        arrived.synchronize()
        _check_finite(finite)
        yield host
        del host  # the next rows need memory


@torch.inference_mode()
def _all_finite(rows: Tensor) -> Tensor:
    """Whether [3, H, W], channels-last, holds finite values only; without a copy of them, which `isfinite` makes."""
    return torch.stack(rows.permute(1, 2, 0).aminmax()).isfinite().all()


def _check_finite(finite: Tensor) -> None:
    if not finite:
        raise InferenceError("model: expected a finite picture, got NaN or infinity; use another model")


@torch.inference_mode()
def _finished(rows: Tensor, bits: int | None) -> Tensor:
    """A copy of [3, H, W], clipped; with `bits` as levels. May change `rows`."""
    if bits is None:
        return rows.clamp(0, 1)
    levels = rows.clamp_(0, 1).mul_(2**bits - 1).round_()
    return levels.to(torch.uint8 if bits == 8 else torch.uint16)


def _pinned(like: Tensor) -> Tensor:
    """Page-locked memory on the host, which CUDA copies without waiting; of the same shape, type and strides."""
    return torch.empty_like(like, device="cpu", pin_memory=True)


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each given out only after the next has been started."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def _padded(config: SDANConfig, x: Tensor, rendering: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """(x, rendering), at the bottom and the right reflected about the outer pixel, to at least the size of a tile.

    The reflection keeps a mosaic's colour phase.
    """
    factor = config.mosaic_factor
    tall, wide = (max(side, tile) * factor for side in _size(x))
    if (tall, wide) == _size(rendering):
        return x, rendering
    if config.input == "packed":  # reflect photosites, not cells, so that RAW and reference stay registered
        mosaic = _reflected(packed_to_mosaic(x[None])[0], tall, wide)
        x = mosaic_to_packed(mosaic[None])[0]
    elif config.input == "packed_rgb":
        x = rgb_to_packed(_reflected(rendering, tall, wide)[None])[0]
    else:
        x = _reflected(x, tall, wide)
    return x, _reflected(rendering, tall, wide)


def _reflected(image: Tensor, height: int, width: int) -> Tensor:
    """[C, height, width], continued by reflection: columns 0, 1, ..., old - 1, old - 2, ..., 0, 1, ..."""
    rows, cols = (_reflection(new, old) for new, old in zip((height, width), _size(image), strict=True))
    return image[:, rows.to(image.device)][:, :, cols.to(image.device)]


def _reflection(new: int, old: int) -> Tensor:
    period = max(2 * (old - 1), 1)
    index = torch.arange(new) % period
    return torch.minimum(index, period - index) if old > 1 else torch.zeros_like(index)


def default_overlap(config: SDANConfig, input_tile_px: int) -> int:
    """The overlap of the first pass's tiles, pixels of x."""
    return max(3 * input_tile_px // 16, _least_overlap(config))


def _least_overlap(config: SDANConfig) -> int:
    """With less, the zero padding outside a tile shows in the offsets along its borders."""
    return 8 // config.mosaic_factor


def _check(config: SDANConfig, x: Tensor, rendering: Tensor, input_tile_px: int, overlap_px: int | None) -> int:
    """The overlap to use, pixels of x; raises ValueError for sizes that do not match."""
    channels, factor = CHANNELS[config.input], config.mosaic_factor
    if x.dim() != 3 or x.shape[0] != channels or 0 in x.shape:
        raise ValueError(f"x: expected one photo [{channels},H,W] for input={config.input!r}, got {tuple(x.shape)}")
    expected = (3, x.shape[1] * factor, x.shape[2] * factor)
    if tuple(rendering.shape) != expected:
        raise ValueError(f"rendering: expected {expected}, got {tuple(rendering.shape)}")
    if config.input == "mosaic" and (x.shape[1] % 2 or x.shape[2] % 2):
        raise ValueError(f"x: expected even height and width, for whole RGGB cells, got {tuple(x.shape[1:])}")
    config.check_crop(input_tile_px)
    minimum = _least_overlap(config)
    overlap = default_overlap(config, input_tile_px) if overlap_px is None else overlap_px
    if not minimum <= overlap <= input_tile_px // 2:
        raise ValueError(
            f"overlap_px: expected {minimum} to {input_tile_px // 2}, half of input_tile_px={input_tile_px}, "
            f"got {overlap}"
        )
    return overlap
