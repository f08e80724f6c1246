"""The feature terms of the loss: values, weights, masks, borders, and their effect on a picture."""

import pytest
import torch
from torch.nn import functional as F

from sdan.losses import CONTEXTUAL_LAYERS, LossConfig, sdan_loss, transfer_loss
from sdan.network import SDANOutput
from sdan.perceptual import st_lpips
from sdan.perceptual.vgg19 import VGG19Features

SIDE = 32
ALL = ("pixel", "perceptual", "contextual", "cobi_rgb", "cobi_vgg", "st_lpips")


@pytest.fixture(autouse=True)
def random_st_lpips(st_lpips_weights, monkeypatch):
    """ST-LPIPS with random weights, as if they were the package's."""
    network = st_lpips.STLPIPS(st_lpips_weights)
    monkeypatch.setattr(st_lpips, "st_lpips_on", lambda device: network)


@pytest.fixture(scope="module")
def vgg(vgg_weights):
    return VGG19Features(vgg_weights)


def weights(**given):
    """A config with these term weights and no border; other terms have weight 0."""
    terms = {f"{name}_weight": given.pop(name, 0.0) for name in ALL}
    return LossConfig(**{"border_px": 0, "cobi_patch_px": 5} | terms | given)


def picture(seed, side=SIDE, batch=1):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def output(zoomed, mask=None):
    low = F.avg_pool2d(zoomed, 4)
    mask = torch.ones_like(low[:, :1]) if mask is None else mask
    return SDANOutput(zoomed, low, mask, torch.zeros_like(low[:, :2]))


def loss(zoomed, target, config, vgg=None, mask=None):
    return sdan_loss(output(zoomed, mask), F.avg_pool2d(zoomed, 4), target, config, vgg)


def test_zoom_is_the_weighted_sum_of_the_terms(vgg):
    image, target = picture(0, batch=2), picture(1, batch=2)
    alone = {name: loss(image, target, weights(**{name: 1.0}), vgg).zoom for name in ALL}
    factors = dict(zip(ALL, (0.5, 0.25, 2.0, 0.125, 1.5, 3.0), strict=True))
    both = loss(image, target, weights(**factors), vgg)
    assert float(both.zoom) == pytest.approx(sum(factors[name] * float(alone[name]) for name in ALL), rel=1e-5)
    assert both.parts.keys() == set(ALL)
    for name in ALL:
        assert float(alone[name]) > 0 and float(both.parts[name]) == pytest.approx(float(alone[name]), rel=1e-5)
    assert loss(image, target, weights(pixel=1.0)).parts == {}


def test_perceptual_is_the_mean_squared_difference_of_relu2_2(vgg):
    image, target = picture(0), picture(1)
    expected = F.mse_loss(vgg(image)["relu2_2"], vgg(target)["relu2_2"])
    assert float(loss(image, target, weights(perceptual=1.0), vgg).zoom) == pytest.approx(float(expected), rel=1e-5)


def test_cobi_without_a_spatial_weight_is_cx(vgg):
    image, target = picture(0), picture(1)
    cx = loss(image, target, weights(contextual=1.0), vgg).zoom
    assert loss(image, target, weights(cobi_vgg=1.0, cobi_spatial_weight=0.0), vgg).zoom == cx
    assert float(loss(image, target, weights(cobi_vgg=1.0), vgg).zoom) != pytest.approx(float(cx), rel=1e-3)
    assert set(CONTEXTUAL_LAYERS) == {"relu1_2", "relu2_2", "relu3_2"}


