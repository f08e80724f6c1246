"""Shards are matched to sequences by name, also if one sequence's name starts with another's."""

import pytest

from preprocessing.ledger import Ledger, _sequence_of
from preprocessing.plan import PairJob, Plan, PreprocessOptions
from preprocessing.raw.exif import Exif
from preprocessing.storage import open_folder

SHARDS = ("scene_5-1", "scene_6-2", "scene_2_5-1", "scene_2_6-2", "DSC_0_a_DSC_5-DSC_1")


@pytest.fixture
def ledger(tmp_path):
    folder = open_folder(str(tmp_path))
    for key in SHARDS:
        folder.put(f"split=train/{key}_0123456789abcdef.parquet", b"")
    folder.put("dataset.json", b'{"splits": {"scene": "train", "scene_2": "train", "DSC_0_a": "train"}}')
    found = Ledger(folder, {"splits": dict.fromkeys(("scene", "scene_2", "DSC_0_a"), "train")})
    found.shards = found._listed()
    return found


def job(sequence, lr, hr):
    fields = dict.fromkeys(PairJob.__dataclass_fields__) | {"sequence": sequence, "lr": lr, "hr": hr}
    return PairJob(**fields | {"lr_exif": Exif(), "hr_exif": Exif()})


@pytest.mark.parametrize(
    ("key", "sequence"),
    [("a_5-1", "a"), ("a_1_5-1", "a_1"), ("a_1_2_5-1", "a_1"), ("b_DSC_5-DSC_1", "b"), ("c_5-1", "")],
)
def test_sequence_of_a_key(key, sequence):
    assert _sequence_of(key, {"a", "a_1", "b"}) == sequence


def test_exclusion_removes_only_its_own_sequences_shards(ledger):
    assert ledger._outdated(Plan(excluded={"scene/1"})) == ["scene_5-1"]
    assert ledger._outdated(Plan(excluded={"scene_2/6"})) == ["scene_2_6-2"]
    assert ledger._outdated(Plan(excluded={"DSC_0_a/DSC_1"})) == ["DSC_0_a_DSC_5-DSC_1"]


def test_a_new_lr_frame_makes_the_old_pair_outdated(ledger):
    assert ledger._outdated(Plan(jobs=[job("scene", "4", "1"), job("scene", "6", "2")])) == ["scene_5-1"]


def test_sequences_missing_from_raw_keep_their_shards(ledger):
    assert ledger._outdated(Plan(sequences={"new"}, jobs=[job("new", "5", "1")])) == []


def test_val_of_a_concurrent_run_is_kept(ledger, tmp_path):
    options = PreprocessOptions()
    first = Ledger(ledger.target)
    ledger.target.delete("dataset.json")
    first.prepare(Plan(), PreprocessOptions(val=("scene",)))
    late = Ledger(ledger.target)  # as if read before the first run wrote
    late.prepare(Plan(jobs=[job("scene", "5", "1")]), options)
    late = Ledger.read(ledger.target, options)
    assert late.val == ("scene",) and late.splits == {"scene": "val"}
