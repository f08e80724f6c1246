"""ST-LPIPS: equal to the package whose weights it reads, tolerant of shifts, and refused in one line without them."""

import sys
import types
from importlib.util import find_spec
from unittest.mock import patch

import pytest
import torch
import torchvision  # noqa: F401 - so that it is not among the modules that `patch` removes
from torch.nn import functional as F

from sdan import metrics
from sdan.perceptual import st_lpips
from sdan.perceptual.st_lpips import MIN_PX, STLPIPS, load_st_lpips
from sdan.perceptual.weights import PerceptualError
from sdan.resample import bicubic, low_pass

installed = pytest.mark.skipif(find_spec(st_lpips.PACKAGE) is None, reason="stlpips-pytorch is not installed")


def pair(height=64, width=64, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, batch, 3, height, width, generator=generator).unbind()


def leaves(seed, side=160):
    """Discs of random place, size and colour that cover each other: sharp edges of every size, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    picture = torch.full((3, side, side), 0.5)
    for row, col, radius, *colour in torch.rand(400, 6, generator=generator).tolist():
        distance = torch.hypot(rows - side * row, cols - side * col)
        inside = (2 + 20 * radius**3 - distance + 0.5).clamp(0, 1)
        picture = picture * (1 - inside) + inside * torch.tensor(colour)[:, None, None]
    return picture[None]


@pytest.fixture
def not_installed(monkeypatch):
    """Python finds no stlpips-pytorch."""
    monkeypatch.setattr(st_lpips, "find_spec", lambda name: None)
    st_lpips.st_lpips_on.cache_clear()
    yield
    st_lpips.st_lpips_on.cache_clear()


@installed
@pytest.mark.parametrize("size", [(64, 64), (MIN_PX, 33), (50, 77)])
def test_it_equals_the_package(size):
    image, target = pair(*size)
    # The package imports these two and calls neither.
    needless = {"IPython": types.ModuleType("IPython"), "torchsummary": types.ModuleType("torchsummary")}
    needless["IPython"].embed = needless["torchsummary"].summary = None
    with patch.dict(sys.modules, needless), torch.no_grad():
        from stlpips_pytorch import stlpips

        theirs = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
        expected = theirs(image, target, normalize=True).flatten()
    torch.testing.assert_close(metrics.st_lpips_distance(image, target), expected, rtol=0, atol=1e-5)


@installed
def test_known_values_without_importing_the_package():
    """The values are those of version 0.0.2 of the package, run on 2026-11-27."""
    distance = metrics.st_lpips_distance(*pair())
    assert not any(name.startswith(st_lpips.PACKAGE) for name in sys.modules)
    torch.testing.assert_close(distance, torch.tensor([0.0424017, 0.0362867]), rtol=0, atol=1e-5)
    assert metrics.st_lpips_unavailable() is None


@installed
@pytest.mark.parametrize("seed", [0, 1])
def test_a_shift_costs_far_less_than_blur(seed):
    """A shift by one pixel costs under 5 % of what 4x less resolution costs, although its PSNR is no better."""
    scene = leaves(seed)
    blurred = bicubic(low_pass(scene, 4), 4).clamp(0, 1)
    sharp, right, down = (scene[..., 8 + y : 136 + y, 8 + x : 136 + x] for y, x in ((0, 0), (0, 1), (1, 0)))
    blurred = blurred[..., 8:136, 8:136]
    cost = metrics.st_lpips_distance(blurred, sharp)
    assert metrics.st_lpips_distance(right, sharp) < 0.05 * cost
    assert metrics.st_lpips_distance(down, sharp) < 0.05 * cost
    assert metrics.psnr(right, sharp) < metrics.psnr(blurred, sharp) + 1


def test_equal_pictures_have_distance_0_and_order_is_free(st_lpips_weights):
    network = STLPIPS(st_lpips_weights)
    image, target = pair()
    assert torch.equal(network(image, image), torch.zeros(2))
    distance = network(image, target)
    assert distance.min() > 0
    torch.testing.assert_close(network(target, image), distance)
    torch.testing.assert_close(network(image[1:], target[1:]), distance[1:])


def test_it_is_float32_under_autocast_and_frozen(st_lpips_weights):
    network = STLPIPS(st_lpips_weights)
    image, target = pair()
    with torch.autocast("cpu", torch.bfloat16):
        distance = network(image.requires_grad_(), target)
    assert distance.dtype == torch.float32 and torch.equal(distance, network(image, target))
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_gradient_is_the_slope(st_lpips_weights):
    network = STLPIPS(st_lpips_weights)
    image, target = pair(32, 32, batch=1)
    image.requires_grad_()
    (slope,) = torch.autograd.grad(network(image, target).sum(), image)
    step = 0.01 * slope / slope.norm()
    with torch.no_grad():
        rise = float(network(image + step, target) - network(image - step, target)) / 2
    assert rise == pytest.approx(float((slope * step).sum()), rel=0.02)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_pictures_have_a_finite_gradient(st_lpips_weights, value):
    dead = {name: torch.zeros_like(weight) if "net" in name else weight for name, weight in st_lpips_weights.items()}
    for weights in (st_lpips_weights, dead):  # dead: every feature vector is 0
        flat = torch.full((1, 3, 32, 32), value, requires_grad=True)
        STLPIPS(weights)(flat, pair(32, 32, batch=1)[1]).sum().backward()
        assert flat.grad.isfinite().all()


def test_the_mask_weights_the_distances(st_lpips_weights):
    network = STLPIPS(st_lpips_weights)
    image, target = pair()
    whole, nothing = torch.ones(2, 1, 64, 64), torch.zeros(2, 1, 64, 64)
    torch.testing.assert_close(network(image, target, whole), network(image, target))
    assert torch.equal(network(image, target, nothing), torch.zeros(2))
    torch.testing.assert_close(network(image, target, 0.25 * whole), 0.25 * network(image, target))
    left = F.pad(whole[..., :32], (0, 32))
    halves = network(image, target, left) + network(image, target, whole - left)
    torch.testing.assert_close(halves, network(image, target))


def test_a_picture_that_is_too_small_is_refused(st_lpips_weights):
    network = STLPIPS(st_lpips_weights)
    assert network(*pair(MIN_PX, MIN_PX)).shape == (2,)
    with pytest.raises(ValueError, match=r"ST-LPIPS: expected at least 21x21 pixels, got \(20, 30\)"):
        network(*pair(MIN_PX - 1, 30))


def test_without_the_package_the_metric_is_none(not_installed):
    assert metrics.st_lpips_distance(*pair()) is None
    assert metrics.st_lpips_unavailable() == (
        "ST-LPIPS n/a: expected the package stlpips-pytorch, got none; pip install stlpips-pytorch==0.0.2"
    )


def test_a_damaged_package_is_one_line(not_installed, st_lpips_weights, tmp_path, monkeypatch):
    path = tmp_path / st_lpips.WEIGHTS
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(st_lpips, "find_spec", lambda name: spec)

    def refused(words):
        with pytest.raises(PerceptualError, match=words) as error:
            load_st_lpips()
        line = str(error.value)
        assert line.startswith(f"ST-LPIPS: {path}: expected ") and "\n" not in line
        assert line.endswith("; pip install --force-reinstall stlpips-pytorch==0.0.2")

    refused("No such file")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a file")
    refused("expected weights, got")
    torch.save({name: weight for name, weight in st_lpips_weights.items() if name != "lin4.model.1.weight"}, path)
    refused(r"lin4.model.1.weight \(1, 256, 1, 1\), got none")
    torch.save(st_lpips_weights, path)
    assert load_st_lpips().keys() == st_lpips_weights.keys()
