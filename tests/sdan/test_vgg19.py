"""VGG-19's feature maps equal torchvision's; its weights are loaded, or refused in one line."""

import urllib.error

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from sdan.perceptual.vgg19 import TAPS, VGG19Features, load_vgg19
from sdan.perceptual.weights import PerceptualError


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty torchvision cache, and downloads that fail as without a network; returns the cache folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("[Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_the_maps_equal_torchvisions(vgg_weights):
    with torch.device("meta"):
        theirs = torchvision.models.vgg19().features[:14]
    theirs.load_state_dict({name.removeprefix("features."): w for name, w in vgg_weights.items()}, assign=True)
    image = torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    mean, deviation = (
        torchvision.models.VGG19_Weights.IMAGENET1K_V1.transforms().mean,
        torch.tensor([0.229, 0.224, 0.225]),
    )
    values = (image - torch.tensor(mean)[:, None, None]) / deviation[:, None, None]
    maps = VGG19Features(vgg_weights)(image)
    for index, name in TAPS.items():
        torch.testing.assert_close(maps[name], theirs[: index + 1](values.clone()))
    assert [tuple(value.shape[1:]) for value in maps.values()] == [(64, 20, 28), (128, 10, 14), (256, 5, 7)]


def test_features_are_float32_under_autocast_and_frozen(vgg_weights):
    features = VGG19Features(vgg_weights)
    image = torch.rand(1, 3, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        maps = features(image)
    assert all(value.dtype == torch.float32 for value in maps.values())
    maps["relu3_2"].sum().backward()
    assert image.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in features.parameters())


@pytest.mark.parametrize("name", ["vgg.pth", "vgg.safetensors"])
def test_a_given_file_is_read(vgg_weights, tmp_path, name):
    whole = {**vgg_weights, "classifier.6.bias": torch.zeros(1000)}
    save_file(whole, tmp_path / name) if name.endswith("safetensors") else torch.save(whole, tmp_path / name)
    loaded = load_vgg19(tmp_path / name)
    assert loaded.keys() == vgg_weights.keys()
    assert all(torch.equal(loaded[key], vgg_weights[key]) for key in loaded)


def test_torchvisions_cache_is_used(vgg_weights, no_network):
    no_network.mkdir(parents=True)
    torch.save(vgg_weights, no_network / "vgg19-dcbb9e9d.pth")
    assert load_vgg19().keys() == vgg_weights.keys()
    (no_network / "vgg19-dcbb9e9d.pth").write_bytes(b"half a file")
    with pytest.raises(PerceptualError, match="vgg-weights PATH"):
        load_vgg19()


def test_missing_weights_are_one_line_with_the_remedy(no_network):
    with pytest.raises(PerceptualError) as error:
        load_vgg19()
    line = str(error.value)
    assert "\n" not in line and "--vgg-weights PATH" in line and "name resolution" in line
    assert "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth" in line


def test_files_that_are_not_vgg_weights_are_refused(vgg_weights, tmp_path):
    def refused(path, words):
        with pytest.raises(PerceptualError, match=words) as error:
            load_vgg19(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    refused(tmp_path / "missing.pth", "No such file")
    refused(tmp_path / "missing.safetensors", "No such file")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("not weights")
        refused(tmp_path / name, "expected weights, got")
    torch.save([1, 2], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", "got list")
    torch.save({"model": vgg_weights}, tmp_path / "nested.pth")
    refused(tmp_path / "nested.pth", r"features.0.weight \(64, 3, 3, 3\), got none")
    torch.save({**vgg_weights, "features.7.weight": torch.full((128, 128, 3, 3), torch.nan)}, tmp_path / "nan.pth")
    refused(tmp_path / "nan.pth", "not finite")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "code.pth")  # a pickled module, which is never unpickled
    refused(tmp_path / "code.pth", "expected weights, got UnpicklingError")
