"""`sdan evaluate`: rows, targets, pictures and refusals, on crops whose scores are known."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines import config as configs
from pipelines.evaluate import EvaluateError, check_request, evaluate
from pipelines.loader import ShardsError, index_split, read_tile
from sdan import checkpoint, metrics
from sdan.network import SDAN
from sdan.perceptual.st_lpips import STLPIPS
from sdan.perceptual.weights import PerceptualError
from sdan.resample import bicubic

ROWS = ["bicubic of the camera JPG", "bicubic of the rendering", "SDAN (self)", "SDAN (oracle)"]


def save_model(folder, **changes):
    """An untrained checkpoint of config smoke; its skip makes the output bicubic enlargement of the rendering."""
    torch.manual_seed(0)
    config = configs.override(configs.smoke(), changes)
    return checkpoint.save(folder, SDAN(config.model), config=configs.to_dict(config), scores={})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "untrained")


@pytest.fixture(scope="module")
def scored(tiny_shards, model, tmp_path_factory):
    """(result, folder with its files) of the untrained model on the val split."""
    out = tmp_path_factory.mktemp("out")
    return evaluate(str(tiny_shards), model, out=out), out


def bicubic_psnr(index):
    """Mean PSNR of bicubic enlargement over the central crops of 16 packed pixels, 8 target pixels cropped."""
    values = []
    for tile in range(index.num_tiles):
        row = read_tile(index, 0, tile)
        low, high = row["lr_render"][:, 8:40, 8:40], row["hr_rgb"][:, 32:160, 32:160]
        enlarged = bicubic(torch.from_numpy(low.copy())[None] / 255, 4)[0].clamp(0, 1).numpy()
        error = (enlarged - high / 255)[:, 8:-8, 8:-8]
        values.append(-10 * math.log10((error**2).mean()))
    return np.mean(values)


def test_the_self_protocol_scores_the_deployed_network(tiny_shards, tmp_path):
    """The pyramid's offsets to the input's own rendering are skipped, as `sdan zoom` skips them."""
    changes = {"model.offset_learner": "pyramid", "model.max_shift_px": 8}
    result = evaluate(str(tiny_shards), save_model(tmp_path / "model", **changes), perceptual=False)
    expected = bicubic_psnr(index_split(str(tiny_shards), "val"))
    assert result.rows["SDAN (self)"]["raw_psnr"] == pytest.approx(expected, abs=0.01)


def test_every_row_has_the_score_of_its_pictures(scored, tiny_shards):
    """The network is untrained and the pairs are perfectly aligned, so all rows are bicubic enlargement."""
    result, _ = scored
    expected = bicubic_psnr(index_split(str(tiny_shards), "val"))
    assert list(result.rows) == ROWS
    for row in result.rows.values():
        assert row["raw_psnr"] == row["true_psnr"] == pytest.approx(expected, abs=0.01)
    assert result.gain_db("raw") == pytest.approx(0, abs=0.01)
    assert result.gap_db == pytest.approx({"raw": 0, "aligned": 0, "true": 0}, abs=0.01)
    assert (result.crops, result.crop_px, result.split, result.simulated) == (2, 16, "val", True)
    assert result.epe_px == pytest.approx(0, abs=0.01)  # neither the network nor the pairs move anything
    assert result.alignment_gain == pytest.approx(0, abs=0.01) and "alignment gain" in result.notes()
    assert result.valid_share > 0.9


def test_the_files_have_the_same_numbers(scored):
    result, out = scored
    table = (out / "table.md").read_text()
    assert table == result.table() + "\n"
    for name in ROWS:
        assert f"| {name} | {result.rows[name]['raw_psnr']:.2f} | " in table
    stored = json.loads((out / "evaluation.json").read_text())
    assert stored["rows"] == result.rows and stored["gap_db"] == result.gap_db
    assert stored["differences"]["SDAN (self)"]["raw_psnr"]["mean"] == pytest.approx(result.gain_db("raw"))
    tiles = pq.read_table(out / "tiles.parquet").to_pylist()
    assert len(tiles) == len(ROWS) * result.crops and "tiles" not in stored
    for name in ROWS:
        scores = [tile["raw_psnr"] for tile in tiles if tile["method"] == name]
        assert np.mean(scores) == pytest.approx(result.rows[name]["raw_psnr"])
    assert {(tile["sequence"], tile["camera"], tile["focal_hr_mm"]) for tile in tiles} == {("00005", "test", 240.0)}
    groups = (out / "groups.md").read_text()
    assert "| 00005 / 00005-00001 | 2 |" in groups
    assert "| far | 2 |" in groups and "| near | 1 |" in groups and "| edges | 1 |" in groups
    assert {tile["raw_psnr_near"] is None or tile["raw_psnr_near"] > 0 or tile["col"] == 0 for tile in tiles} == {True}
    assert "11-tap Gaussian window" in table and "95 % interval: none, which takes two sequences or more (1)" in table
    assert stored["targets"] == ["raw", "aligned", "true"]


def test_the_example_pictures_are_bicubic_and_target(scored, tiny_shards):
    """Two rows of four panels: camera JPG, rendering, SDAN, target; the first three are the same here."""
    _, out = scored
    sheet = np.asarray(Image.open(out / "examples.png").convert("RGB")).astype(int)
    side = 256  # 128 target pixels, each shown twice
    assert sheet.shape[1] == 4 * (side + 8) + 8
    panels = [sheet[-(side + 8) : -8, 8 + (side + 8) * column :][:, :side] for column in range(4)]
    assert all(np.abs(panel - panels[0]).max() <= 2 for panel in panels[:3])
    index = index_split(str(tiny_shards), "val")
    targets = [read_tile(index, 0, tile)["hr_rgb"][:, 32:160, 32:160].transpose(1, 2, 0) for tile in range(2)]
    assert any(np.array_equal(panels[3][::2, ::2], target) for target in targets)


def test_st_lpips_has_columns_or_a_reason(tiny_shards, model, st_lpips_weights, monkeypatch):
    """As LPIPS: not against the aligned target, whose mask it cannot use."""
    network = STLPIPS(st_lpips_weights)
    monkeypatch.setattr(metrics, "st_lpips_on", lambda device: network)
    result = evaluate(str(tiny_shards), model, limit=1)
    for row in result.rows.values():
        assert row["raw_st_lpips"] == pytest.approx(row["true_st_lpips"]) and row["raw_st_lpips"] > 0
        assert "aligned_st_lpips" not in row
    table = [[cell.strip() for cell in line.split("|")] for line in result.table().splitlines()]
    cells = dict(zip(table[0], table[2], strict=True))
    assert cells["raw ST-LPIPS"] == f"{result.rows[ROWS[0]]['raw_st_lpips']:.4f}"
    assert cells["aligned ST-LPIPS"] == "n/a" and "true ST-LPIPS" in cells

    def missing(device):
        raise PerceptualError("ST-LPIPS: expected a package, got none; install it")

    monkeypatch.setattr(metrics, "st_lpips_on", missing)
    result = evaluate(str(tiny_shards), model, limit=1)
    assert "raw ST-LPIPS" not in result.table()
    assert "\nST-LPIPS n/a: expected a package, got none; install it." in result.table()
    assert not any("st_lpips" in name for row in result.rows.values() for name in row)
    assert "LPIPS" not in evaluate(str(tiny_shards), model, limit=1, perceptual=False).table()


def test_one_target_gives_its_columns_alone(tiny_shards, model):
    result = evaluate(str(tiny_shards), model, targets=["raw"], limit=1)
    assert result.targets == ("raw",) and result.crops == 1
    head = result.table().splitlines()[0]
    assert "raw PSNR" in head and "aligned" not in head and "true" not in head


def test_the_notes_say_what_could_not_be_aligned(scored):
    result, _ = scored
    rows = {name: row | {"aligned_psnr": math.nan} for name, row in result.rows.items()}
    notes = replace(result, rows=rows, valid_share=math.nan).notes()
    assert "aligned: n/a of pixels valid" in notes and "raw +0.00 dB, aligned n/a, true" in notes
    assert "nan" not in notes


def test_one_protocol_gives_its_row_alone(scored):
    result, _ = scored
    assert "SDAN (oracle)" not in result.table(["self"]) and "SDAN (self)" in result.table(["self"])
    assert "SDAN (self)" not in result.table(["oracle"])


def test_real_shards_have_no_true_target(shards_without_truth, model):
    result = evaluate(shards_without_truth, model)
    assert result.targets == ("raw", "aligned") and not result.simulated and math.isnan(result.epe_px)
    assert not any("near" in name for tile in result.tiles for name in tile)
    assert "Simulated" not in result.notes() and "End-point error" not in result.notes()
    with pytest.raises(EvaluateError, match=r"--target true, .*: expected simulated shards, got shards without truth"):
        evaluate(shards_without_truth, model, targets=["true"])


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_the_table_names_the_precision_of_this_cpu(tiny_shards, model, monkeypatch, has_bf16, expected):
    monkeypatch.setattr("sdan.ops.precision.cpu_has_bf16", lambda: has_bf16)
    result = evaluate(str(tiny_shards), model, limit=1, perceptual=False)
    assert result.precision == expected and f"network in {expected}." in result.table()


def test_two_models_of_one_index_are_scored_on_the_same_crops(tiny_shards, model, tmp_path):
    """Even if preprocessing adds pairs in between, as in a retraining."""
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    index = index_split(str(shards), "val")
    first = evaluate(index, model, perceptual=False)
    (pair,) = (shards / "split=val").glob("*.parquet")
    shutil.copy(next((shards / "split=train").glob("*.parquet")), pair.with_name("00004_" + pair.name[6:]))
    second = evaluate(index, save_model(tmp_path / "other", **{"model.features": 12}), perceptual=False)
    assert second.crops == first.crops == 2
    for row in ROWS[:2]:
        assert second.rows[row] == first.rows[row]
    assert evaluate(str(shards), model, perceptual=False).crops == 4


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"split": "all"}, "--split: expected train, val, test, got 'all'"),
        ({"targets": ["raw", "best"]}, "--target: expected raw, aligned, true, got 'best'"),
        ({"protocols": ["psychic"]}, "--protocol: expected self or oracle, got 'psychic'"),
        ({"limit": 0}, "--crops: expected at least 1, got 0"),
    ],
)
def test_wrong_names_and_numbers_get_one_line(request_, message):
    valid = {"split": "val", "targets": None, "limit": None}
    check_request(**valid)
    with pytest.raises(EvaluateError) as caught:
        check_request(**valid | request_)
    assert str(caught.value) == message


def test_a_wrong_request_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(EvaluateError, match="--crops"):
        evaluate("nosuch", tmp_path / "nosuch", limit=0, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_another_scale_is_refused(tiny_shards, tmp_path):
    folder = save_model(tmp_path / "m", **{"model.scale": 8})
    with pytest.raises(ShardsError, match="expected scale 8, got shards of scale 4"):
        evaluate(str(tiny_shards), folder)
