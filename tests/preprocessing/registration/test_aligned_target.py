"""The aligned target is in the input's view, marks its valid part, and is all invalid if registration fails."""

import numpy as np
from known_scene import Scene, to_8_bit

from preprocessing.registration.affine import compose, scaling, translation
from preprocessing.registration.aligned_target import align_to

SCALE = 4
LR_SIZE = (120, 160)
HR_SIZE = (480, 640)
SHIFT_PX = (6.0, -4.0)
"""Shift of the target against the input, target pixels."""


def channels_first(picture_HWC):
    return np.ascontiguousarray(picture_HWC.transpose(2, 0, 1))


def pair(lr_seed=4, hr_seed=4):
    """The input, the target as shot and the target in the input's view, uint8 [3, ...]."""
    base, lr_base = scaling(0.5), scaling(0.5 * SCALE)
    lr = to_8_bit(Scene(lr_seed, waves=600).view(lr_base, LR_SIZE))
    shot = to_8_bit(Scene(hr_seed, waves=600).view(compose(base, translation(*SHIFT_PX)), HR_SIZE))
    expected = to_8_bit(Scene(hr_seed, waves=600).view(base, HR_SIZE))
    return [channels_first(picture) for picture in (lr, shot, expected)]


def test_a_shifted_target_is_moved_into_the_inputs_view():
    lr, shot, expected = pair()
    aligned, valid = align_to(shot, lr, SCALE)
    assert aligned.shape == shot.shape and aligned.dtype == np.uint8 and valid.shape == HR_SIZE
    before, after = (np.abs(picture.astype(int) - expected)[:, valid].mean() for picture in (shot, aligned))
    assert after < 1.5 and before > 4 * after


def test_pixels_outside_the_target_are_invalid():
    lr, shot, _ = pair()
    _, valid = align_to(shot, lr, SCALE)
    # The input's pixel x is the target's x - 6: the first columns and the last rows were not photographed.
    assert not valid[:, :6].any() and not valid[-4:].any()
    assert valid[8:-10, 12:-8].all()


def test_an_unrelated_target_is_returned_as_invalid():
    lr, shot, _ = pair(hr_seed=54)
    aligned, valid = align_to(shot, lr, SCALE)
    assert np.array_equal(aligned, shot) and not valid.any()