@pytest.mark.parametrize("name", ALL)
def test_descent_on_each_term_approaches_the_target(vgg, name):
    """The term is smallest at the target, and a few steps on the pixels of a blurred picture lower it."""
    target = picture(1)
    blurred = F.interpolate(F.avg_pool2d(target, 4), scale_factor=4.0, mode="bilinear")
    config = weights(**{name: 1.0})
    assert float(loss(target, target, config, vgg).zoom) < 0.01 * float(loss(blurred, target, config, vgg).zoom)
    image = blurred.clone().requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.02)
    values = []
    for _ in range(8):
        value = loss(image, target, config, vgg).zoom
        values.append(float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert values[-1] < 0.95 * values[0]


def test_for_a_shifted_target_l1_prefers_blur_and_cobi_does_not():
    """The reason for CoBi: a pixel loss on misaligned pairs rewards blur."""
    scene = F.interpolate(picture(2, side=24), scale_factor=2.0, mode="bicubic")
    sharp, shifted = scene[..., 4:44, 4:44], scene[..., 6:46, 7:47]
    blurred = F.avg_pool2d(F.pad(sharp, (4, 4, 4, 4), mode="replicate"), 9, stride=1)
    l1, cobi = weights(pixel=1.0), weights(cobi_rgb=1.0)
    assert float(loss(sharp, shifted, l1).zoom) > float(loss(blurred, shifted, l1).zoom)
    assert float(loss(sharp, shifted, cobi).zoom) < 0.5 * float(loss(blurred, shifted, cobi).zoom)


@pytest.mark.parametrize("name", ALL[1:])
def test_masked_and_border_pixels_do_not_count(vgg, name):
    image, target = picture(0), picture(1)
    changed = target.clone()
    changed[..., :4, :] = 0.5
    border = weights(**{name: 1.0}, border_px=4)
    assert loss(image, target, border, vgg).zoom == loss(image, changed, border, vgg).zoom
    nothing = torch.zeros(1, 1, SIDE // 4, SIDE // 4)
    assert float(loss(image, target, weights(**{name: 1.0}), vgg, nothing).zoom) == 0
    half = nothing.clone()
    half[..., 3:] = 1
    right = torch.cat((target[..., :8], image[..., 8:]), dim=3)  # wrong only where the mask is 0
    whole = loss(image, right, weights(**{name: 1.0}), vgg).zoom
    assert float(loss(image, right, weights(**{name: 1.0}), vgg, half).zoom) < 0.7 * float(whole)


def test_transfer_loss_uses_the_same_terms(vgg):
    image, target = picture(0), picture(1)
    config = weights(cobi_rgb=1.0, perceptual=0.5, st_lpips=0.5)
    got = transfer_loss(image, torch.zeros(1, 2, SIDE // 4, SIDE // 4), target, config, vgg)
    assert float(got) == pytest.approx(float(loss(image, target, config, vgg).zoom), rel=1e-4)


@pytest.mark.parametrize(
    ("terms", "min_px"),
    [
        ({"pixel": 1.0}, 1),
        ({"cobi_rgb": 1.0}, 5),
        ({"cobi_rgb": 1.0, "st_lpips": 0.1}, 21),
        *(({name: 1.0}, 8) for name in ("perceptual", "contextual", "cobi_vgg")),
    ],
)
def test_min_px_is_the_smallest_target_that_works(vgg, terms, min_px):
    config = weights(**terms)
    assert config.min_px == min_px
    image, target = (F.interpolate(picture(seed), size=(min_px, min_px)) for seed in (0, 1))
    offset = torch.zeros(1, 2, min_px, min_px)
    assert transfer_loss(image, offset, target, config, vgg).isfinite()


def test_feature_terms_are_float32_under_autocast(vgg):
    image, target = picture(0), picture(1)
    config = weights(**dict.fromkeys(ALL, 1.0))
    expected = loss(image, target, config, vgg)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(image, target, config, vgg)
    assert got.total == expected.total and got.total.dtype == torch.float32


def test_a_feature_loss_without_vgg_is_refused():
    with pytest.raises(ValueError, match=r"vgg: expected a feature network .*load_features"):
        loss(picture(0), picture(1), weights(perceptual=1.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pixel_weight": 0.0}, "pixel_weight, perceptual_weight, .*: expected at least one above 0"),
        ({"cobi_rgb_weight": -1.0}, "cobi_rgb_weight: expected 0 or more, got -1.0"),
        ({"perceptual_weight": float("nan")}, "perceptual_weight: expected 0 or more"),
        ({"cobi_spatial_weight": -0.1}, "cobi_spatial_weight: expected 0 or more"),
        ({"cobi_patch_px": 0}, "cobi_patch_px: expected at least 1"),
    ],
)
def test_wrong_weights_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**values)
