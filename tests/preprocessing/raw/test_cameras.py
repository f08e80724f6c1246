"""From files to shard rows for any Bayer camera and scale: phases, cropped JPGs, missing JPGs, 2x to 8x."""

import json
from dataclasses import replace

import numpy as np
import pytest
from known_scene import WB, Scene, frame_to_scene, jpg_bytes, to_8_bit, to_mosaic, write_sequence
from PIL import Image

from preprocessing import tiles
from preprocessing.ledger import Ledger
from preprocessing.pairs import pair_rows, process
from preprocessing.plan import PreprocessError, PreprocessOptions, make_plan
from preprocessing.raw import decode, dng, tiff
from preprocessing.raw.profiles.icc import ADOBE_RGB
from preprocessing.storage import open_folder

SIZE = (256, 384)
OPTIONS = {"tile_px": 24, "stride_px": 24}


def rows_of(folder, **options):
    """Rows of every pair below `folder` by the pair's name, and the plan."""
    chosen = PreprocessOptions(**OPTIONS | options)
    source = open_folder(str(folder))
    plan = make_plan(source, chosen, {})
    return {job.pair: pair_rows(source, job, chosen) for job in plan.jobs}, plan


@pytest.mark.parametrize("cfa", ["GRBG", "GBRG", "BGGR"])
@pytest.mark.parametrize("jpg_margin", [0, 3])
def test_every_phase_shows_the_same_place(tmp_path, cfa, jpg_margin):
    """Counts, rendering and JPGs of a tile show the same place in all phases."""
    write_sequence(tmp_path / "00001", seed=4, focals_mm=(240, 50), cfa=cfa, jpg_margin=jpg_margin)
    rows, plan = rows_of(tmp_path)
    assert plan.faults == [] and list(rows) == ["00002-00001"]
    for row in rows["00002-00001"]:
        top, left = row["origin_row"] + 2 * row["row"], row["origin_col"] + 2 * row["col"]
        to_scene = frame_to_scene(4.8, SIZE)
        to_scene[:, 2] += to_scene[:, :2] @ (left, top)
        shown = Scene(4).view(to_scene, (48, 48)).transpose(2, 0, 1) * 255
        assert np.abs(row["lr_rgb"] - shown).mean() < 2.5  # JPEG's error; a shift of one pixel gives 30
        for plane, (r, c), colour in zip(row["lr_raw"], ((0, 0), (0, 1), (1, 0), (1, 1)), (0, 1, 1, 2), strict=True):
            light = (plane.astype(float) - row["black_level"][0]) / (row["white_level"] - row["black_level"][0])
            assert np.abs((light * WB[colour]).clip(0) ** (1 / 2.2) * 255 - shown[colour, r::2, c::2]).max() < 3


def write_cropped(path, picture, focal_mm, active, origin, size, monkeypatch):
    """A DNG whose tags declare a crop that is not centred in the visible area."""
    plain = dng._mosaic_ifd

    def with_crop(*arguments, **options):
        ifd = plain(*arguments, **options)
        ifd.set(50829, tiff.LONG, *active)  # ActiveArea: top, left, bottom, right
        ifd.set(50719, tiff.LONG, *origin)  # DefaultCropOrigin: x, y in it
        ifd.set(50720, tiff.LONG, *size)
        return ifd

    with monkeypatch.context() as patch:
        patch.setattr(dng, "_mosaic_ifd", with_crop)
        dng.write_dng(path, to_mosaic(picture), wb=WB, shot=dng.ShotTags(focal_mm=focal_mm))


def test_the_jpg_is_located_by_the_crop_in_the_tags(tmp_path, monkeypatch):
    active, (left, top), (width, height) = (8, 12, 256, 384), (14, 2), (352, 240)
    lr = Scene(5).view(frame_to_scene(4.8, SIZE), SIZE)
    write_cropped(tmp_path / "lr.dng", lr, 50, active, (left, top), (width, height), monkeypatch)
    image = decode.load(tmp_path / "lr.dng")
    assert image.visible_size == (248, 372) and image.camera_crop == (top, left, height, width)
    jpg = to_8_bit(lr)[8 + top : 8 + top + height, 12 + left : 12 + left + width]
    rows = tiles.cut_tiles(image, tiles.Jpg(jpg, None), tiles.Jpg(jpg, None), 1.0, tiles.Cutting(1, 24, 64, ecc=False))
    for row in rows:
        shown = ((row["lr_raw"][1].astype(float) - 512) / (16383 - 512)).clip(0) ** (1 / 2.2) * 255
        assert np.abs(shown - row["lr_rgb"][1, ::2, 1::2]).max() <= 2
    assert image.camera_crop[2:] == decode.render(tmp_path / "lr.dng").shape[:2]


