"""References with known offsets. What the pyramid learns from them: tests/pipelines/training/test_step.py."""

import pytest
import torch

from sdan.offsets.known_shift import CONTROL_POINTS, known_shift_loss, moved_reference, random_motion
from sdan.resample import bicubic, low_pass, sample


def motions(count: int, max_shift_px: float, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    shape = (2, CONTROL_POINTS, CONTROL_POINTS)
    draw = [(torch.rand(2, generator=random), torch.randn(shape, generator=random)) for _ in range(count)]
    return torch.stack([random_motion(*each, max_shift_px) for each in draw])


def test_random_motions_stay_within_the_largest_shift():
    shifts = motions(200, 24.0, 0).mean((2, 3)).norm(dim=1)
    assert shifts.max() < 26 and shifts.median() < 9 and shifts.max() > 15


@pytest.mark.parametrize("factor", [1, 2])
def test_a_moved_reference_is_the_picture_at_the_known_offsets(factor):
    picture = bicubic(torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 8).clamp(0, 1)
    shift = torch.tensor([4.0, -2.0])[None, :, None, None].expand(1, 2, 3, 3)
    reference, offset = moved_reference(picture, shift, factor)
    assert torch.allclose(offset, (shift[:, :, :1, :1] / factor).expand_as(offset), atol=1e-5)
    moved = sample(low_pass(picture, factor), offset)
    inside = (..., slice(8, -8), slice(8, -8))
    assert torch.allclose(reference[inside], moved[inside], atol=1e-4)


def test_the_loss_counts_only_what_points_inside():
    known = torch.full((1, 2, 8, 8), 100.0)
    assert known_shift_loss(torch.zeros_like(known), known, 1) == 0
    known = torch.zeros(1, 2, 8, 8)
    found = known.clone()
    found[:, 0] = 3.0
    assert known_shift_loss(found, known, 1) == pytest.approx(3.0, abs=1e-3)
