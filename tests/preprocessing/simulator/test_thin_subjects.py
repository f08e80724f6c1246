"""The subjects of thin lines: each fills the middle with detail that a short frame just resolves."""

import numpy as np
import pytest

from preprocessing.simulator.scenes import build_scene
from preprocessing.simulator.thin_subjects import SUBJECTS

BOXES = [(-half, -half / 2, half, half / 2) for half in (200.0, 400.0, 800.0, 1600.0)]


@pytest.mark.parametrize("subject", SUBJECTS)
def test_thin_subjects_have_detail_in_the_middle(subject: str) -> None:
    scene = build_scene(np.random.default_rng(3), BOXES, frame_width=480, subject=subject, thin=True)
    assert scene.subject == subject
    for canvas in scene.far[:3]:
        green = canvas.pixels[..., 1].astype(np.float64)
        assert np.abs(np.diff(green, axis=1)).max() > 20
        assert green.std() > 4


def test_only_wide_scenes_draw_thin_subjects() -> None:
    seen = {
        thin: {
            build_scene(np.random.default_rng(seed), [(-9, -9, 9, 9)] * 4, frame_width=384, thin=thin).subject
            for seed in range(12)
        }
        for thin in (False, True)
    }
    assert not seen[False] & set(SUBJECTS)
    assert seen[True] & set(SUBJECTS)
