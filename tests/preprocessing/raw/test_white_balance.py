"""A RAW file without a white balance takes that of its embedded preview, and says so."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from known_scene import Scene, frame_to_scene, jpg_bytes, to_8_bit, to_mosaic, write_sequence
from mutants import entries, with_field

from preprocessing.pairs import process
from preprocessing.plan import PreprocessOptions, make_plan
from preprocessing.raw import decode
from preprocessing.raw.dng import ShotTags, write_dng
from preprocessing.raw.white_balance import gains_from_preview
from preprocessing.schema import decode as decode_row
from preprocessing.schema import list_shards, read_info
from preprocessing.storage import open_folder

SIZE = (192, 288)
AS_SHOT_NEUTRAL, COLOR_MATRIX = 50728, 50721


def without(data: bytes, *tags: int) -> bytes:
    for entry in entries(data):
        if entry.tag in tags:
            data = with_field(data, entry.at, "<H", 65000 + entry.tag % 100)
    return data


def shown(seed=3):
    """A display picture that is grey in places."""
    picture = Scene(seed).view(frame_to_scene(2.0, SIZE), SIZE)
    grey = picture.mean(2, keepdims=True)
    share = np.linspace(0, 1, SIZE[1])[None, :, None]
    return grey + (picture - grey) * share


def light_of(picture, gains):
    """[4, h, w] of a camera with these gains R, G, B."""
    linear = picture**2.2 / np.array(gains)
    return np.stack([linear[::2, ::2, 0], linear[::2, 1::2, 1], linear[1::2, ::2, 1], linear[1::2, 1::2, 2]])


@pytest.mark.parametrize("gains", [(2.0, 1.0, 1.5), (1.3, 1.0, 2.9), (2.8, 1.0, 1.2)])
@pytest.mark.parametrize("seed", [3, 4])
def test_gains_come_from_the_grey_parts_of_the_preview(seed, gains):
    picture = shown(seed)
    toned = np.clip(picture + 0.15 * np.sin(2 * np.pi * (picture - 0.5)) / np.pi, 0, 1)  # a camera's S-curve
    preview = jpg_bytes(to_8_bit(toned)[::2, ::2])
    found = gains_from_preview(preview, light_of(picture, gains), np.eye(3))
    assert found == pytest.approx([gains[0], 1, 1, gains[2]], rel=0.05)


def test_an_unsuitable_preview_gives_nothing():
    picture = shown()
    light = light_of(picture, (2.0, 1.0, 1.5))
    assert gains_from_preview(b"no jpg", light, np.eye(3)) is None
    assert gains_from_preview(jpg_bytes(to_8_bit(picture).swapaxes(0, 1)), light, np.eye(3)) is None  # another shape
    black = np.zeros((*SIZE, 3), np.uint8)
    assert gains_from_preview(jpg_bytes(black), light, np.eye(3)) is None
    assert gains_from_preview(jpg_bytes(to_8_bit(picture)), light[:, :8, :12], np.eye(3)) is None


@pytest.mark.parametrize("cfa", ["RGGB", "GBRG"])
def test_a_raw_without_white_balance_uses_its_preview(tmp_path, cfa):
    picture = shown()
    shot = ShotTags(thumbnail_jpg=jpg_bytes(to_8_bit(picture)))
    write_dng(tmp_path / "x.dng", to_mosaic(picture, cfa), cfa=cfa, shot=shot)
    data = (tmp_path / "x.dng").read_bytes()
    assert decode.load(data).remarks == () and decode.load(data).wb_source == "camera"
    image = decode.load(without(data, AS_SHOT_NEUTRAL))
    assert image.wb == pytest.approx([2, 1, 1, 1.5], rel=0.05) and image.wb_source == "preview"
    assert image.remarks == ("no white balance in the file; estimated from the embedded preview",)
    neither = decode.load(without(data, AS_SHOT_NEUTRAL, COLOR_MATRIX))
    assert neither.wb == pytest.approx([2, 1, 1, 1.5], rel=0.05)
    assert (neither.wb_source, neither.matrix_source, len(neither.remarks)) == ("preview", "none", 2)


def test_rows_and_summary_say_where_the_colours_are_from(tmp_path):
    sequence = write_sequence(tmp_path / "raw" / "1", focals_mm=(240, 50))
    path = sequence / "00002.dng"
    path.write_bytes(without(path.read_bytes(), AS_SHOT_NEUTRAL, COLOR_MATRIX))
    source, target = open_folder(str(tmp_path / "raw")), open_folder(str(tmp_path / "shards"))
    options = PreprocessOptions(tile_px=24, stride_px=24)
    result = process(make_plan(source, options, {}).jobs[0], source, target, options)
    assert [line.partition(";")[0] for line in result.notes.splitlines()] == [
        "RAW: no white balance in the file",
        "RAW: no colour matrix for this camera",
    ]
    [path] = list_shards(target.root)
    row = decode_row(pq.read_table(path, partitioning=None).to_pylist()[0], read_info(target.root))
    assert (row["wb_source"], row["matrix_source"]) == ("preview", "none")
