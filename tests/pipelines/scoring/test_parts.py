"""Crops scored part by part: in this process, by Ray's workers, and where which of them is chosen."""

import json
import shutil
from dataclasses import asdict, replace

import pyarrow.parquet as pq
import pytest
import torch

from pipelines import config as configs
from pipelines.cluster import ClusterError
from pipelines.evaluate import evaluate
from pipelines.loader import ShardsError, index_split
from pipelines.scoring import parts
from pipelines.scoring.held_out import chosen_tiles, held_out
from pipelines.zoom_folder.pool import BYTES, Pool
from sdan import checkpoint
from sdan.network import SDAN

COLUMN = {"sequence": "00001"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained checkpoint of config smoke whose offsets and outputs differ from bicubic enlargement."""
    torch.manual_seed(0)
    config = configs.smoke()
    network = SDAN(config.model)
    for weights in network.parameters():
        weights.data += 0.02 * torch.randn(weights.shape)
    return checkpoint.save(tmp_path_factory.mktemp("m") / "model", network, config=configs.to_dict(config), scores={})


def as_text(result):
    """All numbers of an evaluation, NaN included."""
    return json.dumps(asdict(result), indent=1)


def damaged(shards, folder):
    """A copy of the shards with one train pair whose last tile's pixels are damaged, while its footer is whole."""
    copy = shutil.copytree(shards, folder)
    path = sorted((copy / "split=train").glob("*.parquet"))[-1]
    column = pq.ParquetFile(path).metadata.row_group(1).column(2)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 64] = bytes(64)
    path.write_bytes(data)
    return str(copy)


def test_parts_score_as_the_whole_does(tiny_shards, model, monkeypatch):
    """The parts hold whole batches; their pictures are read part by part."""
    index = index_split(str(tiny_shards), "train")
    stored = checkpoint.load(model)
    config = configs.from_dict(stored.config)
    whole = parts.score_crops(stored.model, held_out(index, config, limit=7, align=True), perceptual=False)
    sizes = []
    read = parts.read_crops
    monkeypatch.setattr(parts, "read_crops", lambda *given, **more: sizes.append(len(given[2])) or read(*given, **more))
    monkeypatch.setattr(parts, "PART", parts.BATCH)
    found = parts.score_tiles(stored.model, index, config, chosen_tiles(index, 7), perceptual=False, workers=1)
    assert sizes == [4, 3] and found.columns == list(whole.columns)
    assert as_text(found) == as_text(replace(whole, columns=list(whole.columns)))
    assert len(set(found.sources["self"]["raw_psnr"])) == 7 and len(found.detail["true_rgb"]) == 7


