"""Shards can be read without this package: the examples in docs/shards.md run, and its table matches the schema."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.loader import index_split, read_tile
from preprocessing import schema
from preprocessing.report.inventory import read_inventory
from preprocessing.shard_folder import names
from preprocessing.storage import open_folder

DOCS = (Path(__file__).parents[2] / "docs" / "shards.md").read_text()
EXAMPLES = {
    next(name for name in ("polars", "duckdb", "pyarrow") if name in code): code
    for code in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
}


def type_name(kind) -> str:
    text = str(kind).replace("float", "float32").replace("double", "float64")
    text = re.sub(r"fixed_size_list<item: (\w+)>\[(\d+)\]", r"\2 x \1", text)
    return re.sub(r"list<item: (\w+)>", r"list of \1", text)


def test_documented_table_matches_the_schema():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", DOCS, re.MULTILINE)
    expected = [(name, type_name(kind), meaning) for name, (kind, meaning) in schema.COLUMNS.items()]
    assert rows == expected
    assert f"Schema version {schema.SCHEMA_VERSION}" in DOCS


@pytest.mark.parametrize("library", ["pyarrow", "polars", "duckdb"])
def test_documented_examples_read_a_picture(library, tiny_shards, tmp_path, monkeypatch):
    """The examples import nothing from this package; the file's metadata describes the arrays."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SHARDS").symlink_to(tiny_shards)
    code = EXAMPLES[library]
    assert len([line for line in code.splitlines() if line.strip()]) <= 5 and "preprocessing" not in code
    found: dict = {}
    exec(code, found)
    stored = [
        schema.decode(row, schema.read_info(str(tiny_shards)))["hr_rgb"]
        for path in schema.list_shards(str(tiny_shards), "train")
        for row in pq.read_table(path, partitioning=None).to_pylist()
    ]
    assert any(np.array_equal(found["picture"], picture) for picture in stored)


def test_the_folder_opens_as_it_is(tiny_shards, tmp_path):
    import duckdb
    import pandas
    import polars

    shutil.copytree(tiny_shards, tmp_path / "shards")
    folder = open_folder(str(tmp_path / "shards"))
    for name in (names.DATASET, names.RATE, f"{names.QUARANTINE}/a_5-1.json", "split=train/.a~host~1~2"):
        folder.put(name, b"{}")
    assert len(pandas.read_parquet(folder.root, columns=["sequence", "split"])) == 10
    assert pq.read_table(folder.root, columns=["sequence"]).num_rows == 10
    assert len(duckdb.read_parquet(folder.root).select("sequence").fetchall()) == 10
    assert polars.read_parquet(folder.root, use_pyarrow=True, columns=["sequence", "split"]).shape == (10, 2)
    # Its own reader takes a pattern, since it reads files of any name. If these fail, docs/shards.md can be shortened.
    for option in ({}, {"hidden_file_prefix": ("_", ".")}):
        with pytest.raises(polars.exceptions.InvalidOperationError, match="different file extensions"):
            polars.scan_parquet(folder.root, **option).select("sequence").collect()
    found = polars.scan_parquet(f"{folder.root}/split=*/*.parquet", hive_partitioning=True)
    assert found.select("sequence", "split").collect().shape == (10, 2)


@pytest.mark.parametrize("old", ["split=train", "split=val"])
def test_files_of_version_0_2_may_lie_beside_newer_ones(tiny_shards, tmp_path, old):
    import duckdb
    import pandas
    import polars

    shutil.copytree(tiny_shards, tmp_path / "shards")
    for path in (tmp_path / "shards" / old).iterdir():
        table = pq.read_table(path, partitioning=None)
        pq.write_table(table.drop_columns(["wb_source", "matrix_source"]), path, row_group_size=1)
    pattern = f"{tmp_path}/shards/split=*/*.parquet"
    assert len(pandas.read_parquet(tmp_path / "shards")) == 10
    assert len(polars.scan_parquet(pattern, missing_columns="insert", extra_columns="ignore").collect()) == 10
    assert len(duckdb.read_parquet(pattern, union_by_name=True).fetchall()) == 10
    index = index_split(str(tmp_path / "shards"), "val")
    assert read_tile(index, 0, 0)["lr_raw"].shape == (4, 24, 24)
    assert len(read_inventory(str(tmp_path / "shards")).pairs) == 5


@pytest.mark.parametrize("library", ["polars", "duckdb"])
def test_every_column_is_readable(library, tiny_shards):
    pattern = f"{tiny_shards}/split=*/*.parquet"
    if library == "polars":
        import polars

        rows = polars.read_parquet(pattern, hive_partitioning=True).to_dicts()
    else:
        import duckdb

        query = duckdb.read_parquet(pattern, hive_partitioning=True)
        rows = [dict(zip(query.columns, row, strict=True)) for row in query.fetchall()]
    assert len(rows) == 10 and set(rows[0]) == {*schema.COLUMNS, "split"}
    by_split = {row["split"] for row in rows}
    assert by_split == {"train", "val"}
    for path in schema.list_shards(str(tiny_shards)):
        for stored in pq.read_table(path, partitioning=None).to_pylist():
            [read] = [row for row in rows if (row["sequence"], row["col"]) == (stored["sequence"], stored["col"])]
            for name in schema.COLUMNS:
                value = list(read[name]) if isinstance(read[name], tuple) else read[name]
                assert value == stored[name], name
