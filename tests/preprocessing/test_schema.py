"""Encoded rows decode to the same values, with this package and with pyarrow alone."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocessing import schema
from preprocessing.storage import open_folder

INFO = schema.ShardInfo(tile_px=4, scale=2, options={"align": "scale"})


def row(seed, **changes):
    draw = np.random.default_rng(seed)
    arrays = {name: draw.integers(0, 200, INFO.shape(name)).astype(dtype) for name, (dtype, _) in schema.ARRAYS.items()}
    values = {
        "sequence": "00001",
        "pair": "00005-00001",
        "black_level": np.array([512, 513, 514, 515], np.float32),
        "wb": np.array([2, 1, 1, 1.5], np.float32),
        "wb_source": "camera",
        "matrix_source": "file",
        "white_level": 16383.0,
        "focal_lr_mm": 50.0,
        "focal_hr_mm": 240.0,
        "scale": 2,
        "iso_lr": 100.0,
        "iso_hr": None,
        "exposure_lr_s": 0.01,
        "exposure_hr_s": None,
        "lr_source": "camera",
        "hr_source": "rendering",
        "f_number_lr": 8.0,
        "f_number_hr": None,
        "exposure_ratio_exif": None,
        "exposure_ratio": 1.1,
        "exposure_falloff": float("nan"),
        "jpg_scale": 1.001,
        "jpg_k1": 0.02,
        "jpg_shift_x": 0.25,
        "jpg_shift_y": -0.5,
        "jpg_falloff": -0.3,
        "look_curve": (np.arange(33) / 32).astype(np.float32),
        "look_matrix": np.eye(3, dtype=np.float32).ravel(),
        "camera": "SONY ILCE-7SM2",
        "row": 3,
        "col": 5,
        "origin_row": 0,
        "origin_col": 1,
        "lr_to_hr": np.arange(6) / 7,
        "lr_to_hr_lens": np.arange(12) / 7,
        "aligned_by": "scale",
        "align_score": 0.9,
        "residual_px": float("nan"),
    }
    return arrays | values | changes


def test_row_round_trip():
    original = row(0)
    table = schema.encode([original], INFO)
    decoded = schema.decode(table.to_pylist()[0], INFO)
    assert set(decoded) == set(schema.COLUMNS)
    for name in schema.ARRAYS:
        assert np.array_equal(decoded[name], original[name]) and decoded[name].dtype == original[name].dtype
    for name in ("black_level", "wb", "lr_to_hr", "lr_to_hr_lens"):
        assert np.array_equal(decoded[name], original[name])
    assert decoded["lr_to_hr"].dtype == np.float64 and decoded["wb"].dtype == np.float32
    assert decoded["row"] == 3 and decoded["camera"] == "SONY ILCE-7SM2" and np.isnan(decoded["iso_hr"])


@pytest.mark.parametrize("form", ["lists", "numpy objects"])
def test_batch_round_trip(form):
    rows = [row(seed) for seed in range(3)]
    batch = schema.encode(rows, INFO).to_pydict()
    if form == "numpy objects":
        batch = {name: np.array(values, object) if name in schema.ARRAYS else values for name, values in batch.items()}
    decoded = schema.decode(batch, INFO)
    assert decoded["hr_rgb"].shape == (3, 3, 16, 16) and decoded["true_flow"].shape == (3, 2, 4, 4)
    assert np.array_equal(decoded["lr_raw"][2], rows[2]["lr_raw"])
    assert decoded["wb"].shape == (3, 4) and decoded["lr_to_hr"].shape == (3, 6)
    assert decoded["white_level"].tolist() == [16383] * 3 and np.isnan(decoded["exposure_hr_s"]).all()


def test_missing_truth_decodes_to_none():
    table = schema.encode([row(0, true_rgb=None, true_flow=None), row(1)], INFO)
    assert schema.decode(table.to_pylist()[0], INFO)["true_rgb"] is None
    batch = schema.decode(table.to_pydict(), INFO)
    assert batch["true_rgb"] is None and batch["true_flow"] is None and batch["hr_rgb"] is not None


def test_wrong_arrays_are_rejected():
    with pytest.raises(schema.SchemaError, match=r"lr_raw: expected uint16\[4, 4, 4\], got uint8\[4, 4, 4\]"):
        schema.encode([row(0, lr_raw=np.zeros((4, 4, 4), np.uint8))], INFO)
    with pytest.raises(schema.SchemaError, match=r"hr_rgb: expected uint8\[3, 16, 16\], got uint8\[16, 16, 3\]"):
        schema.encode([row(0, hr_rgb=np.zeros((16, 16, 3), np.uint8))], INFO)
    with pytest.raises(schema.SchemaError, match=r"row: expected columns .*, got \['sequence'\]"):
        schema.encode([{"sequence": "x"}], INFO)


def test_the_file_describes_itself(tmp_path):
    (tmp_path / "split=train").mkdir()
    path = tmp_path / "split=train" / "a_b_c.parquet"
    pq.write_table(schema.encode([row(0)], INFO), path)
    table = pq.read_table(path, partitioning=None)
    described = json.loads(table.schema.metadata[b"sdan"])
    array = described["arrays"]["hr_rgb"]
    plain = np.frombuffer(table["hr_rgb"][0].as_py(), array["dtype"]).reshape(array["shape"])
    assert np.array_equal(plain, row(0)["hr_rgb"])
    assert set(described["columns"]) == set(table.column_names)
    info = schema.read_info(str(tmp_path))
    assert (info.tile_px, info.scale, dict(info.options)) == (4, 2, {"align": "scale"})


def test_shards_are_listed_by_split(tmp_path):
    for name in (
        "split=train/b.parquet",
        "split=train/a.parquet",
        "split=val/c.parquet",
        "split=train/.d.parquet.host~1~x",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "_quarantine").mkdir()
    assert schema.list_shards(str(tmp_path), "train") == [
        str(tmp_path / f"split=train/{name}.parquet") for name in "ab"
    ]
    assert len(schema.list_shards(str(tmp_path))) == 3
    assert schema.list_shards(str(tmp_path / "absent")) == []
    with pytest.raises(schema.SchemaError, match="split: expected one of train, val, test, got 'dev'"):
        schema.list_shards(str(tmp_path), "dev")


def test_empty_folders_and_other_versions_are_rejected(tmp_path):
    with pytest.raises(schema.SchemaError, match=r"expected shards \(.*\), got none; run: sdan preprocess RAW "):
        schema.read_info(str(tmp_path))
    folder = open_folder(str(tmp_path))
    for number, reason in enumerate(["a/1.dng: the file ends early", "b/1.dng: the file ends early", "another"]):
        note = {"sequence": "a", "pair": str(number), "reason": reason}
        folder.put(f"_quarantine/a_{number}.json", json.dumps(note).encode())
    expected = r"got none: 3 are set aside, most often because: the file ends early \(see .*/_quarantine\); run: sdan"
    with pytest.raises(schema.SchemaError, match=expected):
        schema.read_info(str(tmp_path))
    with pytest.raises(schema.SchemaError, match="expected schema version 2, got none"):
        schema.info_of(pa.schema([]), "x.parquet")
