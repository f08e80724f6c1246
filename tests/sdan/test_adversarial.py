"""The discriminator fits its pictures, and the losses are those of SRGAN and ESRGAN."""

import math

import pytest
import torch

from sdan.adversarial import MIN_PX, Discriminator, discriminator_loss, generator_loss


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


@pytest.mark.parametrize(("side", "last"), [(MIN_PX, 4), (17, 5), (64, 4), (96, 6), (128, 4)])
def test_the_dense_layers_fit_the_picture(side, last):
    network = Discriminator(side, features=4)
    logits = network(torch.rand(2, 3, side, side))
    assert logits.shape == (2,) and logits.isfinite().all()
    channels = network.convolutions[-3].out_channels
    assert network.dense[0].in_features == channels * last**2


def test_a_side_of_96_is_srgans_network():
    convolutions = [layer for layer in Discriminator(96).convolutions if isinstance(layer, torch.nn.Conv2d)]
    shapes = [(layer.in_channels, layer.out_channels, layer.stride[0]) for layer in convolutions]
    assert shapes == [
        *((3, 64, 1), (64, 64, 2), (64, 128, 1), (128, 128, 2)),
        *((128, 256, 1), (256, 256, 2), (256, 512, 1), (512, 512, 2)),
    ]


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match="at least 16 px, got 8"):
        Discriminator(8)
    with pytest.raises(ValueError, match=r"expected pictures of shape \(3, 16, 16\), got \(3, 16, 20\)"):
        Discriminator(16, 4)(torch.rand(1, 3, 16, 20))


def test_standard_losses_are_cross_entropies():
    enlarged, real = torch.tensor([-0.5, 1.5]), torch.tensor([2.0, 0.25])
    generator = -(log_sigmoid(-0.5) + log_sigmoid(1.5)) / 2
    assert generator_loss(enlarged, real, "standard").item() == pytest.approx(generator, rel=1e-5)
    discriminator = -(log_sigmoid(2.0) + log_sigmoid(0.25) + log_sigmoid(0.5) + log_sigmoid(-1.5)) / 4
    assert discriminator_loss(enlarged, real, "standard").item() == pytest.approx(discriminator, rel=1e-5)


def test_relativistic_losses_compare_with_the_others_mean():
    enlarged, real = torch.tensor([-0.5, 1.5]), torch.tensor([2.0, 0.25])
    above = [value - 0.5 for value in (2.0, 0.25)]  # real, above the mean of the enlarged
    below = [value - 1.125 for value in (-0.5, 1.5)]
    discriminator = -sum([*map(log_sigmoid, above), *(log_sigmoid(-value) for value in below)]) / 4
    assert discriminator_loss(enlarged, real, "relativistic").item() == pytest.approx(discriminator, rel=1e-5)
    generator = -sum([*map(log_sigmoid, below), *(log_sigmoid(-value) for value in above)]) / 4
    assert generator_loss(enlarged, real, "relativistic").item() == pytest.approx(generator, rel=1e-5)
    assert generator_loss(real, enlarged, "relativistic").item() == pytest.approx(discriminator, rel=1e-5)
