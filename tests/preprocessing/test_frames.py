"""Sequences are found in SR-RAW's layout; frames are paired by focal ratio; tags are read."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from known_scene import jpg_bytes, write_sequence
from mutants import entries, with_field
from PIL import Image

from preprocessing.frames import (
    KNOWN_BAD,
    MAX_ZOOM_EXCESS,
    File,
    Frame,
    Shot,
    discover,
    is_excluded,
    pair,
    ratio,
    read_exclusions,
)
from preprocessing.ledger import Ledger
from preprocessing.plan import Plan, PreprocessError, PreprocessOptions, _read_tags, make_plan
from preprocessing.raw.dng import ShotTags, write_dng
from preprocessing.raw.exif import Exif, camera_name, read_exif
from preprocessing.shards import preprocess
from preprocessing.storage import open_folder


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


def shot(stem, focal_mm, *, raw=True, jpg=True):
    raws = (File(f"{stem}.ARW", 1),) if raw else ()
    jpgs = (File(f"{stem}.JPG", 1),) if jpg else ()
    return Shot(Frame(stem, raws, jpgs), Exif(focal_mm=focal_mm))


def names(pairs):
    return [f"{lr.frame.stem}-{hr.frame.stem}" for lr, hr in pairs]


def test_discover_finds_any_suffix_case_and_ignores_other_files(tmp_path):
    touch(
        tmp_path,
        *("00001/00001.ARW", "00001/00001.JPG", "00001/00002.dng", "00001/00002.jpeg", "00001/tform.txt"),
        *("00001/._00001.JPG", "00001/truth/00001.npz", "00001/truth/00009.JPG", "00001/cropped/00001.JPG"),
        *(
            "train/00002/00001.nef",
            "train/00002/00001.jpg",
            "test/00003/00001.CR2",
            "val/00004/a.JPG",
            "notes/list.txt",
        ),
    )
    found = {sequence.name: sequence for sequence in discover(open_folder(str(tmp_path)))}
    assert {name: sequence.split for name, sequence in found.items()} == {
        "00001": None,
        "00002": "train",
        "00003": "test",
        "00004": "val",
    }
    first = found["00001"]
    assert [frame.stem for frame in first.frames] == ["00001", "00002"]
    assert [file.name for frame in first.frames for file in frame.raws + frame.jpgs] == [
        "00001.ARW",
        "00001.JPG",
        "00002.dng",
        "00002.jpeg",
    ]
    assert {file.name for file in first.truth} == {"00001.npz", "00009.JPG"}


def test_names_that_are_not_utf_8_are_set_aside_by_name(tmp_path):
    """The byte 0xDF is Latin-1's sharp s; cameras and old archives leave such names."""
    write_sequence(tmp_path / "00001", focals_mm=(240, 50))
    root = os.fsencode(tmp_path)
    for name in (b"00001/Stra\xdfe.dng", b"00001/Stra\xdfe.JPG", b"00001/notes\xdf.txt", b"Fl\xfc\xdfe/1.JPG"):
        path = Path(os.fsdecode(root + b"/" + name))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    plan = make_plan(open_folder(str(tmp_path)), PreprocessOptions(), {})
    assert [job.pair for job in plan.jobs] == ["00002-00001"]
    assert [(fault.sequence, fault.pair) for fault in plan.faults] == [
        ("00001", r"Stra\xdfe.JPG"),
        ("00001", r"Stra\xdfe.dng"),
        (r"Fl\xfc\xdfe", "1.JPG"),
    ]
    assert r"00001/Stra\xdfe.JPG: expected a name in UTF-8, got other bytes; rename" in plan.faults[0].reason
    target = open_folder(str(tmp_path / "shards"))
    ledger = Ledger.read(target, PreprocessOptions())
    ledger.update_quarantine(plan.faults, plan)
    again = Ledger.read(target, PreprocessOptions())
    assert {note["pair"] for note in again.quarantine.values()} == {fault.pair for fault in plan.faults}
    again.update_quarantine([], Plan(sequences=plan.sequences))  # they have been renamed
    assert Ledger.read(target, PreprocessOptions()).quarantine == {}


