"""Shards are matched to sequences by name, even if one sequence's name starts with another's."""

import json
from dataclasses import replace

import pytest

from preprocessing.estimate import Rate
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
    folder.put("_dataset.json", json.dumps(dataset).encode())
    return folder


def removed(folder, plan):
    """Keys of the shards that preparing a run of `plan` removes."""
    Ledger.read(folder, OPTIONS).prepare(plan, OPTIONS)
    return set(SHARDS) - Ledger.read(folder, OPTIONS).shards.keys()


def job(sequence, lr, hr):
    fields = dict.fromkeys(PairJob.__dataclass_fields__) | {"sequence": sequence, "lr": lr, "hr": hr}
    fields["split"] = "train"
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
    folder.delete("_dataset.json")
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


def test_options_bind_once_there_is_a_shard(tmp_path):
    folder = open_folder(str(tmp_path))
    Ledger.read(folder, OPTIONS).prepare(Plan(), OPTIONS)  # a run that sets everything aside
    smaller = PreprocessOptions(tile_px=48, stride_px=32)
    ledger = Ledger.read(folder, smaller)
    assert ledger.curve is None
    ledger.prepare(Plan(), smaller)
    folder.put("split=train/a_5-1_0123456789abcdef.parquet", b"")
    with pytest.raises(PreprocessError, match="expected the options of its shards, tile_px=48, stride_px=32, got"):
        Ledger.read(folder, OPTIONS)
    assert Ledger.read(folder, smaller).curve == "srgb"


def test_a_concurrent_run_with_other_options_is_noticed(tmp_path):
    folder = open_folder(str(tmp_path))
    first = Ledger.read(folder, OPTIONS)
    first.prepare(Plan(), OPTIONS)
    other = PreprocessOptions(tile_px=48, stride_px=32)
    Ledger.read(folder, other).prepare(Plan(), other)
    folder.put("split=train/a_5-1_0123456789abcdef.parquet", b"")
    with pytest.raises(PreprocessError, match="expected the options of its shards, tile_px=48"):
        first.finish(Plan(), OPTIONS)


DAMAGE = (b"\xff\xfe{}", b"[]", b"7", b"{}", b"[" * 10**6)


@pytest.mark.parametrize("damage", [*DAMAGE, b'{"schema_version": 2, "options": 3}'])
def test_a_damaged_dataset_file_is_named(folder, damage):
    folder.put("_dataset.json", damage)
    with pytest.raises(PreprocessError, match=r"/_dataset.json: expected JSON as SDAN writes it, got [^\n]+; restore"):
        Ledger.read(folder, OPTIONS)


@pytest.mark.parametrize("damage", [*DAMAGE, b'{"reason": 3}', b"x" * 2_000_000])
def test_a_damaged_note_is_ignored_and_rewritten(folder, damage):
    pair = replace(job("new", "5", "1"), fingerprint="5")
    folder.put(pair.quarantine, damage)
    ledger = Ledger.read(folder, OPTIONS)
    assert ledger.quarantine == {} and [each.pair for each in ledger.classify(Plan(jobs=[pair]))[0]] == ["5-1"]
    ledger.record(pair, PairResult(pair.key, "quarantined", "why"))
    assert Ledger.read(folder, OPTIONS).quarantine[pair.quarantine]["reason"] == "why"


def test_names_of_version_0_2_are_read_and_moved(folder):
    note = {"sequence": "scene", "pair": "9-1", "reason": "why", "fingerprint": "f"}
    folder.move("_dataset.json", "dataset.json")
    folder.put("quarantine/scene_9-1.json", json.dumps(note).encode())
    folder.put("rate.json", b'{"tiles": 1, "bytes": 2, "raw_bytes": 3, "task_seconds": 4.5}')
    assert Rate.read(folder) == Rate(1, 2, 3, 4.5)
    ledger = Ledger.read(folder, OPTIONS)
    assert ledger.splits["scene"] == "train" and ledger.quarantine["_quarantine/scene_9-1.json"] == note
    ledger.prepare(Plan(), OPTIONS)
    names = {folder.relative(entry.path).partition("/")[0] for entry in folder.files(recursive=True)}
    assert names == {"_dataset.json", "_rate.json", "_quarantine", "split=train"} and not folder.exists("quarantine")
    again = Ledger.read(folder, OPTIONS)
    assert again.splits["scene"] == "train" and again.quarantine == ledger.quarantine


def test_a_folder_keeps_the_curve_of_its_renderings(folder):
    assert Ledger.read(folder, OPTIONS).curve == "srgb"
    old = json.loads(folder.read("_dataset.json"))
    del old["options"]["curve"]  # as version 0.2 wrote it
    folder.put("_dataset.json", json.dumps(old).encode())
    assert Ledger.read(folder, OPTIONS).curve == "bt709"
    with pytest.raises(PreprocessError, match="expected the options of its shards, curve=bt709, got curve=srgb"):
        Ledger.read(folder, PreprocessOptions(curve="srgb"))
    kept = PreprocessOptions(curve="bt709")
    assert Ledger.read(folder, kept).curve == "bt709" and kept.shard_options == old["options"]
