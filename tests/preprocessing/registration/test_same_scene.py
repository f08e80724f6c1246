"""Pictures of one scene score high, whatever hand, light and lens did; pictures of two scenes score low."""

import cv2
import numpy as np
import pytest
from known_scene import Scene

from preprocessing.registration.same_scene import MIN_SCORE, scene_score

SIZE = (120, 180)


def view(seed=1, *, zoom=1.0, angle=0.0, shift=(0.0, 0.0)):
    """Luminance [H, W] in [0, 255] of a view about the scene's origin."""
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    centre = np.array([SIZE[1], SIZE[0]]) / 2
    linear = np.array([[cos, -sin], [sin, cos]])
    to_scene = np.concatenate([linear, (np.array(shift) - linear @ centre)[:, None]], axis=1)
    return (255 * Scene(seed).view(to_scene, SIZE)[..., 1]).astype(np.float32)


@pytest.mark.parametrize(
    "change",
    [{}, {"zoom": 1.04}, {"angle": 0.03}, {"shift": (16, -9)}, {"zoom": 0.97, "angle": -0.02, "shift": (-12, 10)}],
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_one_scene_scores_high(seed, change):
    assert scene_score(view(seed), view(seed, **change)) > 0.8
    darker = 255 * (view(seed, **change) / 255 * 0.4) ** 1.3  # another exposure and tone curve
    assert scene_score(view(seed), darker.astype(np.float32)) > 0.7


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_scenes_score_low(seed):
    first = view(seed)
    assert scene_score(first, view(seed + 10)) < MIN_SCORE
    assert scene_score(first, np.ascontiguousarray(first[::-1, ::-1])) < MIN_SCORE
    assert scene_score(first, view(seed, zoom=2.0)) < MIN_SCORE  # a focal length twice the stated one
    assert scene_score(first, np.full(SIZE, 90, np.float32)) < MIN_SCORE


def test_flat_or_tiny_pictures_have_no_score():
    flat = np.full(SIZE, 90, np.float32)
    assert np.isnan(scene_score(flat, flat))
    assert np.isnan(scene_score(view()[:20, :20], view()[:20, :20]))


def test_noise_on_flat_pictures_is_not_a_match():
    random = np.random.default_rng(0)
    noisy = [cv2.GaussianBlur(random.normal(120, 3, SIZE), (0, 0), 0.8).astype(np.float32) for _ in range(2)]
    assert scene_score(*noisy) < MIN_SCORE
