"""A frame's exact geometry: the forward and backward maps, and the nominal affine."""

import numpy as np
import pytest
from simulated_frames import draw_frames

from preprocessing.truth.frame import FAR, NEAR, nominal_lr_to_hr


@pytest.mark.parametrize("plane", [FAR, NEAR])
def test_forward_map_inverts_the_backward_map(plane: int) -> None:
    for frame in draw_frames(seed=9):
        xy = np.stack(np.meshgrid(np.linspace(-10, 490, 7), np.linspace(-10, 330, 5)), -1)
        assert np.abs(frame.from_scene(frame.to_scene(xy, plane), plane) - xy).max() < 1e-6


def test_perfect_geometry_equals_the_nominal_affine() -> None:
    frames = draw_frames("perfect")
    for lr, hr in ((frames[4], frames[0]), (frames[6], frames[2])):
        in_jpg = np.array([[3.0, 5.0], [470.0, 300.0]])
        affine = nominal_lr_to_hr(lr, hr)
        in_lr = lr.from_scene(hr.to_scene(in_jpg + hr.jpg_origin))
        assert np.abs(in_lr @ affine[:, :2].T + affine[:, 2] - in_jpg).max() < 1e-6