def test_folders_that_are_not_utf_8_are_refused_in_one_line(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/Stra\xdfe")
    for verb in (
        lambda: preprocess(folder, str(tmp_path / "shards"), PreprocessOptions()),
        lambda: preprocess(str(tmp_path), folder, PreprocessOptions()),
    ):
        with pytest.raises(
            PreprocessError, match=r"Stra\\xdfe: expected a path in UTF-8, got other bytes; rename the f"
        ):
            verb()
    (tmp_path / "raw").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/raw/\xdf.JPG")).write_bytes(b"x")
    with pytest.raises(PreprocessError, match=r"got 1 files whose names are not UTF-8, e.g. \\xdf.JPG"):
        make_plan(open_folder(str(tmp_path / "raw")), PreprocessOptions(), {})


def test_discover_accepts_a_single_sequence_folder(tmp_path):
    touch(tmp_path, "00134/00001.ARW", "00134/00001.JPG")
    (found,) = discover(open_folder(str(tmp_path / "00134")))
    assert (found.name, found.folder, found.frames[0].raws[0].path) == ("00134", "", "00001.ARW")
    assert discover(open_folder(str(tmp_path / "absent"))) == []


def ratio_of(lr, hr):
    """The focal ratio of two frames given as (FocalLength, FocalLengthIn35mmFilm, LensModel)."""
    shots = [
        Shot(Frame(name, (), ()), Exif(focal_mm=focal, focal_35mm=full, lens=lens))
        for name, (focal, full, lens) in (("lr", lr), ("hr", hr))
    ]
    return ratio(*shots)


@pytest.mark.parametrize(
    ("lr", "hr", "expected"),
    [
        ((4.25, 26, None), (6.0, 52, None), 2.0),  # a phone's two cameras
        ((6.86, 24, "back 6.86mm f/1.78"), (9.0, 77, "back 9mm f/2.8"), 77 / 24),
        ((6.86, 24, "back 6.86mm f/1.78"), (6.86, 48, "back 6.86mm f/1.78"), 2.0),  # digital zoom
        ((24, 24, "FE 24-240mm"), (100, 100, "FE 24-240mm"), 100 / 24),
        ((16, 24, "E 16-50mm"), (70.0, 105, "E 55-210mm"), 70 / 16),  # two lenses, one sensor
        ((4.5, 24, None), (18.0, 97, None), 4.0),  # rounded to whole mm
        ((50, None, None), (200, 310, None), 4.0),
    ],
)
def test_35_mm_equivalents_relate_frames_of_two_sensors(lr, hr, expected):
    assert ratio_of(lr, hr) == pytest.approx(expected)


def test_35_mm_equivalent_and_lens_are_read():
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0x920A: 6.0, 0xA405: 52, 0xA434: "back camera 6mm f/2"})
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG", exif=exif)
    found = read_exif(out.getvalue())
    assert (found.focal_mm, found.focal_35mm, found.lens) == (6, 52, "back camera 6mm f/2")


def big_dng(folder):
    """A DNG of 1.3 MB with a focal length of 50 mm, taken at ISO 400."""
    mosaic = np.full((800, 800), 3000, np.uint16)
    write_dng(folder / "x.dng", mosaic, shot=ShotTags(focal_mm=50, iso=400))
    return (folder / "x.dng").read_bytes()


def tags_behind_the_picture(data):
    """The file with its EXIF directory moved to the end."""
    [pointer] = [entry for entry in entries(data) if entry.tag == 34665]
    length = 2 + 12 * int.from_bytes(data[pointer.value : pointer.value + 2], "little") + 4
    directory = data[pointer.value : pointer.value + length]
    moved = with_field(data, pointer.at + 8, "<I", len(data)) + directory
    return moved[: pointer.value] + bytes(length) + moved[pointer.value + length :]


@pytest.mark.parametrize("jpg", [False, True])
@pytest.mark.parametrize("form", ["behind the picture", "only LibRaw", "damaged"])
def test_focal_lengths_are_found_anywhere_in_a_raw(tmp_path, form, jpg):
    """Beyond the first megabyte; and, as for CRW, CR3, RAF and MRW, where only LibRaw knows the format."""
    data = big_dng(tmp_path)
    data = {
        "behind the picture": lambda: tags_behind_the_picture(data),
        "only LibRaw": lambda: data[:2] + b"RO" + data[4:],  # Olympus's magic number: no TIFF reader takes it
        "damaged": lambda: b"x" * len(data),
    }[form]()
    (tmp_path / "raw" / "1").mkdir(parents=True)
    (tmp_path / "raw" / "1" / "a.dng").write_bytes(data)
    if jpg:
        (tmp_path / "raw" / "1" / "a.JPG").write_bytes(jpg_bytes(np.zeros((8, 8, 3), np.uint8)))
    folder = open_folder(str(tmp_path / "raw"))
    [sequence] = discover(folder)
    found = _read_tags(folder, sequence.frames[0], {}).exif
    assert (found.focal_mm, found.iso) == ((None, None) if form == "damaged" else (50, 400))


