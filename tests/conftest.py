"""Fixtures of several packages: tiny shards of a smooth random scene, perfectly aligned; random weights of VGG-19 and
ST-LPIPS."""

import os
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

# Two libraries that each use every core slow each other down more than tenfold on tensors this small.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocessing import schema

_WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if _WORKER:  # two workers that start Ray must not find each other's instance
    _RAY = Path(tempfile.gettempdir()) / f"ray-{os.getuid()}-{_WORKER}"
    _RAY.mkdir(exist_ok=True)
    # The address of a Ray that was killed in an earlier run; ray.init would wait minutes for it.
    (_RAY / "ray" / "ray_current_cluster").unlink(missing_ok=True)
    os.environ["RAY_TMPDIR"] = str(_RAY)

LONGEST = (
    *("test_training_faults.py", "test_end_to_end.py", "test_sweep.py", "test_kills.py", "test_interrupts.py"),
    *("test_s3_faults.py", "test_raw_to_jpg.py", "test_eight_times.py", "test_ui.py", "test_tune.py"),
    *("test_run_folder.py", "test_demo.py", "test_starter.py", "test_compare_in_ray.py", "test_sequences.py"),
)
"""The files that take longest, fast and slow tests together, longest first."""
TILE_PX, SCALE = 24, 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest files: one process runs all tests of a file, and the last file should be a short one."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def scene(seed: int, side: int) -> np.ndarray:
    """uint8 [side, side, 3] with detail at every scale."""
    random = np.random.default_rng(seed)
    picture = np.zeros((side, side, 3), np.float32)
    for cells in (3, 8, 20, 50):
        layer = random.normal(size=(cells, cells, 3)).astype(np.float32)
        picture += cv2.resize(layer, (side, side), interpolation=cv2.INTER_CUBIC) / np.sqrt(cells)
    picture -= picture.min()
    return (40 + 180 * picture / picture.max()).astype(np.uint8)


def tile_row(sequence: str, number: int, tile_px: int = TILE_PX) -> dict:
    """One row of the schema, made from `scene`."""
    high = scene(hash((int(sequence), number)) % 2**31, 2 * tile_px * SCALE)
    low = cv2.resize(high, (2 * tile_px, 2 * tile_px), interpolation=cv2.INTER_AREA)
    linear = (low.astype(np.float32) / 255) ** 2.2 * 15000 + 512
    near = np.zeros((2, tile_px, tile_px), np.uint8)
    near[:, :, : tile_px // 2] = number % 2  # the near plane hides half of every other tile
    planes = (linear[::2, ::2, 0], linear[::2, 1::2, 1], linear[1::2, ::2, 1], linear[1::2, 1::2, 2])
    chw = {name: np.ascontiguousarray(image.transpose(2, 0, 1)) for name, image in (("low", low), ("high", high))}
    return dict.fromkeys(schema.COLUMNS) | {
        "sequence": sequence,
        "pair": "00005-00001",
        "lr_raw": np.stack(planes).astype(np.uint16),
        "lr_render": chw["low"],
        "lr_rgb": chw["low"],
        "hr_rgb": chw["high"],
        "true_rgb": chw["high"],
        "true_flow": np.zeros((2, tile_px, tile_px), np.float16),
        "true_near": near,
        "black_level": [512.0] * 4,
        "wb": [1.0] * 4,
        "wb_source": "camera",
        "matrix_source": "file",
        "white_level": 16383.0,
        "lr_source": "camera",
        "hr_source": "camera",
        "focal_lr_mm": 50.0,
        "focal_hr_mm": 240.0,
        "scale": SCALE,
        "camera": "test",
        "row": 0,
        "col": number * tile_px,
        "origin_row": 0,
        "origin_col": 0,
        "lr_to_hr": [4.0, 0.0, 0.0, 0.0, 4.0, 0.0],
        "lr_to_hr_lens": [4.0, 0.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
        "aligned_by": "scale",
    }


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory):
    """Four train pairs, one val pair, two tiles of 24 packed pixels each, 4x."""
    folder = tmp_path_factory.mktemp("shards")
    info = schema.ShardInfo(tile_px=TILE_PX, scale=SCALE, options={"curve": "srgb"})
    for split, sequences in (("train", ("00001", "00002", "00003", "00004")), ("val", ("00005",))):
        target = folder / f"split={split}"
        target.mkdir()
        for sequence in sequences:
            table = schema.encode([tile_row(sequence, number) for number in range(2)], info)
            pq.write_table(table, target / f"{sequence}_00005-00001_0123456789abcdef.parquet", row_group_size=1)
    return folder


@pytest.fixture(scope="session")
def shards_without_truth(tiny_shards, tmp_path_factory):
    """The tiny shards as if from real photographs, without the simulator's ideal picture and true offsets."""
    folder = tmp_path_factory.mktemp("real")
    for source in Path(tiny_shards).rglob("*.parquet"):
        table = pq.read_table(source)
        for name in ("true_rgb", "true_flow", "true_near"):
            place = table.schema.get_field_index(name)
            field = table.schema.field(place)
            table = table.set_column(place, field, pa.nulls(len(table), field.type))
        target = folder / source.relative_to(tiny_shards)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, target, row_group_size=1)
    return str(folder)


