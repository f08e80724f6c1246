"""The report counts correctly, labels simulated data, escapes hostile names and stays small."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from preprocessing import schema
from preprocessing.report import inspect as reports
from preprocessing.report.inspect import InspectError, histogram, inspect
from preprocessing.report.inventory import Pair, ranking, read_inventory

HOSTILE = '<script>alert(1)</script>"&amp;'


def note(folder, name, **content):
    (folder / "_quarantine").mkdir(parents=True, exist_ok=True)
    (folder / "_quarantine" / f"{name}.json").write_text(json.dumps(content))


def change(path, **values):
    """Rewrite a shard with other values in all rows."""
    table = pq.read_table(path, partitioning=None)
    rows = [row | values for row in table.to_pylist()]
    new = type(table).from_pylist(rows, schema=table.schema)
    pq.write_table(new, path, row_group_size=1)


@pytest.fixture
def shards(tiny_shards, tmp_path):
    shutil.copytree(tiny_shards, tmp_path / "shards")
    return tmp_path / "shards"


def text(page):
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL))


def test_the_page_counts_pairs_and_tiles(shards):
    paths = schema.list_shards(str(shards))
    for number, path in enumerate(paths):
        change(path, residual_px=float(number + 1), camera="Leica M", iso_lr=200.0 if number else 1600.0)
    note(shards, "00009_-", sequence="00009", pair="-", reason="only one frame")
    page = inspect(str(shards))
    said = text(page)
    for part in ("pairs 5 ", "tiles 10 ", "sequences 5 ", "median shift 3.00 HR px", "quarantined 1 "):
        assert part in said, part
    assert "train 4 8 2.50" in said and "val 1 2 5.00" in said and "test 0 0 –" in said
    assert "Leica M 5 10 3.00" in said and "240 / 50 mm 5 10" in said and "1 600 1 2 1.00" in said
    assert "00009 whole sequence only one frame" in said
    # The worst-aligned pair comes first.
    assert re.findall(r'<div class="facts"><b>(\d+)', page) == ["00005", "00004", "00003", "00002", "00001"]
    assert page.count("<img ") == 15 and page.count("data:image/jpeg;base64,") == 15


def test_simulated_data_is_labelled_and_real_data_is_not(shards):
    assert '<p class="badge">simulated</p>' in inspect(str(shards))
    for path in schema.list_shards(str(shards), "train"):
        change(path, true_flow=None, true_rgb=None)
    assert "simulated: 1 of 5 pairs" in text(inspect(str(shards)))
    for path in schema.list_shards(str(shards), "val"):
        change(path, true_flow=None, true_rgb=None)
    page = inspect(str(shards))
    assert (
        "badge" not in page.partition("</style>")[2] and ", simulated" not in page and "Simulated pictures" not in page
    )


def test_hostile_names_stay_text(shards):
    for path in schema.list_shards(str(shards)):
        change(path, sequence=HOSTILE, pair=HOSTILE, camera=HOSTILE, aligned_by=HOSTILE)
    note(shards, "x", sequence=HOSTILE, pair=HOSTILE, reason=HOSTILE)
    folder = shards.rename(shards.with_name("shards <script>"))
    page = inspect(str(folder))
    assert "<script" not in page and "&lt;script&gt;" in page
    assert re.search(r"<img [^>]*<", page) is None


def test_a_folder_with_only_a_quarantine_is_reported(tmp_path):
    note(tmp_path, "00001_00002", sequence="00001", pair="00002", reason="no RAW file beside 00002.JPG")
    (tmp_path / "_quarantine" / "broken.json").write_text("{")
    said = text(inspect(str(tmp_path)))
    assert (
        "No shards yet" in said and "no RAW file beside 00002.JPG" in said and "this quarantine note is damaged" in said
    )


def test_unusable_folders_are_refused_in_one_line(shards, tmp_path):
    with pytest.raises(
        InspectError, match="expected shards or a quarantine, got neither; make them with sdan preprocess"
    ):
        inspect(str(tmp_path / "nosuch"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InspectError, match=r"file: expected (shards|a SHARDS folder)"):
        inspect(str(tmp_path / "file"))
    with pytest.raises(InspectError, match="gopher://shards: expected a SHARDS folder"):
        inspect("gopher://shards")
    for path in schema.list_shards(str(shards)):
        table = pq.read_table(path, partitioning=None)
        described = json.loads(table.schema.metadata[b"sdan"]) | {"schema_version": 1}
        pq.write_table(table.replace_schema_metadata({"sdan": json.dumps(described)}), path)
    with pytest.raises(InspectError, match=r"expected schema version 2, got 1; preprocess again"):
        inspect(str(shards))


def test_a_damaged_shard_is_listed(shards):
    path = Path(schema.list_shards(str(shards))[0])
    path.write_bytes(path.read_bytes()[:100])
    said = text(inspect(str(shards)))
    assert "pairs 4 " in said and "Damaged shards" in said and "expected a complete shard" in said


def test_unmeasurable_pairs_rank_worst():
    def pair(name, *residuals):
        return Pair(name, "train", {}, np.array(residuals, np.float32), False, 0)

    pairs = [pair("a", 1, 2, 3), pair("b", np.nan, np.nan), pair("c", np.nan, 7), pair("d", 0.1)]
    assert [entry.path for entry in ranking(pairs)] == ["b", "c", "a", "d"]


@pytest.mark.parametrize(
    "values", [[0.0], [0.3, np.nan], list(np.linspace(0, 80, 500)), [1e-4] * 5, [5.0] * 99 + [300]]
)
def test_a_histogram_counts_every_value(values):
    bars = histogram(np.array(values))
    finite = np.array(values)[np.isfinite(values)]
    assert sum(bars.counts) + bars.overflow == len(finite) and bars.top >= max(bars.counts)
    assert len(bars.counts) <= 36 and 2 <= len(bars.ticks) <= 8 and bars.ticks[-1] <= bars.end + 1e-9
    for number, count in enumerate(bars.counts):
        inside = (finite >= number * bars.width - 1e-12) & (finite < (number + 1) * bars.width - 1e-12)
        assert count == pytest.approx(inside.sum(), abs=1)  # a value on an edge may round to either side
    assert histogram(np.array([np.nan])) is None


def test_the_page_does_not_grow_with_the_folder(shards, monkeypatch):
    """With 200 shards, the page shows 24 pairs and decodes pictures of no others."""
    source = schema.list_shards(str(shards), "train")[0]
    (shards / "split=test").mkdir()
    for number in range(200):
        shutil.copy(source, shards / "split=test" / f"{number:05d}_00005-00001_0123456789abcdef.parquet")
    decoded = []
    monkeypatch.setattr(reports, "decode", lambda row, info: decoded.append(row) or schema.decode(row, info))
    page = inspect(str(shards))
    assert page.count("<img ") == 3 * 24 and len(page) < 10_000_000
    assert len(decoded) == 24


def test_pictures_stop_at_their_limit(shards, monkeypatch):
    monkeypatch.setattr(reports, "_PICTURE_BYTES", 30_000)
    assert 0 < inspect(str(shards)).count("<img ") < 15


def test_pairs_without_a_jpg_and_unregistered_pairs_are_counted(shards):
    paths = schema.list_shards(str(shards))
    for number, path in enumerate(paths):
        change(path, aligned_by="scale_fallback" if number < 2 else "ecc", lr_source="camera", hr_source="camera")
    change(paths[0], hr_source="rendering")
    said = text(inspect(str(shards)))
    assert "3 pairs registered (ecc), 2 pairs could not be registered and fell back to focal length." in said
    assert "1 pair uses LibRaw's rendering instead of a missing JPG." in said


def test_measurements_are_summarised(shards):
    paths = schema.list_shards(str(shards))
    for number, path in enumerate(paths):
        change(path, exposure_ratio=None if number == 0 else 0.5 * number, jpg_scale=None)
    said = text(inspect(str(shards)))
    assert "exposure ratio HR / LR, measured 0.575 1.250 1.925 4" in said
    assert "JPG vs its RAW: scale – – – 0" in said


def test_progress_is_reported(shards):
    told = []
    read_inventory(str(shards), lambda done, total: told.append((done, total)))
    assert told == [(number, 5) for number in range(6)]
