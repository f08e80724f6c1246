"""Joins the two contracts: reads shard rows (preprocessing.schema) and returns tensors for SDAN.forward.

Training crops are numbered from 0; a run uses the first epochs * crops_per_epoch, rounded up to full steps. The
content of crop number i (its pair, tile, window and flips) depends only on i and the fields of CropStream (the run's
shards, seed and crop size), never on the number of workers or on restarts. A resumed run therefore sees the same
crops as an uninterrupted one. Ray tasks read, decode and cut crops ahead of the training step.

Axes: B batch, C channels, H W rows and columns. Sizes in packed RAW pixels end in `_px`, as in TrainConfig.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice, repeat
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from pyarrow import fs
from ray.exceptions import RayTaskError
from torch import Tensor

from pipelines.config import ExperimentConfig
from preprocessing import schema
from preprocessing.colour import divide_exposure
from preprocessing.photometry.look import COLUMNS as LOOK_COLUMNS
from preprocessing.photometry.look import Look
from preprocessing.photometry.reduction import reduced
from preprocessing.shard_folder.set_aside import why_no_shards
from preprocessing.storage import one_line, open_folder
from sdan import augment, raw_input
from sdan.network import SDANConfig
from sdan.offsets.known_shift import CONTROL_POINTS, random_motion
from sdan.resample import low_pass

PICTURES = ("lr_rgb", "hr_rgb")
IMAGES = ("lr_render", *PICTURES)
LOOK = (*LOOK_COLUMNS, "lr_source", "hr_source")
"""The columns that `in_rendering_look` reads."""
LEVELS = ("black_level", "wb", "white_level")
MOST_NEW = 10
"""How much more often a fine-tuning may draw a new pair than an old one."""
_REPLAY_STEPS = 1000
"""Shares of replay are rounded to thousandths, so that the schedule is exact."""
TASK_CROPS = 32
"""Approximate crops per reader task; for a small network, starting a task costs as much as reading a batch."""


class ShardsError(ValueError):
    """Shards that cannot be used for this training or evaluation; the message says what to do."""


@dataclass(frozen=True)
class ShardIndex:
    """The pairs of one split: one Parquet file per pair, one row group per tile.

    The driver lists SHARDS once per run and hands this index to every worker and every restart. Pairs that
    preprocessing adds meanwhile belong to the next run.
    """

    shards: str
    split: str
    paths: tuple[str, ...]
    tiles: tuple[int, ...]
    """Number of tiles in each file of `paths`."""
    info: schema.ShardInfo
    new: tuple[int, ...] = ()
    """Places in `paths` of the pairs that the model a fine-tuning starts from has not been trained on; () in any other
    training."""

    @property
    def num_tiles(self) -> int:
        return sum(self.tiles)

    @property
    def digest(self) -> str:
        """16 hex digits over the file names, which contain the fingerprints of the pairs' inputs."""
        names = "\n".join(pair_names(self))
        return hashlib.sha256(names.encode()).hexdigest()[:16]


def index_split(shards: str, split: str) -> ShardIndex:
    """List one split's pairs and count their tiles, from the files' footers.

    Raises:
        ShardsError: no readable shards, or none in this split.
    """
    try:
        info = schema.read_info(shards)
        paths = sorted(schema.list_shards(shards, split))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(shards, error) from error
    if not paths:
        remedy = (
            "name sequences for it with `sdan preprocess ... --val SEQ,SEQ`"
            if split == "val"
            else "preprocess more sequences"
        )
        set_aside = why_no_shards(open_folder(shards))
        got = f"none: {set_aside}" if set_aside else "none"
        raise ShardsError(f"SHARDS, {shards}: expected at least one pair in split={split}, got {got}; {remedy}")
    with ThreadPoolExecutor(16) as pool:
        tiles = tuple(pool.map(lambda path: _count_tiles(shards, path), paths))
    return ShardIndex(shards, split, tuple(paths), tiles, info)


def pair_names(index: ShardIndex) -> list[str]:
    """The file names of the pairs, which contain the fingerprints of their inputs."""
    return [path.rsplit("/", 1)[-1] for path in index.paths]


