"""The join of the two contracts: shard rows (preprocessing.schema) in, tensors for SDAN.forward out.

Training crops are numbered from 0 to epochs * crops_per_epoch. What crop number i shows - which pair, tile, window and
flips - depends on (seed, i) alone, never on the number of workers or on restarts: so a resumed run sees the crops
that an unbroken one would have seen. Ray tasks read, decode and cut them ahead of the training step.

Axes: B batch, C channels, H W rows and columns. Sizes in packed RAW pixels end in `_px` as in TrainConfig.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, repeat
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from pyarrow import fs
from ray.exceptions import RayTaskError
from torch import Tensor

from pipelines.config import RunConfig
from preprocessing import schema
from preprocessing.registration.aligned_target import align_to
from preprocessing.storage import one_line
from sdan import augment, raw_input
from sdan.losses import low_pass
from sdan.network import SDANConfig

IMAGES = ("lr_render", "lr_rgb", "hr_rgb")
LEVELS = ("black_level", "wb", "white_level")
TASK_CROPS = 32
"""Crops that one task reads, about: with a small network, starting a task costs as much as reading a step's crops."""


class ShardsError(ValueError):
    """The shards cannot feed this run; the message says what to do."""


@dataclass(frozen=True)
class ShardIndex:
    """Where the tiles of one split are: one Parquet file per pair, one row group per tile."""

    shards: str
    split: str
    paths: tuple[str, ...]
    tiles: tuple[int, ...]
    """Tiles in each file."""
    info: schema.ShardInfo

    @property
    def num_tiles(self) -> int:
        return sum(self.tiles)

    @property
    def digest(self) -> str:
        """Of the files' names, which hold the fingerprints of what they were made from."""
        names = "\n".join(path.rsplit("/", 1)[-1] for path in self.paths)
        return hashlib.sha256(names.encode()).hexdigest()[:16]


def index_split(shards: str, split: str) -> ShardIndex:
    """List one split's pairs and count their tiles (file footers only).

    Raises:
        ShardsError: the split is empty.
    """
    try:
        info = schema.read_info(shards)
        paths = sorted(schema.list_shards(shards, split))
    except (pa.ArrowException, OSError) as error:
        raise ShardsError(
            f"{shards}: a folder or s3:// URI of readable shards expected, got: {one_line(error)}"
        ) from error
    if not paths:
        remedy = (
            "name sequences for it with `sdan preprocess ... --val SEQ,SEQ`"
            if split == "val"
            else "preprocess more sequences"
        )
        raise ShardsError(f"{shards}: at least one pair expected in split={split}, got none; {remedy}")
    with ThreadPoolExecutor(16) as pool:
        tiles = tuple(pool.map(lambda path: _count_tiles(shards, path), paths))
    return ShardIndex(shards, split, tuple(paths), tiles, info)


def _count_tiles(shards: str, path: str) -> int:
    try:
        return int(_open(shards, path).num_row_groups)
    except (pa.ArrowException, OSError) as error:
        raise ShardsError(
            f"{path}: a whole shard expected, got: {one_line(error)}; remove it, preprocess again"
        ) from error


@lru_cache(maxsize=256)
def _open(shards: str, path: str) -> pq.ParquetFile:
    if "://" in shards:
        filesystem, _ = fs.FileSystem.from_uri(shards)
        return pq.ParquetFile(filesystem.open_input_file(path))
    return pq.ParquetFile(path, memory_map=True)


def read_tile(index: ShardIndex, pair: int, tile: int, columns: tuple[str, ...] | None = None) -> dict[str, Any]:
    """One row, decoded to arrays (schema.decode)."""
    file = _open(index.shards, index.paths[pair])
    # Readers are many and share cores with the training step: threads of their own would only get in its way.
    table = file.read_row_group(tile, columns=list(columns) if columns else None, use_threads=False)
    return schema.decode({name: _first(table.column(name)) for name in table.column_names}, index.info)


def _first(column: pa.ChunkedArray) -> Any:
    """A column's first value; pictures as Arrow's own memory, not as copies of it."""
    value = column[0]
    return memoryview(value.as_buffer()) if pa.types.is_binary(value.type) and value.is_valid else value.as_py()


