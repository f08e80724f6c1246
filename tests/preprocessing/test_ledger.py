"""Shards are matched to sequences by name, even if one sequence's name starts with another's."""

import json
from dataclasses import replace

import pytest

from preprocessing.ledger import Ledger, sequence_of
from preprocessing.pairs import PairResult
from preprocessing.plan import PairJob, Plan, PreprocessError, PreprocessOptions
from preprocessing.raw.exif import Exif
from preprocessing.schema import SCHEMA_VERSION
from preprocessing.storage import open_folder

SHARDS = ("scene_5-1", "scene_6-2", "scene_2_5-1", "scene_2_6-2", "DSC_0_a_DSC_5-DSC_1")
OPTIONS = PreprocessOptions()


@pytest.fixture
def folder(tmp_path):
    """SHARDS with one shard per key, all of known sequences."""
    folder = open_folder(str(tmp_path))
    for key in SHARDS:
        folder.put(f"split=train/{key}_0123456789abcdef.parquet", b"")
    splits = dict.fromkeys(("scene", "scene_2", "DSC_0_a"), "train")
    dataset = {"schema_version": SCHEMA_VERSION, "options": OPTIONS.shard_options, "splits": splits}
    folder.put("dataset.json", json.dumps(dataset).encode())
    return folder


def removed(folder, plan):
    """Keys of the shards that preparing a run of `plan` removes."""
    Ledger.read(folder, OPTIONS).prepare(plan, OPTIONS)
    return set(SHARDS) - Ledger.read(folder, OPTIONS).shards.keys()


def job(sequence, lr, hr):
    fields = dict.fromkeys(PairJob.__dataclass_fields__) | {"sequence": sequence, "lr": lr, "hr": hr}
    return PairJob(**fields | {"lr_exif": Exif(), "hr_exif": Exif()})


@pytest.mark.parametrize(
    ("key", "sequence"),
    [("a_5-1", "a"), ("a_1_5-1", "a_1"), ("a_1_2_5-1", "a_1"), ("b_DSC_5-DSC_1", "b"), ("c_5-1", "")],
)
def test_sequence_of_a_key(key, sequence):
    assert sequence_of(key, {"a", "a_1", "b"}) == sequence


@pytest.mark.parametrize(
    ("excluded", "key"),
    [("scene/1", "scene_5-1"), ("scene_2/6", "scene_2_6-2"), ("DSC_0_a/DSC_1", "DSC_0_a_DSC_5-DSC_1")],
)
def test_exclusion_removes_only_its_own_sequences_shards(folder, excluded, key):
    assert removed(folder, Plan(excluded={excluded})) == {key}


def test_a_new_lr_frame_replaces_the_old_pair(folder):
    assert removed(folder, Plan(jobs=[job("scene", "4", "1"), job("scene", "6", "2")])) == {"scene_5-1"}


def test_sequences_missing_from_raw_keep_their_shards(folder):
    assert removed(folder, Plan(sequences={"new"}, jobs=[job("new", "5", "1")])) == set()


def test_val_of_a_concurrent_run_is_kept(folder):
    folder.delete("dataset.json")
    late = Ledger.read(folder, OPTIONS)  # reads before the first run writes
    Ledger.read(folder, OPTIONS).prepare(Plan(), PreprocessOptions(val=("scene",)))
    late.prepare(Plan(jobs=[job("scene", "5", "1")]), OPTIONS)
    found = Ledger.read(folder, OPTIONS)
    assert found.val == ("scene",) and found.splits == {"scene": "val"}


def test_unaligned_pairs_are_tried_again_if_wanted(folder):
    ledger, plan = Ledger.read(folder, OPTIONS), Plan(jobs=[job("new", "5", "1"), job("new", "6", "2")])
    plan.jobs = [replace(each, fingerprint=each.lr) for each in plan.jobs]
    for each, how in zip(plan.jobs, ("unaligned", ""), strict=True):
        ledger.record(each, PairResult(each.key, "quarantined", "why", aligned_by=how))
    again = Ledger.read(folder, OPTIONS)
    assert [entry.pair for entry in again.classify(plan)[2]] == ["5-1", "6-2"]
    todo, _, quarantined = again.classify(plan, keep_unaligned=True)
    assert [each.pair for each in todo] == ["5-1"] and [entry.pair for entry in quarantined] == ["6-2"]


def test_a_folder_keeps_the_curve_of_its_renderings(folder):
    assert Ledger.read(folder, OPTIONS).curve == "srgb"
    old = json.loads(folder.read("dataset.json"))
    del old["options"]["curve"]  # as version 0.2 wrote it
    folder.put("dataset.json", json.dumps(old).encode())
    assert Ledger.read(folder, OPTIONS).curve == "bt709"
    with pytest.raises(PreprocessError, match="expected the options of its shards, curve=bt709, got curve=srgb"):
        Ledger.read(folder, PreprocessOptions(curve="srgb"))
    kept = PreprocessOptions(curve="bt709")
    assert Ledger.read(folder, kept).curve == "bt709" and kept.shard_options == old["options"]
