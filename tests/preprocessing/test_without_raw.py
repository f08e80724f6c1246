"""Sequences of pictures without RAW: which files make a pair, how they are read, and what the shards hold."""

import io

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from known_scene import Scene, frame_to_scene, jpg_bytes, to_8_bit
from PIL import Image

from preprocessing.frames import File, Frame, Shot
from preprocessing.ledger import Ledger
from preprocessing.pairs import pair_rows, process
from preprocessing.plan import PreprocessError, PreprocessOptions, make_plan
from preprocessing.raw.exif import Exif
from preprocessing.report.inspect import inspect
from preprocessing.schema import decode, read_info
from preprocessing.storage import open_folder
from preprocessing.tiles import TileError
from preprocessing.without_raw.names import Named, read_name
from preprocessing.without_raw.pairing import UnpairedError, pair_pictures
from preprocessing.without_raw.picture_tiles import RAW_COLUMNS, read_colour

SIZE = (288, 384)
OPTIONS = PreprocessOptions(scale=2, align="ecc", tile_px=24, stride_px=24, pictures=True)


def views(zoom, seed=0, shift_px=(0, 0)):
    """(short, long) uint8 pictures of SIZE of one scene."""
    scene = Scene(seed)
    return [
        to_8_bit(scene.view(frame_to_scene(reduction, SIZE, shift), SIZE))
        for reduction, shift in ((zoom, shift_px), (1, (0, 0)))
    ]


