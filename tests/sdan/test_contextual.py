"""CX and CoBi in blocks of rows against a plain form with the whole matrix; points, weights and memory."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sdan.perceptual import contextual
from sdan.perceptual.contextual import Points, contextual_loss, map_points, patch_points


def naive(points, target, spatial_weight):
    """The papers' equations, with one whole matrix per picture."""
    losses = []
    centre = target.features.mean(1, keepdim=True)
    x, y = F.normalize(points.features - centre, dim=2), F.normalize(target.features - centre, dim=2)
    apart = (target.positions[:, None] - target.positions[None]).square().sum(2).sqrt()
    for image in range(len(x)):
        distance = 1 - x[image] @ y[image].T + spatial_weight * apart
        relative = distance / (distance.min(1, keepdim=True).values + 1e-5)
        affinity = torch.exp((1 - relative) / 0.5)
        affinity = affinity / affinity.sum(1, keepdim=True)
        share = target.weight[image] / target.weight[image].sum()
        losses.append(-torch.log((share * affinity.max(0).values).sum()))
    return torch.stack(losses).mean()


def random_points(seed, count=35, channels=6, batch=2, dtype=torch.float64, weight=None):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, count, channels, generator=generator, dtype=dtype)
    positions = torch.rand(count, 2, generator=torch.Generator().manual_seed(9), dtype=dtype)
    return Points(features, positions, torch.ones(batch, count, dtype=dtype) if weight is None else weight)


@pytest.mark.parametrize("spatial_weight", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_blocks_equal_the_whole_matrix_in_value_and_gradients(monkeypatch, spatial_weight, rows):
    monkeypatch.setattr(contextual, "BLOCK_ELEMENTS", 35 * rows)
    weight = torch.rand(2, 35, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).round(decimals=1)
    results = []
    for form in (naive, contextual_loss):
        points, target = random_points(0), random_points(1, weight=weight)
        points.features.requires_grad_(), target.features.requires_grad_()
        loss = form(points, target, spatial_weight=spatial_weight)
        loss.backward()
        results.append((loss.detach(), points.features.grad, target.features.grad))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert results[0][1].abs().max() > 1e-4


def test_gradients_equal_finite_differences():
    target = random_points(1, count=7, batch=1)

    def loss(x, y):
        return contextual_loss(target._replace(features=x), target._replace(features=y), spatial_weight=0.2)

    x, y = random_points(0, count=7, batch=1).features.requires_grad_(), target.features.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (x, y))


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operator returned, in elements."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def measured(form, count):
    """(elements saved for backward, elements of the largest tensor) of a forward and backward pass."""
    points, target = random_points(0, count, dtype=torch.float32), random_points(1, count, dtype=torch.float32)
    points.features.requires_grad_()
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        form(points, target, spatial_weight=0.1).backward()
    return sum(saved.values()), largest.elements


def test_memory_is_linear_in_the_number_of_points(monkeypatch):
    monkeypatch.setattr(contextual, "BLOCK_ELEMENTS", 7000)
    saved, largest = measured(contextual_loss, 600)
    assert largest <= 2 * 600 * 6  # a batch of features; a block is smaller
    twice_saved, twice_largest = measured(contextual_loss, 1200)
    assert twice_saved <= 2.01 * saved and twice_largest <= 2.01 * largest
    whole_saved, whole_largest = measured(naive, 600)
    assert whole_saved > 2 * 600**2 and whole_largest >= 600**2  # the measurement does see a whole matrix
    assert saved < 0.05 * whole_saved


def test_the_loss_is_float32_under_autocast():
    points, target = random_points(0, dtype=torch.float32), random_points(1, dtype=torch.float32)
    points.features.requires_grad_()
    expected = contextual_loss(points, target, spatial_weight=0.1)
    (expected_grad,) = torch.autograd.grad(expected, points.features)
    with torch.autocast("cpu", torch.bfloat16):
        got = contextual_loss(points, target, spatial_weight=0.1)
        (got_grad,) = torch.autograd.grad(got, points.features)
    assert got.dtype == torch.float32 and got == expected and torch.equal(got_grad, expected_grad)
    half = contextual_loss(
        points._replace(features=points.features.bfloat16()), target._replace(features=target.features.bfloat16())
    )
    assert half.dtype == torch.float32


def test_cx_ignores_positions_and_cobi_does_not():
    target = random_points(1)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    shuffled = target._replace(features=target.features[:, order])
    assert float(contextual_loss(target, target)) < 1e-3
    assert float(contextual_loss(shuffled, target)) < 1e-3
    assert float(contextual_loss(target, target, spatial_weight=0.5)) < 1e-3
    assert float(contextual_loss(shuffled, target, spatial_weight=0.5)) > 0.2


def test_target_points_are_weighted():
    points, target = random_points(0), random_points(1)
    target.features[:, 20:] = -points.features[:, 20:] * 5  # no point resembles these
    target.weight[:, 20:] = 0
    alone = contextual_loss(points, target)
    torch.testing.assert_close(alone, naive(points, target, 0.0))
    target.weight[:, 20:] = 1
    assert float(contextual_loss(points, target)) != pytest.approx(float(alone), rel=1e-3)
    target.weight[:] = 0
    points.features.requires_grad_()
    nothing = contextual_loss(points, target)
    nothing.backward()
    assert float(nothing.detach()) == 0 and float(points.features.grad.abs().max()) == 0


def test_points_are_a_grid_of_at_most_64_a_side():
    image = torch.arange(3 * 12 * 9, dtype=torch.float32).reshape(1, 3, 12, 9)
    mask = torch.ones(1, 1, 12, 9)
    mask[..., :3, :] = 0
    dense = patch_points(image, mask, 5)
    assert dense.features.shape == (1, 8 * 5, 75) and dense.positions.shape == (40, 2)
    torch.testing.assert_close(dense.features[0, 7], image[0, :, 1:6, 2:7].flatten())
    torch.testing.assert_close(dense.positions[7], torch.tensor([1 / 12, 2 / 9]))
    assert float(dense.weight[0, 0]) == pytest.approx(2 / 5) and float(dense.weight[0, -1]) == 1
    large = patch_points(torch.rand(1, 3, 200, 150), torch.ones(1, 1, 200, 150), 10)
    assert large.features.shape == (1, 64 * 47, 300) and large.weight.shape == (1, 64 * 47)
    assert large.positions[:, 0].max() < 191 / 200
    maps = map_points(torch.rand(2, 7, 150, 200), torch.ones(2, 1, 300, 400))
    assert maps.features.shape == (2, 30 * 40, 7)  # every 5th point: 4 would fit as well, but is even
    assert maps.weight.shape == (2, 1200)


@pytest.mark.parametrize("side", [64, 65, 128, 256, 448, 1000])
def test_points_sample_every_phase_of_the_pixel_shuffle(side):
    rows = torch.arange(float(side)).view(1, 1, side, 1).expand(1, 1, side, 8)  # a map of row numbers
    sampled = map_points(rows, torch.ones(1, 1, side, 8)).features.unique()
    assert len(sampled) <= 64 and {int(row) % 4 for row in sampled} == {0, 1, 2, 3}


def test_point_sets_of_different_sizes_are_refused():
    with pytest.raises(
        ValueError, match=r"contextual loss: expected \(2, 8, 6\) points, the target's, got \(2, 7, 6\)"
    ):
        contextual_loss(random_points(0, count=7), random_points(1, count=8))
