"""Which photographs a folder's zoom finds, what their outputs are called, and which outputs count as whole."""

import json
import os
from pathlib import Path

import pytest

from pipelines.zoom_folder.places import open_place
from pipelines.zoom_folder.plan import OPTIONS, make_plan, open_sources, options_of, output_names
from pipelines.zooming.request import Output, ZoomError, check_batch, is_batch

MODELS = {"model": "a" * 64, "model for pictures": "b" * 64}


def planned(out, *inputs, output=None, models=MODELS, takes_raw=True):
    target, output = open_place(str(out)), output or Output()
    options = options_of(output, models, scale=4, strength=1.0)
    sources = open_sources([str(one) for one in inputs], target)
    return make_plan(sources, target, output, scale=4, takes_raw=takes_raw, options=options)


def finish(plan, out, data=b"a zoomed picture"):
    """What a worker leaves of each photograph."""
    target = open_place(str(out))
    for job in plan.todo:
        target.write(job.output, data)
        target.write(job.record(len(data)), b"")


@pytest.fixture
def folder(tmp_path):
    """in/a.jpg, in/deep/er/b.dng, in/deep/er/b.jpg, and files that are no photographs."""
    for name in ("a.jpg", "deep/er/b.dng", "deep/er/b.jpg", "notes.txt", ".hidden.jpg", ".cache/c.jpg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"is not read")
    return tmp_path / "in"


def test_names_and_folders_are_kept(folder, tmp_path):
    plan = planned(tmp_path / "out", folder)
    assert [job.output for job in plan.todo] == ["a_4x.png", "deep/er/b_4x.png"]
    assert [job.label for job in plan.todo] == [f"{folder}/a.jpg", f"{folder}/deep/er/b.dng"]
    assert plan.notes == ["1 photographs are there as RAW and as JPG: only the RAW is zoomed"]
    assert [job.output for job in planned(tmp_path / "jpg", folder, takes_raw=False).todo] == [
        "a_4x.png",
        "deep/er/b_4x.png",
    ]


def test_several_folders_keep_their_names(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jpg").write_bytes(b"")
    plan = planned(tmp_path / "out", folder, tmp_path / "other", folder / "deep" / "er" / "b.jpg")
    assert [job.output for job in plan.todo] == ["b_4x.png", "in/a_4x.png", "in/deep/er/b_4x.png", "other/a_4x.png"]
    (tmp_path / "more" / "in").mkdir(parents=True)
    with pytest.raises(ZoomError, match="expected folders of different names, got two in"):
        planned(tmp_path / "out2", folder, tmp_path / "more" / "in")
    with pytest.raises(ZoomError, match=r"a.jpg: expected a unique file name, got that of"):
        planned(tmp_path / "out2", folder / "a.jpg", tmp_path / "other" / "a.jpg")


def test_every_photograph_has_a_name_of_its_own():
    names = output_names(["x/a.png", "x/a.jpg", "x/a.dng", "y/a.png"], 4, ".tif")
    assert names == {
        "x/a.jpg": "x/a_4x.tif",
        "x/a.png": "x/a.png_4x.tif",
        "x/a.dng": "x/a_raw_4x.tif",
        "y/a.png": "y/a_4x.tif",
    }


def test_what_is_whole_is_skipped(folder, tmp_path):
    out = tmp_path / "out"
    finish(planned(out, folder), out)
    plan = planned(out, folder)
    assert (len(plan.todo), plan.there) == (0, 2)
    (out / "a_4x.png").write_bytes(b"cut")
    (out / "deep" / "er" / "b_4x.png").unlink()
    assert [job.output for job in planned(out, folder).todo] == ["a_4x.png", "deep/er/b_4x.png"]


def test_an_output_without_its_record_is_not_whole(folder, tmp_path):
    """A run that is killed between the two leaves such an output."""
    out = tmp_path / "out"
    plan = planned(out, folder)
    (out / "a_4x.png").write_bytes(b"a zoomed picture")
    assert planned(out, folder).todo == plan.todo


def test_a_changed_photograph_is_zoomed_again(folder, tmp_path):
    out = tmp_path / "out"
    finish(planned(out, folder), out)
    os.utime(folder / "a.jpg", ns=(1, 1))
    plan = planned(out, folder)
    assert [job.output for job in plan.todo] == ["a_4x.png"] and len(plan.stale["a_4x.png"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": Output(bits=16)}, r"expected the bits of the run that made it \(8\), got 16"),
        ({"models": MODELS | {"model": "c" * 64}}, r"the model of the run that made it \(aaaaaaaaaaaa...\), got ccc"),
    ],
)
def test_other_options_are_refused_until_overwritten(change, message, folder, tmp_path):
    out = tmp_path / "out"
    planned(out, folder, **change)
    finish(planned(out, folder), out)  # nothing was finished with the options of the first
    with pytest.raises(ZoomError, match=message) as caught:
        planned(out, folder, **change)
    assert str(caught.value).endswith("add --overwrite to zoom everything again")
    again = change | {"output": Output(bits=change.get("output", Output()).bits, overwrite=True)}
    assert len(planned(out, folder, **again).todo) == 2
    plan = planned(out, folder, **change)  # an interrupted run goes on
    assert len(plan.todo) == 2 and plan.there == 0
    finish(plan, out)
    assert planned(out, folder, **change).there == 2


def test_outputs_of_others_are_not_replaced(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a_4x.png").write_bytes(b"mine")
    with pytest.raises(ZoomError, match=r"a_4x.png: expected a new file, got an existing one; .* add --overwrite"):
        planned(out, folder)
    assert not (out / OPTIONS).exists()
    assert len(planned(out, folder, output=Output(overwrite=True)).todo) == 2


def test_outputs_are_never_inputs(folder, tmp_path):
    out = folder / "zoomed"
    finish(planned(out, folder), out)
    assert planned(out, folder).there == 2
    plan = planned(tmp_path / "other", folder)
    assert [job.output for job in plan.todo] == ["a_4x.png", "deep/er/b_4x.png"]
    assert f"{folder}/zoomed: made by sdan zoom, so it is left out" in plan.notes[0]
    with pytest.raises(ZoomError, match="expected another folder than that of the photographs, got the same"):
        planned(folder, folder)


def test_a_name_that_is_too_long_is_set_aside(folder, tmp_path):
    (folder / f"{'n' * 250}.jpg").write_bytes(b"")
    plan = planned(tmp_path / "out", folder)
    assert len(plan.todo) == 2 and len(plan.set_aside) == 1
    assert "File name too long" in plan.set_aside[0][1]


def test_a_damaged_options_file_is_one_line(folder, tmp_path):
    out = tmp_path / "out"
    planned(out, folder)
    damaged = [(text, "got a damaged file") for text in ("{", "[" * 10**6, "[]", '{"version": "a"}')]
    for text, message in (*damaged, (json.dumps({"version": 9}), "got a newer one; upgrade sdan")):
        (out / OPTIONS).write_text(text)
        with pytest.raises(ZoomError, match=message):
            planned(out, folder)


def test_nothing_to_zoom_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZoomError, match="expected photographs in this folder, got none"):
        planned(tmp_path / "out", tmp_path / "empty")
    with pytest.raises(ZoomError, match="expected photographs, got no such file or folder"):
        planned(tmp_path / "out", tmp_path / "nosuch")
    with pytest.raises(ZoomError, match="expected a path or s3://BUCKET/PREFIX, got gs://"):
        planned(tmp_path / "out", "gs://bucket/photos")


def test_a_name_that_is_not_utf_8_is_planned(tmp_path):
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/stra\xdfe.jpg")).write_bytes(b"")
    out = tmp_path / "out"
    plan = planned(out, tmp_path / "in")
    assert os.fsencode(plan.todo[0].output) == b"stra\xdfe_4x.png" and plan.todo[0].label.isascii()
    finish(plan, out)
    assert planned(out, tmp_path / "in").there == 1


def test_files_are_no_batch(folder):
    assert not is_batch([str(folder / "a.jpg"), "nosuch.dng"], "out")
    assert is_batch([str(folder)], "out") and is_batch(["a.jpg"], "s3://bucket/out")
    with pytest.raises(ZoomError, match=r"expected a folder for a folder's photographs, got a .png file"):
        check_batch("zoomed.png", Output())