@dataclass(frozen=True)
class CropStream:
    """The endless, numbered stream of training crops."""

    index: ShardIndex
    seed: int
    crop_px: int
    augment: bool
    truth: bool = False
    """Whether crops bring the simulator's ideal picture, true_rgb uint8 [3,2cs,2cs]."""
    match_exposure: bool = False
    """Whether the target is brought to the input's exposure, where preprocessing could measure the ratio."""

    def crop(self, number: int) -> dict[str, np.ndarray]:
        """Crop `number`: raw [4,c,c] float32 in [0,1], lr_render and lr_rgb uint8 [3,2c,2c], hr_rgb uint8 [3,2cs,2cs].

        Each round of len(pairs) crops visits every pair once, in an order of its own.
        """
        random = np.random.default_rng((self.seed, 2, number))
        pair = self.pair(number)
        tile = int(random.integers(self.index.tiles[pair]))
        more = [*(["true_rgb"] if self.truth else []), *(["exposure_ratio"] if self.match_exposure else [])]
        row = read_tile(self.index, pair, tile, ("lr_raw", *IMAGES, *LEVELS, *more))
        if self.truth and row["true_rgb"] is None:
            raise ShardsError(
                f"{self.index.paths[pair]}: loss.self_target=truth expects simulated shards with their ideal picture, "
                "this one has none; --set loss.self_target=pair"
            )
        if self.match_exposure:
            row["hr_rgb"] = expose(row["hr_rgb"], row["exposure_ratio"])
        plan = augment.random_plan(random, self.index.info.tile_px, self.crop_px, flips=self.augment)
        return cut(row, plan, self.crop_px, self.index.info.scale)

    def pair(self, number: int) -> int:
        """The pair that crop `number` is cut from."""
        pairs = len(self.index.paths)
        order = np.random.default_rng((self.seed, 1, number // pairs)).permutation(pairs)
        return int(order[number % pairs])


def expose(image: np.ndarray, ratio: float | None) -> np.ndarray:
    """uint8 sRGB that took `ratio` times the light, as if it had taken 1 times; as it is where that is not known.

    The gain acts on sRGB-decoded values: exact for renderings; cameras' own curves differ from sRGB's, which matters
    little for the small ratios between frames of one sequence.
    """
    if ratio is None or not ratio > 0:
        return image
    stored = np.arange(256) / 255
    light = np.where(stored <= 0.04045, stored / 12.92, ((stored + 0.055) / 1.055) ** 2.4) / ratio
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    table: np.ndarray = (255 * encoded).round().clip(0, 255).astype(np.uint8)
    return table[image]


def cut(row: dict[str, Any], plan: augment.CropPlan, crop_px: int, scale: int) -> dict[str, np.ndarray]:
    """Cut one window out of a decoded row and normalise its RAW; truth columns are cut too where the row has them."""
    names = ("lr_raw", *IMAGES, "true_rgb", "true_flow")
    sample = {name: torch.from_numpy(row[name].copy()) for name in names if row.get(name) is not None}
    sample["lr_raw"] = raw_input.normalise(
        sample["lr_raw"][None].float(),
        torch.as_tensor(row["black_level"])[None],
        torch.as_tensor(row["white_level"]).reshape(1),
        torch.as_tensor(row["wb"])[None],
    )[0]
    cropped = augment.apply(sample, plan, crop_px, scale)
    return {name: np.ascontiguousarray(value.numpy()) for name, value in cropped.items()}


def training_batches(
    stream: CropStream, *, batch: int, rank: int, world: int, first_crop: int, last_crop: int, readers: int = 1
) -> Iterator[dict[str, Tensor]]:
    """This worker's batches of the crops `first_crop` up to (about) `last_crop`, read ahead by Ray tasks.

    Each step takes the next world * batch crops of the stream, each worker its own part of them: other workers can go
    on where these stopped, and no crop is lost or seen twice. The last step is whole, past `last_crop` if need be.

    Args:
        readers: so many tasks read for this worker while it trains; the order of the batches does not depend on it.
    """
    count = batch * num_steps(first_crop, last_crop, batch * world)
    places = np.arange(count)
    numbers = crop_numbers(places, batch=batch, rank=rank, world=world, first_crop=first_crop)
    batches = _read_ahead(ray.put(stream), numbers, batch, readers)
    # The next batch is fetched while the step runs: a thread, since what takes time there holds no lock of Python's.
    with ThreadPoolExecutor(1) as fetcher:
        waiting = fetcher.submit(next, batches, None)
        while (fetched := waiting.result()) is not None:
            waiting = fetcher.submit(next, batches, None)
            yield fetched


def _read_ahead(stream: ray.ObjectRef, numbers: np.ndarray, batch: int, readers: int) -> Iterator[dict[str, Tensor]]:
    """Batches of the crops `numbers`; tasks that read some batches each, `readers` of them ahead of the one in use.

    Not a Ray Data job: its executor would be a thread of this process, and that goes round in circles, holding Python's
    lock, as long as readers are faster than the training step (2.60): small networks took three times as long a step.
    """
    # DEFAULT: not within the resources that were set aside for the train workers alone.
    read = _read.options(num_cpus=0, scheduling_strategy="DEFAULT")
    each = batch * max(1, TASK_CROPS // batch)
    starts = iter(range(0, len(numbers), each))
    tasks = deque(read.remote(stream, numbers[first : first + each]) for first in islice(starts, readers + 1))
    while tasks:
        crops = _crops_of(tasks.popleft())
        tasks.extend(read.remote(stream, numbers[first : first + each]) for first in islice(starts, 1))
        for first in range(0, len(crops["hr_rgb"]), batch):
            # Copies: Ray's memory is read-only, and is free again as soon as possible.
            yield {name: _tensor(values[first : first + batch]) for name, values in crops.items()}


@ray.remote
def _read(stream: CropStream, numbers: np.ndarray) -> dict[str, np.ndarray]:
    torch.set_num_threads(1)
    samples = [stream.crop(int(number)) for number in numbers]
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def _crops_of(task: ray.ObjectRef) -> dict[str, np.ndarray]:
    try:
        crops: dict[str, np.ndarray] = ray.get(task)
    except RayTaskError as error:
        raise error.cause from None  # a ShardsError, not Ray's wrapping of one
    return crops


def _tensor(values: np.ndarray) -> Tensor:
    copied = torch.from_numpy(values.copy())
    return copied.pin_memory() if torch.cuda.is_available() else copied


def num_steps(first_crop: int, last_crop: int, crops_per_step: int) -> int:
    """Steps from `first_crop` until no crop before `last_crop` is left."""
    return -(-(last_crop - first_crop) // crops_per_step)


def crop_numbers(places: np.ndarray, *, batch: int, rank: int, world: int, first_crop: int) -> np.ndarray:
    """The numbers of this worker's crops: `places` counts the crops that it sees itself, from 0 at `first_crop`."""
    step, place = np.divmod(places, batch)
    return np.asarray(first_crop + step * (world * batch) + rank * batch + place)


class Inputs(NamedTuple):
    """One batch as SDAN.forward and the losses take it, float32 in [0, 1]; s is the scale, (H, W) the mosaic's size."""

    x: Tensor
    """RAW [B,1,H,W] (mosaic), [B,4,H/2,W/2] (packed), or the camera JPG [B,3,H,W] (rgb)."""
    rendering: Tensor
    """[B,3,H,W]: LibRaw's rendering, or the camera JPG when that is the input."""
    self_reference: Tensor
    """The rendering at x's size: the reference of the self protocol."""
    oracle_reference: Tensor
    """Y': the target low-passed to x's size: the reference of the oracle protocol."""
    camera: Tensor
    """[B,3,H,W]: the camera JPG of the input's own frame."""
    target: Tensor
    """[B,3,sH,sW]: the long-focal JPG."""
    truth: Tensor | None
    """[B,3,sH,sW]: the ideal picture in the input's own view and tone; where the batch brings it (simulated data)."""

    def parts(self, count: int) -> list[Inputs]:
        """The batch in `count` parts of one size."""
        chunks = (repeat(None, count) if tensor is None else tensor.chunk(count) for tensor in self)
        return [Inputs(*part) for part in zip(*chunks, strict=True)]


def model_inputs(batch: dict[str, Tensor], config: SDANConfig, device: torch.device) -> Inputs:
    """Crops of `CropStream.crop`, stacked, as the network's inputs on `device`."""
    names = [*IMAGES, *(["true_rgb"] if "true_rgb" in batch else [])]
    images = {name: batch[name].to(device, non_blocking=True).float() / 255 for name in names}
    raw = batch["lr_raw"].to(device, non_blocking=True)
    if config.input == "rgb":
        x = rendering = images["lr_rgb"]
    else:
        x = raw if config.input == "packed" else raw_input.packed_to_mosaic(raw)
        rendering = images["lr_render"]
    shrink = 2 if config.input == "packed" else 1
    return Inputs(
        x=x,
        rendering=rendering,
        self_reference=low_pass(rendering, shrink),
        oracle_reference=low_pass(images["hr_rgb"], shrink * config.scale),
        camera=images["lr_rgb"],
        target=images["hr_rgb"],
        truth=images.get("true_rgb"),
    )


@dataclass(frozen=True)
class HeldOut:
    """Fixed crops of a held-out split, stacked: what validation and evaluation look at."""

    batch: dict[str, Tensor]
    names: tuple[str, ...]
    """sequence/pair@row,col of each crop."""
    aligned: Tensor | None
    """[N,3,sH,sW] uint8: the target registered to the bicubically enlarged camera JPG; None unless asked for."""
    aligned_mask: Tensor | None
    """[N,1,sH,sW] bool: True where `aligned` is valid; nowhere if registration failed."""

    def __len__(self) -> int:
        return len(self.names)

    def select(self, numbers: range) -> HeldOut:
        """Some of the crops, e.g. one worker's part."""
        picked = list(numbers)
        rest = {name: value[picked] for name, value in self.batch.items()}
        aligned = None if self.aligned is None else self.aligned[picked]
        mask = None if self.aligned_mask is None else self.aligned_mask[picked]
        return replace(self, batch=rest, names=tuple(self.names[n] for n in picked), aligned=aligned, aligned_mask=mask)


def held_out(shards: str, split: str, config: RunConfig, *, limit: int | None, align: bool) -> HeldOut:
    """The central crop of `limit` tiles, spread evenly over the split's pairs (None: of every tile)."""
    index = index_split(shards, split)
    check_fit(index, config)
    tiles = [(pair, tile) for pair, count in enumerate(index.tiles) for tile in range(count)]
    if limit is not None and limit < len(tiles):
        tiles = [tiles[int(place)] for place in np.linspace(0, len(tiles) - 1, limit).round()]
    margin = 2 * ((index.info.tile_px - config.train.crop_px) // 2)
    plan = augment.CropPlan(row=margin, col=margin, flip_rows=False, flip_cols=False, transpose=False)
    window = slice(margin * config.model.scale, (margin + 2 * config.train.crop_px) * config.model.scale)
    names, samples, aligned = [], [], []
    for pair, tile in tiles:
        row = read_tile(index, pair, tile)
        sample = cut(row, plan, config.train.crop_px, index.info.scale)
        names.append(f"{row['sequence']}/{row['pair']}@{row['row']},{row['col']}")
        samples.append(sample)
        if align:  # over the whole tile, which holds more to register by than the crop
            target, mask = align_to(row["hr_rgb"], row["lr_rgb"], index.info.scale)
            aligned.append((target[:, window, window], mask[window, window]))
    present = [name for name in samples[0] if all(name in sample for sample in samples)]
    return HeldOut(
        batch={name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in present},
        names=tuple(names),
        aligned=torch.from_numpy(np.stack([target for target, _ in aligned])) if align else None,
        aligned_mask=torch.from_numpy(np.stack([mask for _, mask in aligned]))[:, None] if align else None,
    )


def check_fit(index: ShardIndex, config: RunConfig) -> None:
    """The shards' scale and tiles suit the config, or a ShardsError that names both sides."""
    if index.info.scale != config.model.scale:
        raise ShardsError(
            f"{index.shards}: scale {config.model.scale} expected by the model, the shards hold {index.info.scale}; "
            f"--set model.scale={index.info.scale}, or preprocess with --scale {config.model.scale}"
        )
    if index.info.tile_px < config.train.crop_px:
        raise ShardsError(
            f"{index.shards}: tiles of at least train.crop_px = {config.train.crop_px} packed pixels expected, the "
            f"shards hold {index.info.tile_px}; --set train.crop_px={index.info.tile_px // 8 * 8}, or preprocess with "
            "a larger --tile"
        )
