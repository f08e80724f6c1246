"""On simulated sequences the map of each tile is where the background really lies."""

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


def lens_map(**values):
    affine = np.array([[4.8, 0.02, -300.0], [-0.015, 4.79, -200.0]])
    return LensMap(affine, np.array([384.0, 256.0]), 461.5, **values)


def test_a_lens_map_without_a_lens_is_its_affine():
    points = np.array([[70.0, 50.0], [200.0, 140.0]])
    assert np.allclose(lens_map()(points), affine.apply(lens_map().affine, points))
    assert np.allclose(lens_map().affine_over(60, 40, 220, 150), lens_map().affine)
    assert lens_map().departure(lens_map().affine, 60, 40, 220, 150) < 1e-9


def test_radial_distortion_is_along_the_radius_and_cubic():
    mapping = lens_map(radial=0.012)
    inner, outer = (affine.apply(affine.invert(mapping.affine), np.array([[384.0 + x, 256.0]])) for x in (100, 200))
    assert np.allclose(mapping(inner), [[484 + 0.012 * 100**3 / 461.5**2, 256]])
    assert np.allclose(mapping(outer)[0, 0] - 584, 8 * (mapping(inner)[0, 0] - 484))


def test_slopes_are_what_the_parameters_do():
    mapping = lens_map(radial=0.01, tilt=(0.001, -0.002))
    points = np.array([[70.0, 50.0], [200.0, 140.0], [140.0, 60.0]])
    for index in range(9):
        step = np.zeros(9)
        step[index] = 1e-4
        change = (mapping.moved(step)(points) - mapping(points)) / 1e-4
        slope = mapping.slopes(points)[:, :, index]
        assert np.abs(change - slope).max() < 0.05 * max(1, np.abs(slope).max())


@pytest.mark.parametrize("flip", range(8))
def test_a_similarity_after_a_lens_map(flip):
    mapping = lens_map(radial=0.01, tilt=(0.001, -0.002))
    similarity = affine.compose(affine.turn(flip, (512, 768)), affine.about_centres(1.3, (512, 768), (512, 768)))
    points = np.array([[70.0, 50.0], [200.0, 140.0], [140.0, 60.0]])
    assert np.allclose(mapping.then(similarity)(points), affine.apply(similarity, mapping(points)))
    shift = affine.translation(3, -7)
    assert np.allclose(mapping.after(shift)(points), mapping(affine.apply(shift, points)))


def test_mosaic_luminance_moves_nothing(tmp_path):
    """A ramp of grey light comes back as it was, whatever colour stands where."""
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
def test_the_map_is_where_the_background_lies(tmp_path, preset, raw_format, limit_px):
    check_maps(tmp_path, limit_px, sequences=1, width_px=WIDTH, preset=preset, raw_format=raw_format, seed=4)


@pytest.mark.slow
@pytest.mark.parametrize("raw_format", ["dng", "arw"])
def test_every_pair_of_many_scenes_is_within_a_quarter_of_a_pixel(tmp_path, raw_format):
    """At the simulator's own width and the tiles' own size, whatever the subject and the noise."""
    tile = PreprocessOptions.tile_px
    check_maps(
        tmp_path, 0.25, sequences=6, width_px=1536, preset="perfect", raw_format=raw_format, seed=31, tile_px=tile
    )


def check_maps(folder, limit_px, *, preset, tile_px=TILE_PX, **simulated):
    simulate(folder, preset=preset, **simulated)
    source = open_folder(str(folder))
    for job in make_plan(source, PreprocessOptions(), {}).jobs:
        truth = load_truth(folder / job.sequence)
        decoded = [tiles.decode_jpg(source.read(path), path) for path in (job.lr_jpg, job.hr_jpg)]
        image = decode.load(source.read(job.lr_raw))
        for ecc in (True, False):
            rows = tiles.cut(image, *decoded, job.zoom, scale=4, tile_px=tile_px, stride_px=tile_px, ecc=ecc)
            if ecc and rows[0]["aligned_by"] == "scale_fallback" and preset == "handheld":
                continue
            for column in ("lr_to_hr", "lr_to_hr_lens"):
                error = np.concatenate([error_of(row, column, truth, job, nominal=not ecc) for row in rows])
                assert np.percentile(error, 95) < (limit_px if ecc else 0.05), f"{job.sequence} {job.hr} {column}"
            assert {row["aligned_by"] for row in rows} == {"ecc" if ecc else "scale"}


def error_of(row, column, truth, job, *, nominal):
    """HR pixels by which one of a row's maps errs where the background shows, at its tile's packed pixels."""
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