def with_new(index: ShardIndex, seen: Collection[str]) -> ShardIndex:
    """The index with `new`: its pairs whose names (`pair_names`) are not among `seen`."""
    known = set(seen)
    return replace(index, new=tuple(place for place, name in enumerate(pair_names(index)) if name not in known))


def replayed(index: ShardIndex, share: float) -> float:
    """The share of a fine-tuning's crops that comes from old pairs, those that are not `new`.

    It is `share` (train.replay_share), or more where few pairs are new: a new pair is drawn at most MOST_NEW times as
    often as an old one, so that a handful of pairs is not learnt by heart.
    """
    new = len(index.new)
    old = len(index.paths) - new
    return max(share, old / (old + MOST_NEW * new)) if old else 0.0


def of_pair(index: ShardIndex, pair: str) -> ShardIndex:
    """The part of the index with one pair of frames, e.g. "00006-00002", SR-RAW's published test pairs.

    Raises:
        ShardsError: no sequence has that pair.
    """
    kept = [number for number, path in enumerate(index.paths) if path.rpartition("_")[0].endswith(f"_{pair}")]
    if not kept:
        known = sorted({path.rpartition("_")[0].rpartition("_")[2] for path in index.paths})
        raise ShardsError(f"--pair, {index.shards}: expected one of {', '.join(known[:20])}, got {pair!r}")
    return replace(
        index,
        paths=tuple(index.paths[number] for number in kept),
        tiles=tuple(index.tiles[number] for number in kept),
    )


def _unreadable(shards: str, error: Exception) -> ShardsError:
    return ShardsError(
        f"SHARDS, {shards}: expected a folder or s3:// URI of readable shards, got {one_line(error)}; check the path"
    )


def _count_tiles(shards: str, path: str) -> int:
    try:
        return int(_open(shards, path).num_row_groups)
    except (pa.ArrowException, OSError) as error:
        raise ShardsError(
            f"{path}: expected a complete shard, got {one_line(error)}; remove it and preprocess again"
        ) from error


@lru_cache(maxsize=256)
def _open(shards: str, path: str) -> pq.ParquetFile:
    if "://" in shards:
        filesystem, _ = fs.FileSystem.from_uri(shards)
        return pq.ParquetFile(filesystem.open_input_file(path))
    return pq.ParquetFile(path, memory_map=True)


def alignment_shares(index: ShardIndex, most_pairs: int = 256) -> dict[str, float]:
    """aligned_by -> share of the tiles, of all pairs or of `most_pairs` spread over the index.

    Raises:
        ShardsError: shards that cannot be read.
    """
    pairs = np.unique(np.linspace(0, len(index.paths) - 1, most_pairs).round().astype(int)).tolist()
    try:
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda pair: read_tile(index, pair, 0, ("aligned_by",))["aligned_by"], pairs))
    except OSError as error:
        raise _unreadable(index.shards, error) from error
    tiles: Counter[str] = Counter()
    for pair, aligned_by in zip(pairs, found, strict=True):
        tiles[aligned_by] += index.tiles[pair]
    return {aligned_by: count / tiles.total() for aligned_by, count in tiles.items()}


def require_unchanged(index: ShardIndex) -> None:
    """Check that the index's files still exist with the same number of tiles; files added since are ignored.

    Raises:
        ShardsError: a file is missing, damaged or has another number of tiles.
    """
    try:
        listed = set(schema.list_shards(index.shards, index.split))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(index.shards, error) from error
    for path in index.paths:
        if path not in listed:
            raise _changed(path, "none")
    with ThreadPoolExecutor(16) as pool:
        counts = pool.map(lambda path: _count_tiles(index.shards, path), index.paths)
        for path, expected, count in zip(index.paths, index.tiles, counts, strict=True):
            if count != expected:
                raise _changed(path, f"{count} tiles instead of {expected}")


def _changed(path: str, got: str) -> ShardsError:
    return ShardsError(
        f"{path}: expected the shard that this run started with, got {got}; put it back, or start a new run"
    )