@pytest.fixture(autouse=True)
def _own_data_folder(monkeypatch):
    """The command line, called in this process, names its --data in the environment: no other test must see it."""
    monkeypatch.setenv("SDAN_DATA", "")
    monkeypatch.delenv("SDAN_DATA")


@pytest.fixture(scope="module", autouse=True)
def _shut_down_ray():
    """Shut down Ray after each module that started it in this process, so that the next module can start it."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and hasattr(ray, "is_initialized") and ray.is_initialized():
        ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def _copied_databases(tmp_path_factory):
    """MLflow makes the first new database of this process by its migrations, which take seconds; later ones are copies.

    Commands that tests start as processes of their own make theirs as users do.
    """
    if not {"mlflow", "pipelines.registry"} & sys.modules.keys():  # neither was imported by a test file
        yield
        return
    from mlflow.store.db import utils

    migrate, first = utils._initialize_tables, tmp_path_factory.mktemp("mlflow") / "first.db"

    def initialize(engine):
        if engine.url.get_backend_name() != "sqlite" or not utils._is_empty_database(engine):
            migrate(engine)
            return
        if not first.exists():
            migrate(utils.create_sqlalchemy_engine_with_retry(f"sqlite:///{first}"))
        with closing(sqlite3.connect(first)) as source, closing(engine.raw_connection()) as target:
            source.backup(target.driver_connection)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", initialize)
        yield


@pytest.fixture(scope="session")
def vgg_weights():
    """Random weights with VGG-19's shapes, seeded, and scaled so that activations keep their size; for tests only."""
    import torch

    from sdan.perceptual.vgg19 import STAGES

    generator = torch.Generator().manual_seed(19)
    weights, place, channels = {}, 0, 3
    for widths in STAGES:
        for width in widths:
            values = torch.randn(width, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
            weights[f"features.{place}.weight"] = values
            weights[f"features.{place}.bias"] = 0.1 * torch.randn(width, generator=generator)
            place, channels = place + 2, width
        place += 1  # the pool
    return weights


@pytest.fixture(scope="session")
def st_lpips_weights():
    """Random weights with ST-LPIPS' names and shapes, seeded, without negative heads; for tests only."""
    import torch

    from sdan.perceptual.st_lpips import LAYERS

    generator = torch.Generator().manual_seed(20)
    weights = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.full((1, 3, 1, 1), 0.5)}
    for number, (name, (channels, features, kernel, _)) in enumerate(LAYERS.items()):
        values = torch.randn(features, channels, kernel, kernel, generator=generator)
        weights[f"{name}.weight"] = values * (2 / (kernel**2 * channels)) ** 0.5
        weights[f"{name}.bias"] = 0.1 * torch.randn(features, generator=generator)
        weights[f"lin{number}.model.1.weight"] = torch.rand(1, features, 1, 1, generator=generator)
    return weights
