"""The presets: how far pairs are misaligned."""

import numpy as np
import pytest
from simulated_frames import SIZE, draw_frames

from preprocessing.truth.frame import FAR, NEAR, nominal_lr_to_hr


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("tripod", (0.7, 2.8, 6.3)), ("default", (2.4, 9.7, 24.0)), ("handheld", (4.5, 17.0, 46.0))],
)
def test_presets_misalign_pairs_by_the_documented_amounts(preset: str, expected: tuple[float, float, float]) -> None:
    """5/50/95 % of the misalignment of 4x pairs, HR pixels at 768 px wide; expected values from a calibration run."""
    found = []
    for seed in range(100):
        frames = draw_frames(preset, seed)
        for lr, hr in ((frames[4], frames[0]), (frames[5], frames[1]), (frames[6], frames[2])):
            in_jpg = np.stack(np.meshgrid(np.linspace(5, 475, 5), np.linspace(5, 315, 4)), -1)
            affine = nominal_lr_to_hr(lr, hr)
            nominal = (in_jpg - affine[:, 2]) / affine[0, 0]
            for plane in (FAR, FAR, FAR, NEAR):
                shift = (lr.from_scene(hr.to_scene(in_jpg, plane), plane) - nominal) * affine[0, 0]
                found.append(np.hypot(shift[..., 0], shift[..., 1]).ravel() * 768 / SIZE[0])
    assert np.percentile(np.concatenate(found), (5, 50, 95)) == pytest.approx(expected, rel=0.2)