@pytest.mark.parametrize("missing", [("00002",), ("00001",), ("00001", "00002")])
def test_a_rendering_can_replace_a_missing_jpg(tmp_path, missing):
    sequence = write_sequence(tmp_path / "raw" / "00001", seed=6, focals_mm=(240, 50), cfa="GBRG")
    whole, _ = rows_of(tmp_path / "raw")
    for stem in missing:
        (sequence / f"{stem}.JPG").unlink()
    refused, plan = rows_of(tmp_path / "raw")
    assert refused == {} and {fault.pair for fault in plan.faults} >= set(missing)
    assert "use --missing-jpg render" in plan.faults[0].reason

    rows, plan = rows_of(tmp_path / "raw", missing_jpg="render")
    assert plan.faults == []
    pairs = zip(rows["00002-00001"], whole["00002-00001"], strict=True)
    for row, before in pairs:
        assert (row["lr_source"], row["hr_source"]) == tuple(
            "rendering" if stem in missing else "camera" for stem in ("00002", "00001")
        )
        assert np.array_equal(row["lr_to_hr"], before["lr_to_hr"]) and np.array_equal(row["lr_raw"], before["lr_raw"])
        assert row["align_score"] > 0.9 and row["residual_px"] < 0.3
        for name, stem in (("lr_rgb", "00002"), ("hr_rgb", "00001")):
            alike = np.corrcoef(row[name].ravel(), before[name].ravel())[0, 1]
            assert alike > 0.9 if stem in missing else np.array_equal(row[name], before[name])
        if "00002" in missing:
            assert np.array_equal(row["lr_rgb"], row["lr_render"]) and np.isnan(row["jpg_scale"])


def test_missing_jpg_is_part_of_the_fingerprint(tmp_path):
    write_sequence(tmp_path / "00001", focals_mm=(240, 50))
    jobs = [
        make_plan(open_folder(str(tmp_path)), PreprocessOptions(**OPTIONS, missing_jpg=m), {}).jobs[0]
        for m in ("quarantine", "render")
    ]
    assert jobs[0].fingerprint != jobs[1].fingerprint


def test_shards_of_an_older_schema_are_refused(tmp_path):
    folder = open_folder(str(tmp_path))
    options = PreprocessOptions(**OPTIONS)
    folder.put("_dataset.json", json.dumps({"schema_version": 1, "options": options.shard_options}).encode())
    with pytest.raises(PreprocessError, match=r"expected schema version 2, got 1; preprocess into another"):
        Ledger.read(folder, options)