def test_srraw_pairs_at_4x_and_8x():
    shots = [shot(f"{number:05d}", focal) for number, focal in enumerate((240, 150, 100, 70, 50, 35, 24), 1)]
    assert names(pair(shots, 4)) == ["00005-00001", "00006-00002", "00007-00003"]
    assert names(pair(shots, 8)) == ["00007-00001"]
    assert names(pair(reversed(shots[:6]), 4)) == ["00005-00001", "00006-00002"]


def test_pairs_use_the_smallest_ratio_within_the_limits():
    assert names(pair([shot("a", 100), shot("b", 25), shot("c", 24), shot("d", 26)], 4)) == ["b-a"]
    assert names(pair([shot("a", 100), shot("b", 19.3)], 4)) == ["b-a"]  # 5.18 = 1.295 x 4
    assert names(pair([shot("a", 100), shot("b", 19.0)], 4)) == []  # 5.26
    assert names(pair([shot("a", 100), shot("b", 25.1)], 4)) == []  # 3.98
    assert names(pair([shot("a", 0.3), shot("b", 0.1)], 3)) == ["b-a"]  # 2.9999999999999996 is 3


def test_equal_focal_lengths_share_the_first_lr_frame():
    shots = [shot("1", 240), shot("2", 240), shot("3", 50), shot("4", 50)]
    assert names(pair(shots, 4)) == ["3-1", "3-2"]
    assert names(pair([shot("1", 50), shot("2", 50)], 4)) == []


def test_frames_without_raw_jpg_or_focal_length_make_no_pair():
    assert names(pair([shot("1", 240), shot("2", 50, raw=False), shot("3", 49)], 4)) == ["3-1"]
    assert names(pair([shot("1", 240, raw=False), shot("2", 50)], 4)) == ["2-1"]  # the target is the JPG
    assert names(pair([shot("1", 240, jpg=False), shot("2", 50)], 4)) == []
    assert names(pair([shot("1", 240), shot("2", None), shot("3", 50, jpg=False)], 4)) == []


def test_exclusions_name_frames_or_sequences(tmp_path):
    assert is_excluded("00350", "00001", KNOWN_BAD) and not is_excluded("00350", "00004", KNOWN_BAD)
    (tmp_path / "bad.txt").write_text("# blurred\n00012/00003.JPG\n00007  # all of it\n\n00009/a.b\n")
    excluded = read_exclusions(tmp_path / "bad.txt")
    assert excluded == ("00012/00003", "00007", "00009/a.b")
    assert is_excluded("00007", "anything", excluded) and not is_excluded("00012", "00001", excluded)
    (tmp_path / "wrong.txt").write_text("x/y/z\n")
    with pytest.raises(ValueError, match=r"line 1: expected SEQUENCE or SEQUENCE/FRAME .*, got 'x/y/z'"):
        read_exclusions(tmp_path / "wrong.txt")


def test_tags_are_read_from_the_first_bytes():
    data = jpg_bytes(np.zeros((64, 64, 3), np.uint8), focal_mm=35.5, orientation=6)
    exif = read_exif(data[:2000])
    assert (exif.focal_mm, exif.orientation, exif.iso, exif.camera) == (35.5, 6, 100, "SONY ILCE-7SM2")
    assert read_exif(jpg_bytes(np.zeros((8, 8, 3), np.uint8))).focal_mm is None


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xe1\xff\xff", b"II*\x00\xff\xff\xff\xff", b"MM\x00*", b"x" * 99]
)
def test_damaged_tags_read_as_missing(data):
    assert read_exif(data) == Exif()


def test_a_camera_name_has_the_make_once():
    assert camera_name("NIKON", "NIKON D810") == "NIKON D810"
    assert camera_name("SONY", "ILCE-7SM2\x00") == "SONY ILCE-7SM2"
    assert camera_name(None, "") is None


def test_unpaired_frames_get_a_reason(tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8)
    touch(tmp_path, "1/a.ARW", "1/b.ARW", "1/c.ARW")
    for name, focal_mm in (("a.JPG", 100), ("b.JPG", 90), ("b.jpeg", 90), ("c.jpg", 80)):
        (tmp_path / "1" / name).write_bytes(jpg_bytes(picture, focal_mm))
    plan = make_plan(open_folder(str(tmp_path)), PreprocessOptions(), {})
    reasons = {fault.pair: fault.reason for fault in plan.faults}
    assert reasons["b"] == "expected one JPG file, got b.JPG, b.jpeg; keep one"
    expected = f"a focal ratio of 4 to {4 * MAX_ZOOM_EXCESS:g}, got focal lengths 80, 90, 100 mm; use another --scale"
    assert reasons["-"].endswith(expected) and not plan.jobs