def png(pixels, **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", **options)
    return out.getvalue()


def with_focal(focal_mm, more=None):
    exif = Image.Exif()
    exif[0x0110] = "camera"  # without a first tag Pillow writes none
    exif.get_ifd(0x8769).update({0x920A: float(focal_mm), **(more or {})})
    exif[0x8769] = 0  # without an entry Pillow writes no directory into a TIFF
    return exif


def write(folder, **files):
    """Write NAME=bytes; "__" in a name stands for the dot of its suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)


def plan_of(folder, **options):
    return make_plan(open_folder(str(folder)), PreprocessOptions(**{"scale": 2, **options}), {})


def rows_of(folder, options=OPTIONS):
    [job] = make_plan(open_folder(str(folder)), options, {}).jobs
    return pair_rows(open_folder(str(folder)), job, options)


def shot(name, focal_mm=None):
    return Shot(Frame(name.partition(".")[0], (), (File(name, 1),)), Exif(focal_mm=focal_mm))


def paired(*shots, scale=2, zoom=None):
    return [(lr.frame.stem, hr.frame.stem, round(found, 3)) for lr, hr, found in pair_pictures(shots, scale, zoom)]


@pytest.mark.parametrize(
    ("stem", "said"),
    [
        ("002H", Named("002", "long")),
        ("002L", Named("002", "short")),
        ("Canon_001_HR", Named("Canon_001", "long")),
        ("Canon_001_LR4", Named("Canon_001", "short")),
        ("DSC_1282_x1", Named("DSC_1282", "long")),
        ("DSC_1282_x4", Named("DSC_1282", "short")),
        ("yard-tele", Named("yard", "long")),
        ("wide", Named("", "short")),
        ("yard_77mm", Named("yard", None, 77.0)),
        ("IMG_0042", Named("IMG_0042")),
        ("beach", Named("beach")),
        ("small", Named("small")),
    ],
)
def test_names_say_scene_role_and_focal_length(stem, said):
    assert read_name(stem) == said


def test_focal_lengths_pair_like_those_of_raw():
    shots = [shot("a.jpg", 24), shot("b.jpg", 50), shot("c.jpg", 100), shot("d.jpg", 77)]
    assert paired(*shots) == [("a", "b", 2.083), ("b", "c", 2.0), ("b", "d", 1.54)]
    with pytest.raises(UnpairedError, match=r"focal ratio of 3.1 to 5.2, got focal lengths 26, 77 mm; use another"):
        paired(shot("a.jpg", 26), shot("b.jpg", 77), scale=4)
    assert paired(shot("a_26mm.jpg"), shot("a_77mm.png"), scale=3) == [("a_26mm", "a_77mm", 2.962)]


def test_names_decide_where_exif_is_silent():
    assert paired(shot("2H.png"), shot("2L.png", 28), zoom=2.9) == [("2L", "2H", 2.9)]
    with pytest.raises(UnpairedError, match=r"2H.png, 2L.png: expected focal lengths in EXIF or --zoom, got neither"):
        paired(shot("2H.png"), shot("2L.png"))
    for names in (("a.png", "b.png"), ("1H.png", "2H.png"), ("1H.png", "1L.png", "2L.png")):
        with pytest.raises(UnpairedError, match=rf"_H and _L.*got {', '.join(names)}; rename the files"):
            paired(*map(shot, names), zoom=2.9)
    with pytest.raises(UnpairedError, match=r"at least two pictures of the scene, got 2H.png"):
        paired(shot("2H.png"), zoom=2.9)


@pytest.mark.parametrize("zoom", [1.0, 40, float("nan")])
def test_a_zoom_that_is_none_is_refused(zoom):
    with pytest.raises(PreprocessError, match=r"^--zoom: expected a number from 1.1 to 32, got"):
        PreprocessOptions(zoom=zoom)


def test_a_folder_of_many_scenes_is_split_by_names(tmp_path):
    for name in (
        "002H.PNG",
        "002L.PNG",
        "004H.PNG",
        "004L.PNG",
        "train/9_HR.png",
        "train/9_LR3.png",
        "val/5/b_tele.tif",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in ("train/8_HR.png", "train/8_LR3.png", "val/5/b_wide.tif", "LICENSE"):
        (tmp_path / name).write_bytes(b"")
    plan = plan_of(tmp_path, zoom=2.9)
    assert sorted((job.sequence, job.pair, job.split) for job in plan.jobs if job.sequence in "58") == [
        ("5", "b_wide-b_tele", "val"),
        ("8", "8_LR3-8_HR", "train"),
    ]
    assert plan.sequences == {"002", "004", "5", "8", "9"} and not plan.faults


def test_raw_anywhere_means_that_pictures_are_no_frames(tmp_path):
    write(tmp_path / "1", a__ARW=b"", a__JPG=b"", b__PNG=b"")
    write(tmp_path / "2", aH__PNG=b"", aL__PNG=b"")
    plan = plan_of(tmp_path, zoom=2.9)
    assert not plan.jobs and plan.sequences == {"1"}


def test_two_fields_of_view_are_registered(tmp_path):
    short, long = views(2.0, shift_px=(6, -4))
    write(tmp_path / "1", a__jpg=jpg_bytes(short, 26), b__jpg=jpg_bytes(long, 52))
    rows = rows_of(tmp_path)
    row = rows[0]
    assert row["aligned_by"] == "ecc" and row["camera"] == "SONY ILCE-7SM2"
    assert all(row[name] is None for name in RAW_COLUMNS) and row["look_curve"] is None
    assert row["focal_lr_mm"] == 26 and row["iso_lr"] == 100 and row["exposure_ratio"] == pytest.approx(1, abs=0.06)
    assert np.median([row["residual_px"] for row in rows]) < 0.3
    a, _, c, _, e, f = row["lr_to_hr"]  # the short frame is shifted by (6, -4) long pixels about the centre
    assert (a, e) == pytest.approx((2, 2), abs=0.01)
    centre = (a * SIZE[1] / 2 + c - SIZE[1] / 2, e * SIZE[0] / 2 + f - SIZE[0] / 2)
    assert centre == pytest.approx((6, -4), abs=1.5)
    low = cv2.resize(row["hr_rgb"].transpose(1, 2, 0), (48, 48), interpolation=cv2.INTER_AREA)
    assert np.abs(low.astype(int) - row["lr_rgb"].transpose(1, 2, 0)).mean() < 8


def test_one_view_on_one_grid_is_reduced_to_the_scale(tmp_path):
    """City100's form: the short picture lies on the long one's grid, and holds 1/2.9 of its detail."""
    long = views(1.0)[1]
    blurred = cv2.resize(
        cv2.resize(long, (132, 99), interpolation=cv2.INTER_AREA), SIZE[::-1], interpolation=cv2.INTER_CUBIC
    )
    write(tmp_path, **{"002H__PNG": png(long), "002L__PNG": png(blurred), "004H__PNG": png(long)})
    write(tmp_path, **{"004L__PNG": png(blurred)})
    source = open_folder(str(tmp_path))
    options = PreprocessOptions(scale=3, align="scale", tile_px=24, stride_px=24, zoom=2.9, pictures=True)
    rows = pair_rows(source, make_plan(source, options, {}).jobs[0], options)
    assert rows[0]["lr_to_hr"] == pytest.approx([3, 0, 0, 0, 3, 0], abs=1e-6)
    assert (rows[-1]["row"] + 24, rows[-1]["col"] + 24) == (48, 64)  # all of the picture
    assert np.array_equal(rows[0]["hr_rgb"], long[:144, :144].transpose(2, 0, 1))
    assert rows[0]["focal_lr_mm"] is None and max(row["residual_px"] for row in rows) < 0.3


def test_a_zoom_that_the_scale_cannot_use_is_one_line(tmp_path):
    short, long = views(2.9)
    write(tmp_path / "1", **{"1_wide__png": png(short), "1_tele__png": png(long)})
    with pytest.raises(
        TileError, match=r"--scale: expected about the pictures' ratio of detail, 2.9, got 2; use --scale 3"
    ):
        rows_of(tmp_path, PreprocessOptions(scale=2, tile_px=24, stride_px=24, zoom=2.9, pictures=True))


def test_pictures_of_two_scenes_are_set_aside(tmp_path):
    write(tmp_path / "raw" / "1", a__jpg=jpg_bytes(views(2)[0], 26), b__jpg=jpg_bytes(views(2, seed=7)[1], 52))
    source, target = open_folder(str(tmp_path / "raw")), open_folder(str(tmp_path / "shards"))
    [job] = make_plan(source, OPTIONS, {}).jobs
    result = process(job, source, target, OPTIONS)
    assert (result.status, result.aligned_by) == ("quarantined", "unaligned")
    assert result.reason.startswith("1/a.jpg and 1/b.jpg: expected two pictures of one scene")


def test_pictures_are_turned_and_converted():
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15] = (200, 60, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_colour(png(pixels, exif=exif), "x.png")
    assert turned.size == (30, 20) and tuple(turned.pixels_HWC[0, 0]) == (200, 60, 60)
    adobe = read_colour(png(pixels, exif=with_focal(26, {0xA001: 2})), "x.png")
    assert adobe.notes == ("colours converted from Adobe RGB to sRGB",) and adobe.pixels_HWC[0, 0, 0] > 215


def test_16_bits_are_rounded_to_8():
    values = np.linspace(0, 65535, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint16)
    for suffix in (".png", ".tiff"):
        data = cv2.imencode(suffix, values)[1].tobytes()
        found = read_colour(data, f"x{suffix}")
        assert np.abs(found.pixels_HWC[..., ::-1] - values / 257).max() <= 0.5
        assert found.notes == ("16 bits per sample rounded to 8",)


def test_grey_and_cmyk_are_refused_in_words():
    out = io.BytesIO()
    Image.new("CMYK", (32, 32)).save(out, "JPEG")
    with pytest.raises(TileError, match=r"^a/b.jpg: expected .*, got CMYK; export it as sRGB$"):
        read_colour(out.getvalue(), "a/b.jpg")
    for pixels in (np.zeros((32, 32), np.uint8), np.zeros((32, 32), np.uint16)):
        with pytest.raises(
            TileError, match=r"^a/b.png: expected a colour picture, got a grey one; export it as RGB or"
        ):
            read_colour(cv2.imencode(".png", pixels)[1].tobytes(), "a/b.png")


def test_tags_of_png_and_tiff_are_read(tmp_path):
    short, long = views(2.0)
    out = io.BytesIO()
    Image.fromarray(long).save(out, "TIFF", exif=with_focal(52, {0x8827: 400}))
    write(tmp_path / "1", a__png=png(short, exif=with_focal(26)), b__tiff=out.getvalue())
    [job] = plan_of(tmp_path).jobs
    assert (job.lr, job.hr, job.zoom, job.pixels) == ("a", "b", 2.0, SIZE[0] * SIZE[1])
    assert job.hr_exif.iso == 400


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """SHARDS of two pairs, one with focal lengths and one whose names decide."""
    root = tmp_path_factory.mktemp("pictures")
    short, long = views(2.0)
    write(root / "raw" / "1", a__jpg=jpg_bytes(short, 26), b__jpg=jpg_bytes(long, 52))
    write(root / "raw" / "2", **{"2L__png": png(short), "2H__png": png(long)})
    source, target = open_folder(str(root / "raw")), open_folder(str(root / "shards"))
    options = PreprocessOptions(scale=2, align="ecc", tile_px=24, stride_px=24, zoom=2, pictures=True)
    plan = make_plan(source, options, {})
    Ledger.read(target, options).prepare(plan, options)
    assert [process(job, source, target, options).status for job in plan.jobs] == ["written"] * 2
    return root / "shards"


def test_shards_say_that_they_have_no_raw(shards):
    info = read_info(str(shards))
    assert not info.has_raw and info.rendering_curve == "srgb"
    paths = sorted(shards.glob("split=*/*.parquet"))
    row = decode(pq.ParquetFile(paths[0]).read_row_group(0).to_pylist()[0], info)
    assert row["lr_raw"] is None and row["lr_render"] is None and np.isnan(row["white_level"])
    assert row["lr_rgb"].shape == (3, 48, 48) and row["hr_rgb"].shape == (3, 96, 96)


def test_shards_with_and_without_raw_do_not_mix(shards):
    target = open_folder(str(shards))
    with pytest.raises(PreprocessError, match=r"expected the options of its shards, raw=none, got raw=files"):
        Ledger.read(target, PreprocessOptions(scale=2, align="ecc", tile_px=24, stride_px=24))
    assert Ledger.read(target, OPTIONS).zoom == 2


def test_the_report_shows_pairs_without_focal_lengths(shards):
    page = inspect(str(shards))
    assert "pictures without RAW" in page and "52 / 26 mm" in page and "unknown" in page