def test_a_pair_without_rendering_is_quarantined(tmp_path):
    sequence = write_sequence(tmp_path / "raw" / "00001", focals_mm=(240, 50))
    (sequence / "00001.JPG").unlink()
    half = to_mosaic(Scene(0).view(frame_to_scene(1, SIZE), SIZE))
    half[SIZE[0] // 2 :] = 0
    dng.write_dng(sequence / "00001.dng", half, shot=dng.ShotTags(focal_mm=240))
    source, target = open_folder(str(tmp_path / "raw")), open_folder(str(tmp_path / "shards"))
    options = PreprocessOptions(**OPTIONS, missing_jpg="render")
    plan = make_plan(source, options, {})
    result = process(plan.jobs[0], source, target, options)
    assert result.status == "quarantined" and "00001/00001.dng: expected 256 rows of data, got 128" in result.reason


def test_adobe_rgb_jpgs_become_srgb(tmp_path):
    """The same pixels, but EXIF says Adobe RGB: they are converted, said, and the pair is made again."""
    sequence = write_sequence(tmp_path / "raw" / "00001", seed=6, focals_mm=(240, 50))
    plain, before = rows_of(tmp_path / "raw")
    for stem in ("00001", "00002"):
        with Image.open(sequence / f"{stem}.JPG") as picture:
            exif = picture.getexif()
            exif.get_ifd(0x8769)[0xA001] = 65535
            picture.save(sequence / f"{stem}.JPG", quality=97, subsampling=0, exif=exif)
    converted, after = rows_of(tmp_path / "raw")
    assert before.jobs[0].fingerprint != after.jobs[0].fingerprint
    for name in ("lr_rgb", "hr_rgb"):
        found, old = (rows["00002-00001"][0][name].astype(int) for rows in (converted, plain))
        expected = ADOBE_RGB.to_srgb(plain["00002-00001"][0][name].transpose(1, 2, 0)).transpose(2, 0, 1).astype(int)
        assert np.abs(found - expected).mean() < 2 < np.abs(found - old).mean()
    source, target = open_folder(str(tmp_path / "raw")), open_folder(str(tmp_path / "shards"))
    result = process(after.jobs[0], source, target, PreprocessOptions(**OPTIONS))
    assert result.notes == "camera JPG: colours converted from Adobe RGB to sRGB"


def test_a_pair_of_two_scenes_is_quarantined(tmp_path):
    """Another scene's JPG gets into the folder: the pair is set aside with its score, or kept and flagged."""
    sequence = write_sequence(tmp_path / "raw" / "00001", focals_mm=(240, 50))
    other = write_sequence(tmp_path / "other", seed=9, focals_mm=(240, 50))
    (sequence / "00001.JPG").write_bytes((other / "00001.JPG").read_bytes())
    source, target = open_folder(str(tmp_path / "raw")), open_folder(str(tmp_path / "shards"))
    options = PreprocessOptions(**OPTIONS)
    job = make_plan(source, options, {}).jobs[0]
    result = process(job, source, target, options)
    assert (result.status, result.aligned_by) == ("quarantined", "unaligned")
    assert "00002.JPG and 00001/00001.JPG: expected two pictures of one scene, got a correlation of" in result.reason
    kept = process(job, source, target, replace(options, keep_unaligned=True))
    assert (kept.status, kept.aligned_by) == ("written", "unaligned")


@pytest.mark.parametrize(
    ("scale", "pairs"),
    [
        (2, {"00003-00001", "00004-00002", "00005-00003", "00006-00004", "00007-00005"}),
        (3, {"00004-00001", "00005-00002"}),
        (5, {"00007-00002"}),
        (8, {"00007-00001"}),
    ],
)
def test_every_scale_finds_its_pairs(tmp_path, scale, pairs):
    write_sequence(tmp_path / "00001", seed=7)
    rows, _ = rows_of(tmp_path, scale=scale, tile_px=12, stride_px=12)
    assert set(rows) >= pairs
    for tile in (tiles_of_pair[0] for tiles_of_pair in rows.values()):
        assert tile["hr_rgb"].shape == (3, 24 * scale, 24 * scale) and tile["scale"] == scale
        assert tile["align_score"] > 0.9


def test_exposure_ratio_is_read_from_tags(tmp_path):
    write_sequence(tmp_path / "00001", focals_mm=(240, 50))
    for name, exposure in (("00001", (0.004, 400, 8.0)), ("00002", (0.01, 100, 5.6))):
        path = tmp_path / "00001" / f"{name}.JPG"
        pixels = tiles.decode_jpg(path.read_bytes(), name).pixels_HWC
        path.write_bytes(jpg_bytes(pixels, {"00001": 240, "00002": 50}[name], exposure=exposure))
        light = to_mosaic(pixels / 255)
        seconds, iso, f_number = exposure
        dng.write_dng(path.with_suffix(".dng"), light, wb=WB, shot=dng.ShotTags(50, iso, seconds, f_number))
    row = rows_of(tmp_path)[0]["00002-00001"][0]
    assert (row["f_number_lr"], row["f_number_hr"]) == (pytest.approx(5.6), 8)
    assert row["exposure_ratio_exif"] == pytest.approx(0.4 * 4 * (5.6 / 8) ** 2)