def read_tile(index: ShardIndex, pair: int, tile: int, columns: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Read one row and decode it to arrays (schema.decode).

    Raises:
        ShardsError: the file is missing, damaged, or no longer the one that was indexed.
        OSError: a network or disk error. Ray Train then restarts from the last checkpoint.
    """
    path = index.paths[pair]
    try:
        file = _open(index.shards, path)
        if file.num_row_groups != index.tiles[pair]:
            raise _changed(path, f"{file.num_row_groups} tiles instead of {index.tiles[pair]}")
        # Reader tasks share cores with the training step, so they use no threads.
        table = file.read_row_group(tile, columns=list(columns) if columns else None, use_threads=False)
    except FileNotFoundError as error:
        raise _changed(path, "none") from error
    except pa.ArrowException as error:
        raise _changed(path, one_line(error)) from error
    try:
        return schema.decode({name: _first(table.column(name)) for name in table.column_names}, index.info)
    except ValueError as error:
        raise ShardsError(
            f"{path}: expected tiles of {index.info.tile_px} packed px at scale {index.info.scale}, as in the first "
            f"shard of {index.shards}, got others ({one_line(error)}); delete it and preprocess again"
        ) from error


def _first(column: pa.ChunkedArray) -> Any:
    """A column's first value; binary values as a view of Arrow's memory, without a copy."""
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
    """Whether crops include the simulator's ideal picture, true_rgb uint8 [3,2cs,2cs]."""
    match_exposure: bool = False
    """Whether to scale the target to the input's exposure; pairs without a measured ratio stay unchanged."""
    look: str = "camera"
    """train.look: "rendering" gives lr_rgb, hr_rgb and true_rgb the tones and colours of lr_render."""
    reduced_share: float = 0.0
    """train.reduced_share, for RGB networks."""
    truth_blur_px: float = 0.0
    """train.truth_blur_px: the blur of true_rgb."""
    raw: bool = True
    """Whether crops include the RAW and its rendering; networks of RGB input need neither."""
    replay_share: float = 0.0
    """train.replay_share, for an index with `new` pairs."""
    max_shift_px: int = 0
    """Above 0, crops include `motion` [2,3,3], a random field for known_shift.moved_reference of up to this many mosaic
    pixels."""

    def crop(self, number: int) -> dict[str, np.ndarray]:
        """Crop `number`: lr_raw [4,c,c] float32 in [0,1], lr_render and lr_rgb uint8 [3,2c,2c], hr_rgb uint8
        [3,2cs,2cs]; without `raw` only the last two.

        Each round of len(pairs) crops visits every pair once, in a new random order.
        """
        random = np.random.default_rng((self.seed, 2, number))
        pair = self.pair(number)
        tile = int(random.integers(self.index.tiles[pair]))
        more = [*(["true_rgb"] if self.truth else []), *(["exposure_ratio"] if self.match_exposure else [])]
        more += LOOK if self.look == "rendering" else ()
        columns = ("lr_raw", *IMAGES, *LEVELS) if self.raw else PICTURES
        row = read_tile(self.index, pair, tile, (*columns, *more))
        if self.truth and row["true_rgb"] is None:
            raise ShardsError(
                f"loss.self_target=truth, {self.index.paths[pair]}: expected a simulated shard with its ideal picture, "
                "got one without; --set loss.self_target=pair"
            )
        if self.match_exposure:
            row["hr_rgb"] = divide_exposure(row["hr_rgb"], row["exposure_ratio"])
        plan = augment.random_plan(random, self.index.info.tile_px, self.crop_px, flips=self.augment)
        crop = cut_crop(row, plan, self.crop_px, self.index.info.scale)
        if self.look == "rendering":
            crop |= in_rendering_look(self.index, pair, row, crop)
        if random.random() < self.reduced_share:
            crop |= self._reduced(crop, random)
        if self.max_shift_px:
            crop["motion"] = self._motion(number)
        return crop | self._soft_truth(crop) if self.truth and self.truth_blur_px else crop

    def _soft_truth(self, crop: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The ideal picture, blurred."""
        planes = [cv2.GaussianBlur(plane, (0, 0), self.truth_blur_px) for plane in crop["true_rgb"]]
        return {"true_rgb": np.stack(planes)}

    def _motion(self, number: int) -> np.ndarray:
        random = np.random.default_rng((self.seed, 3, number))
        uniform = torch.from_numpy(random.random(2, dtype=np.float32))
        normal = torch.from_numpy(random.standard_normal((2, CONTROL_POINTS, CONTROL_POINTS), dtype=np.float32))
        return random_motion(uniform, normal, self.max_shift_px).numpy()

    def _reduced(self, crop: Mapping[str, np.ndarray], random: np.random.Generator) -> dict[str, np.ndarray]:
        """The pictures of a crop whose input is its reduced target: half of the time the long-focal JPG, half of the
        time the ideal picture, if the crop has one.
        """
        own = "true_rgb" if self.truth and random.random() < 0.5 else "hr_rgb"
        targets = ("hr_rgb", "true_rgb") if self.truth else ("hr_rgb",)
        return dict.fromkeys(targets, crop[own]) | {"lr_rgb": reduced(crop[own], self.index.info.scale, random)}

    def pair(self, number: int) -> int:
        """The index of the pair that crop `number` is cut from.

        Where the index tells new pairs from old ones, each kind has rounds of its own, and `replayed` of the crops,
        evenly spread, are of old pairs.
        """
        new = self.index.new
        if not 0 < len(new) < len(self.index.paths):
            return self._visit(1, number, len(self.index.paths))
        old = self._old
        part = round(replayed(self.index, self.replay_share) * _REPLAY_STEPS)
        before = number * part // _REPLAY_STEPS  # crops of old pairs before this one
        if (number + 1) * part // _REPLAY_STEPS > before:
            return old[self._visit(4, before, len(old))]
        return new[self._visit(1, number - before, len(new))]

    @cached_property
    def _old(self) -> list[int]:
        return sorted(set(range(len(self.index.paths))) - set(self.index.new))

    def _visit(self, kind: int, number: int, pairs: int) -> int:
        """Place `number` of endless rounds, each of which visits every one of `pairs` once, in a new random order."""
        order = np.random.default_rng((self.seed, kind, number // pairs)).permutation(pairs)
        return int(order[number % pairs])


def training_stream(index: ShardIndex, config: ExperimentConfig) -> CropStream:
    """The crops that `config` trains on."""
    train, loss = config.train, config.loss
    return CropStream(
        index,
        train.seed,
        train.crop_px,
        train.augment,
        truth=loss.self_target == "truth" and loss.self_reference_weight > 0,
        match_exposure=train.match_exposure,
        look=train.look,
        reduced_share=train.reduced_share,
        truth_blur_px=train.truth_blur_px,
        raw=not config.model.is_rgb,
        replay_share=train.replay_share,
        max_shift_px=config.model.max_shift_px if loss.known_shift_weight > 0 else 0,
    )


def in_rendering_look(
    index: ShardIndex, pair: int, row: Mapping[str, Any], pictures: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The camera's pictures among `pictures` with the tones and colours of the rendering (train.look=rendering).

    Args:
        row: the tile's row with the columns LOOK.
        pictures: the row itself, or a crop of it: lr_rgb, hr_rgb and true_rgb, uint8 [3, H, W] or None; others are
            left out.

    Raises:
        ShardsError: the shard was made before its JPG's look was measured.
    """
    if LOOK_COLUMNS[0] not in row:
        raise ShardsError(
            f"train.look=rendering, {index.paths[pair]}: expected a shard with the look of its JPG, got one of "
            "an older version; preprocess again into another folder, or --set train.look=camera"
        )
    look = Look.of_row(row)
    if look is None:
        return {}
    sources = {"lr_rgb": row["lr_source"], "hr_rgb": row["hr_source"], "true_rgb": "camera"}
    shot = {name: pictures.get(name) for name, source in sources.items() if source == "camera"}
    curve = index.info.rendering_curve
    return {name: look.remove(picture, curve) for name, picture in shot.items() if picture is not None}


def cut_crop(row: dict[str, Any], plan: augment.CropPlan, crop_px: int, scale: int) -> dict[str, np.ndarray]:
    """Cut one window from a decoded row and normalise its RAW, if it has one; truth columns are cut the same way."""
    names = ("lr_raw", *IMAGES, "true_rgb", "true_flow", "true_near")
    sample = {name: torch.from_numpy(row[name].copy()) for name in names if row.get(name) is not None}
    if "lr_raw" in sample:
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
    """This worker's batches of crops from `first_crop` on, read ahead by Ray tasks.

    Each step consumes the next world * batch crops of the stream, and each worker takes its own part of them. Training
    can therefore resume with another number of workers without losing or repeating a crop. The last step is a full
    batch, even if it goes past `last_crop`.

    Args:
        readers: number of tasks that read for this worker at the same time; it does not change the order of batches.
    """
    count = batch * num_steps(first_crop, last_crop, batch * world)
    places = np.arange(count)
    numbers = crop_numbers(places, batch=batch, rank=rank, world=world, first_crop=first_crop)
    batches = _read_ahead(ray.put(stream), numbers, batch, readers)
    # A thread fetches the next batch while the step runs; fetching mostly waits and copies without holding the GIL.
    with ThreadPoolExecutor(1) as fetcher:
        waiting = fetcher.submit(next, batches, None)
        while (fetched := waiting.result()) is not None:
            waiting = fetcher.submit(next, batches, None)
            yield fetched


def _read_ahead(stream: ray.ObjectRef, numbers: np.ndarray, batch: int, readers: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches of the crops `numbers`, with `readers` tasks ahead of the one being consumed.

    This is not a Ray Data job. In this process its executor would be a thread, which in Ray 2.60 spins while holding
    the GIL whenever readers are faster than the training step: the steps of small networks took three times as long.
    As a dataset of Ray Train it has a process of its own, but Ray does not document which worker gets which crops
    (docs/training.md, "Speed").
    """
    # DEFAULT: schedule outside the placement group that is reserved for the train workers.
    read = _read.options(num_cpus=0, scheduling_strategy="DEFAULT")
    each = batch * max(1, TASK_CROPS // batch)
    starts = iter(range(0, len(numbers), each))
    tasks = deque(read.remote(stream, numbers[first : first + each]) for first in islice(starts, readers + 1))
    while tasks:
        crops = _crops_of(tasks.popleft())
        tasks.extend(read.remote(stream, numbers[first : first + each]) for first in islice(starts, 1))
        for first in range(0, len(crops["hr_rgb"]), batch):
            # Copy, because Ray's memory is read-only and should be released as soon as possible.
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
        raise error.cause from None  # the ShardsError itself, without Ray's wrapper
    return crops


def _tensor(values: np.ndarray) -> Tensor:
    copied = torch.from_numpy(values.copy())
    return copied.pin_memory() if torch.cuda.is_available() else copied


def num_steps(first_crop: int, last_crop: int, crops_per_step: int) -> int:
    """Number of steps needed to consume all crops from `first_crop` up to `last_crop`."""
    return -(-(last_crop - first_crop) // crops_per_step)


def crop_numbers(places: np.ndarray, *, batch: int, rank: int, world: int, first_crop: int) -> np.ndarray:
    """The stream numbers of this worker's crops. `places` numbers them from 0, starting at `first_crop`."""
    step, place = np.divmod(places, batch)
    return np.asarray(first_crop + step * (world * batch) + rank * batch + place)


class Inputs(NamedTuple):
    """One batch for SDAN.forward and the losses, float32 in [0, 1]; s is the scale, (H, W) the mosaic's size."""

    x: Tensor
    """RAW [B,1,H,W] (mosaic), [B,4,H/2,W/2] (packed), or the camera JPG [B,3,H,W] (rgb),
    [B,12,H/2,W/2] (packed_rgb)."""
    rendering: Tensor
    """[B,3,H,W]: LibRaw's rendering; the camera JPG for RGB input."""
    self_reference: Tensor
    """The rendering at x's size: the reference of the self protocol."""
    oracle_reference: Tensor
    """Y': the target low-passed to x's size: the reference of the oracle protocol."""
    camera: Tensor
    """[B,3,H,W]: the camera JPG of the input's own frame."""
    target: Tensor
    """[B,3,sH,sW]: the long-focal JPG."""
    truth: Tensor | None
    """[B,3,sH,sW]: the ideal picture in the input's own view and tone; None for real data."""
    motion: Tensor | None = None
    """[B,2,3,3]: a random field, mosaic pixels, for loss.known_shift_weight; else None."""

    def parts(self, count: int) -> list[Inputs]:
        """The batch split into `count` parts of equal size."""
        chunks = (repeat(None, count) if tensor is None else tensor.chunk(count) for tensor in self)
        return [Inputs(*part) for part in zip(*chunks, strict=True)]


def model_inputs(batch: dict[str, Tensor], config: SDANConfig, device: torch.device) -> Inputs:
    """Convert stacked crops of `CropStream.crop` to the network's inputs on `device`."""
    names = [*(PICTURES if config.is_rgb else IMAGES), *(["true_rgb"] if "true_rgb" in batch else [])]
    images = {name: batch[name].to(device, non_blocking=True).float() / 255 for name in names}
    if config.is_rgb:
        rendering = images["lr_rgb"]
        x = raw_input.rgb_to_packed(rendering) if config.is_packed else rendering
    else:
        raw = batch["lr_raw"].to(device, non_blocking=True)
        x = raw if config.input == "packed" else raw_input.packed_to_mosaic(raw)
        rendering = images["lr_render"]
    shrink = config.mosaic_factor
    return Inputs(
        x=x,
        rendering=rendering,
        self_reference=low_pass(rendering, shrink),
        oracle_reference=low_pass(images["hr_rgb"], shrink * config.scale),
        camera=images["lr_rgb"],
        target=images["hr_rgb"],
        truth=images.get("true_rgb"),
        motion=batch["motion"].to(device, non_blocking=True) if "motion" in batch else None,
    )


def with_curve_of(index: ShardIndex, config: ExperimentConfig) -> ExperimentConfig:
    """The config for a network that is trained from scratch on these shards: it takes the curve of their renderings."""
    return replace(config, model=replace(config.model, rendering_curve=index.info.rendering_curve))


def check_fit(index: ShardIndex, config: ExperimentConfig) -> None:
    """Check that the shards' scale, tile size, input and rendering curve suit the config.

    Raises:
        ShardsError: they do not suit it; the message names both values.
    """
    if index.info.scale != config.model.scale:
        raise ShardsError(
            f"model.scale, {index.shards}: expected scale {config.model.scale}, got shards of scale "
            f"{index.info.scale}; --set model.scale={index.info.scale}, or preprocess with --scale {config.model.scale}"
        )
    if index.info.tile_px < config.train.crop_px:
        raise ShardsError(
            f"train.crop_px, {index.shards}: expected tiles of at least {config.train.crop_px} packed pixels, got "
            f"{index.info.tile_px}; --set train.crop_px={index.info.tile_px // 8 * 8}, or preprocess with "
            "a larger --tile"
        )
    if not (index.info.has_raw or config.model.is_rgb):
        raise ShardsError(
            f"model.input, {index.shards}: expected pairs with RAW for input={config.model.input}, got pairs of "
            "pictures alone; train a model of RGB input: --set model.input=rgb, or --config paper_4x_rgb"
        )
    curve, theirs = config.model.rendering_curve, index.info.rendering_curve
    if curve != theirs and not config.model.is_rgb:
        raise ShardsError(
            f"model.rendering_curve, {index.shards}: expected renderings with the model's curve {curve}, got {theirs}; "
            f"preprocess into another folder with --curve {curve}, or train a new model"
        )
