"""The rows of both tables: complete, alike but for what makes them rows, and within one budget."""

import dataclasses
from itertools import pairwise

import pytest

from pipelines import cluster
from pipelines import config as configs
from pipelines.comparing.rows import TABLE_1, TABLE_2, TABLES, CompareError, chosen_rows, row_config
from pipelines.comparing.run import plan_rows

NETWORKS = [row for rows in TABLES.values() for row in rows if row.picture is None]


def differing(one, other):
    flat = [configs.flatten(config) for config in (one, other)]
    return {name for name in flat[0] if flat[0][name] != flat[1][name]} - {"name"}


def test_table_1_has_the_papers_rows():
    shown = [(row.label, row.input) for row in TABLE_1]
    for label, kinds in {
        "Bicubic (camera JPG)": ["RGB"],
        "SRResNet (L1)": ["RGB"],
        "SRGAN": ["RGB"],
        "Perceptual": ["RAW"],
        "ESRGAN": ["RGB"],
        "SRResNet+CX": ["RGB", "RAW"],
        "SDAN (the paper's)": ["RGB", "RAW"],
    }.items():
        assert [kind for name, kind in shown if name == label] == kinds
    assert len({row.name for row in TABLE_1}) == len(TABLE_1)


def test_sdan_rows_are_the_papers_configs():
    rows = {row.name: row_config(row, {}, None) for row in TABLE_1 if row.picture is None}
    assert differing(rows["sdan-raw"], configs.paper_4x()) == set()
    assert differing(rows["sdan-rgb"], configs.paper_4x_rgb()) == set()
    assert differing(rows["srresnet"], configs.paper_4x_rgb()) == {"architecture"}
    ours = {"model.offset_learner", "loss.known_shift_weight", "loss.offset_smoothness_weight", "train.look"}
    assert differing(rows["ours"], configs.srraw_4x()) == ours


def test_table_2_changes_one_part_at_a_time():
    rows = [row_config(row, {}, None) for row in TABLE_2 if row.picture is None]
    steps = [differing(one, other) for one, other in pairwise(rows)]
    assert steps == [{"model.offset"}, {"model.attention"}, {"model.attention"}, {"model.flips"}]
    assert differing(rows[-1], configs.paper_4x()) == set()


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_every_row_has_the_same_budget_and_crops(steps):
    changes = {"train.seed": "3", "train.crop_px": "32", "train.batch_per_worker": "4", "model.features": "16"}
    rows = [row_config(row, changes, steps) for row in NETWORKS]
    names = ("epochs", "crops_per_epoch", "restart_epochs", "seed", "crop_px", "batch_per_worker", "look", "augment")
    assert len({tuple(getattr(row.train, name) for name in names) for row in rows}) == 1
    train = rows[0].train
    assert steps <= train.epochs * train.crops_per_epoch / 4 < steps + train.epochs
    assert max(row.train.warmup_steps for row in rows) <= steps / 10
    assert {(row.model.features, row.model.blocks, row.model.scale) for row in rows} == {(16, 16, 4)}


def test_packed_input_suits_raw_and_rgb_rows():
    inputs = {row.input: row_config(row, {"model.input": "packed"}, None).model.input for row in NETWORKS}
    assert inputs == {"RAW": "packed", "RGB": "packed_rgb"}


def test_rows_are_chosen_in_the_tables_order():
    assert [row.name for row in chosen_rows(2, ("sdcn", "dcn"))] == ["dcn", "sdcn"]
    assert chosen_rows(1) == TABLE_1
    with pytest.raises(CompareError, match="expected names of bicubic-camera, dcn"):
        chosen_rows(2, ("srgan",))


def test_a_row_with_architecture_is_stored_and_read():
    config = row_config(chosen_rows(1, ("esrgan",))[0], {}, 5)
    assert config.architecture == "SRResNet" and config.loss.adversarial_kind == "relativistic"
    assert configs.from_dict(configs.to_dict(config)) == config
    old = configs.to_dict(configs.paper_4x())
    del old["architecture"]
    assert configs.from_dict(old).architecture == "SDAN"
    with pytest.raises(configs.ConfigError, match="architecture: expected one of SDAN, SRResNet, got 'EDSR'"):
        dataclasses.replace(config, architecture="EDSR")


@pytest.mark.parametrize(
    ("nodes", "rows", "concurrent", "at_once"),
    [
        ([{"CPU": 2.0}], 5, None, 1),
        ([{"CPU": 8.0}], 5, 2, 2),
        ([{"CPU": 16.0, "GPU": 4.0}], 5, None, 4),
        ([{"CPU": 16.0, "GPU": 4.0}], 2, None, 2),
        ([{"CPU": 16.0, "GPU": 4.0}], 1, None, 1),
        ([{"CPU": 16.0, "GPU": 4.0}], 5, 1, 1),
    ],
)
def test_as_many_rows_run_as_have_a_gpu(monkeypatch, nodes, rows, concurrent, at_once):
    have = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
    monkeypatch.setattr(cluster, "node_resources", lambda: nodes)
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: have)
    plan, found = plan_rows(rows, None, concurrent)
    assert found == at_once
    assert (plan.workers, plan.use_gpu) == (1, have["GPU"] > 0)


def test_no_room_for_the_rows_is_said(monkeypatch):
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(cluster, "node_resources", lambda: [{"CPU": 2.0}])
    with pytest.raises(CompareError, match="--concurrent: expected 1 to 64, got 0"):
        plan_rows(3, None, 0)
    with pytest.raises(ValueError, match="--workers 9: expected"):
        plan_rows(3, 9, None)