@pytest.mark.slow
def test_any_number_of_ray_workers_gives_the_same_numbers(tiny_shards, model, tmp_path, monkeypatch):
    """One and two workers; all tables, intervals, tiles and pictures. A damaged tile gets the same line."""
    monkeypatch.setattr(parts, "PART", parts.BATCH)
    alone = evaluate(str(tiny_shards), model, split="train", perceptual=False, workers=1, out=tmp_path / "1")
    two = evaluate(str(tiny_shards), model, split="train", perceptual=False, workers=2, out=tmp_path / "2")
    assert as_text(two) == as_text(alone) and alone.crops == 8
    for name in ("table.md", "groups.md", "evaluation.json", "report.html", "examples.png"):
        assert (tmp_path / "2" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
    monkeypatch.setattr(parts, "ray_pays", lambda *_: True)
    monkeypatch.setattr(parts, "plan_scorers", lambda *_: Pool(1, 1.0, 0.0))
    assert as_text(evaluate(str(tiny_shards), model, split="train", perceptual=False)) == as_text(alone)
    bad, said = damaged(tiny_shards, tmp_path / "bad"), []
    for workers in (1, None):
        with pytest.raises(ShardsError) as caught:
            evaluate(bad, model, split="train", perceptual=False, workers=workers)
        said.append(str(caught.value))
    assert said[0] == said[1] and "00004_00005-00001" in said[0]


@pytest.mark.parametrize(
    ("nodes", "asked", "expected"),
    [
        ([{"CPU": 2, "memory": 9 * BYTES}], None, Pool(1, 2, 0)),
        ([{"CPU": 2, "memory": 9 * BYTES}], 2, Pool(2, 1, 0)),
        ([{"CPU": 16, "memory": 99 * BYTES}, {"CPU": 5, "memory": 99 * BYTES}], None, Pool(10, 2, 0)),
        ([{"CPU": 16, "memory": 99 * BYTES}], 3, Pool(3, 2, 0)),
        ([{"CPU": 16, "GPU": 1, "memory": 99 * BYTES}], None, Pool(4, 1, 0.25)),
        ([{"CPU": 16, "GPU": 2, "memory": 99 * BYTES}], 16, Pool(16, 0.5, 0.125)),
    ],
)
def test_workers_that_score_fit_the_machines(nodes, asked, expected):
    assert parts.plan_scorers(nodes, asked) == expected


def test_more_workers_than_cpus_are_refused():
    with pytest.raises(ClusterError, match="--workers 3: expected at most one per CPU, got 2 CPUs; use --workers 2"):
        parts.plan_scorers([{"CPU": 2, "memory": 9 * BYTES}], 3)


@pytest.mark.parametrize(
    ("workers", "crops", "cpus", "address", "expected"),
    [
        (None, 8, 64, "", False),
        (None, parts.SMALL, 2, "", False),
        (None, parts.SMALL, 64, "", True),
        (None, 8, 2, "auto", True),
        (1, 999, 64, "auto", False),
        (2, 8, 2, "", True),
    ],
)
def test_ray_scores_where_it_pays_or_is_asked_for(workers, crops, cpus, address, expected, monkeypatch):
    started = []

    def start():
        started.append(True)
        raise ClusterError("started")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("os.cpu_count", lambda: cpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(parts, "start_ray", start)
    monkeypatch.setattr(parts, "_score_part", lambda *_: scored({"raw_psnr": [1.0]}))
    if expected:
        with pytest.raises(ClusterError, match="started"):
            parts.score_tiles(None, None, None, [(0, 0)] * crops, perceptual=False, workers=workers)
    else:
        parts.score_tiles(None, None, None, [(0, 0)] * crops, perceptual=False, workers=workers)
    assert bool(started) == expected


def scored(scores, precision="fp32", **detail):
    return parts.Scored({"self": scores}, [COLUMN], [0.5], {"hr_rgb": [0.1], **detail}, {}, precision)


def test_what_a_part_lacks_is_left_out():
    """As one process leaves out the truth, if some of the pairs have none."""
    both = parts.joined([scored({"raw_psnr": [1.0], "true_psnr": [2.0]}, true_rgb=[0.2]), scored({"raw_psnr": [3.0]})])
    assert both.sources == {"self": {"raw_psnr": [1.0, 3.0]}} and not both.simulated
    assert both.detail == {"hr_rgb": [0.1, 0.1]} and both.columns == [COLUMN, COLUMN]
    assert parts.joined([scored({}), scored({}, "bf16")]).precision == "fp32 and bf16"


def test_lost_parts_are_one_line(monkeypatch):
    index = type("Index", (), {"shards": "SHARDS"})()
    monkeypatch.setattr(parts, "start_ray", lambda: None)
    monkeypatch.setattr(parts.ray, "nodes", list)
    monkeypatch.setattr(parts, "plan_scorers", lambda *_: Pool(2, 1.0, 0.0))
    monkeypatch.setattr(parts, "_in_pool", lambda *_: ((n, scored({"raw_psnr": [1.0]})) for n in (1,)))
    with pytest.raises(ClusterError, match=r"expected the scores of 2 parts, got none of 1, .* died 3 times each"):
        parts.score_tiles(None, index, None, [(0, 0)] * (parts.PART + 1), perceptual=False, workers=2)
