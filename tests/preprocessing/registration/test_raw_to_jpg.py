"""On simulated sequences each tile's map agrees with the true position of the background."""

import numpy as np
import pytest
from known_scene import WB, to_mosaic

from preprocessing import tiles
from preprocessing.plan import PreprocessOptions, make_plan
from preprocessing.raw import decode
from preprocessing.raw.dng import write_dng
from preprocessing.registration import affine, raw_to_jpg
from preprocessing.registration.lens import LensMap
from preprocessing.simulator.sequences import simulate
from preprocessing.storage import open_folder
from preprocessing.truth.reader import load_truth

TILE_PX = 24
WIDTH = 768


def test_mosaic_luminance_does_not_shift(tmp_path):
    """A ramp of grey light comes back unchanged at pixels of all colours."""
    write_dng(tmp_path / "grey.dng", to_mosaic(np.full((32, 48, 3), 0.4)), wb=WB)
    image = decode.load(tmp_path / "grey.dng")
    ramp = np.arange(20)[:, None] * 3.0 + np.arange(30)[None] * 5.0
    places = zip(((0, 0), (0, 1), (1, 0), (1, 1)), image.wb, strict=True)
    counts = np.stack([ramp[r::2, c::2] / gain for (r, c), gain in places])
    shown = raw_to_jpg.mosaic_luminance(np.rint(counts * 60 + 512).astype(np.uint16), image)
    light = (shown[2:-2, 2:-2] / 255) ** 2.2 * (image.white_level - 512) / 60
    assert np.abs(light - ramp[2:-2, 2:-2]).max() < 0.2


@pytest.mark.parametrize(
    ("preset", "raw_format", "limit_px"),
    [("perfect", "dng", 0.25), ("default", "arw", 1.0), ("handheld", "dng", 2.0)],
)
def test_maps_agree_with_the_true_background(tmp_path, preset, raw_format, limit_px):
    check_maps(tmp_path, limit_px, sequences=1, width_px=WIDTH, preset=preset, raw_format=raw_format, seed=4)


@pytest.mark.slow
@pytest.mark.parametrize("raw_format", ["dng", "arw"])
def test_maps_of_many_scenes_are_within_a_quarter_pixel(tmp_path, raw_format):
    """At the simulator's default width and the default tile size, for several subjects."""
    tile = PreprocessOptions.tile_px
    check_maps(
        tmp_path, 0.25, sequences=4, width_px=1536, preset="perfect", raw_format=raw_format, seed=31, tile_px=tile
    )


def check_maps(folder, limit_px, *, preset, tile_px=TILE_PX, **simulated):
    simulate(folder, preset=preset, **simulated)
    source = open_folder(str(folder))
    for job in make_plan(source, PreprocessOptions(), {}).jobs:
        truth = load_truth(folder / job.sequence)
        decoded = [tiles.decode_jpg(source.read(path), path) for path in (job.lr_jpg, job.hr_jpg)]
        image = decode.load(source.read(job.lr_raw))
        for ecc in (True, False):
            rows = tiles.cut_tiles(image, *decoded, job.zoom, tiles.Cutting(4, tile_px, tile_px, ecc))
            if ecc and rows[0]["aligned_by"] == "scale_fallback" and preset == "handheld":
                continue
            for column in ("lr_to_hr", "lr_to_hr_lens"):
                error = np.concatenate([error_of(row, column, truth, job, nominal=not ecc) for row in rows])
                assert np.percentile(error, 95) < (limit_px if ecc else 0.05), f"{job.sequence} {job.hr} {column}"
            assert {row["aligned_by"] for row in rows} == {"ecc" if ecc else "scale"}


def error_of(row, column, truth, job, *, nominal):
    """Errors, HR pixels, of one of a row's maps at its tile's packed pixels that show the background."""
    side = row["lr_raw"].shape[-1]
    x, y = np.meshgrid(np.arange(side) * 2 + 1.0, np.arange(side) * 2 + 1.0)
    corner = [row["origin_col"] + 2 * row["col"], row["origin_row"] + 2 * row["row"]]
    points = np.stack([x.ravel(), y.ravel()], axis=1) + corner
    true, shows = truth.true_lr_to_hr(job.lr, job.hr, points)
    if nominal:
        lr, hr = truth.frames[job.lr], truth.frames[job.hr]
        centre = np.array([lr.raw_width, lr.raw_height]) / 2
        true = (points - centre) * hr.focal_mm / lr.focal_mm + np.array([hr.jpg_width, hr.jpg_height]) / 2
        shows = np.ones(len(points), bool)
    if column == "lr_to_hr":
        found = affine.apply(row[column].reshape(2, 3), points)
    else:
        found = LensMap.from_numbers(row[column])(points)
    return np.hypot(*(found - true).T)[shows]
