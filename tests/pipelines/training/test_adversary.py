"""Adversarial training: two networks, each with its own optimizer, in one step; and SRResNet, whose rows need it."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from pipelines import config as configs
from pipelines.config import ConfigError
from pipelines.loader import CropStream, index_split, model_inputs
from pipelines.training import adversary, step
from pipelines.training.graph import check_graph
from sdan import checkpoint
from sdan.baselines import SRResNet

CPU = torch.device("cpu")
CHANGES = {
    "loss.self_reference_weight": 0.0,
    "loss.adversarial_weight": 0.1,
    "loss.border_px": 48,
    "train.precision": "fp32",
}


def same(model):
    return model


@pytest.fixture(scope="module")
def batch(tiny_shards):
    stream = CropStream(index_split(str(tiny_shards), "train"), seed=0, crop_px=16, augment=True)
    crops = [stream.crop(number) for number in range(2)]
    stacked = {name: torch.stack([torch.from_numpy(crop[name]) for crop in crops]) for name in crops[0]}
    return model_inputs(stacked, configs.smoke().model, CPU)


def config_of(**changes):
    config = configs.override(configs.smoke(), {**CHANGES, **changes})
    return replace(config, architecture="SRResNet")


def started(config):
    return step.start(config, None, CPU, same)


def weights(network):
    return copy.deepcopy(network.state_dict())


def changed(before, network):
    return any(not torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("kind", ["standard", "relativistic"])
def test_a_step_trains_both_networks(batch, kind):
    config = config_of(**{"loss.adversarial_kind": kind})
    training = started(config)
    assert isinstance(training.model, SRResNet)
    before = weights(training.model), weights(training.adversary.network)
    terms = step.train_step(training, batch, config, 1e-3)
    assert terms.keys() == {"loss", "align", "zoom", "adversarial", "discriminator", "grad_norm", "skipped"}
    expected = terms["align"] + terms["zoom"] + 0.1 * terms["adversarial"]
    assert float(terms["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert changed(before[0], training.model) and changed(before[1], training.adversary.network)
    losses = [float(step.train_step(training, batch, config, 1e-3)["discriminator"]) for _ in range(4)]
    assert min(losses) < float(terms["discriminator"])


def test_the_generator_term_leaves_the_discriminator(batch):
    training = started(config_of())
    zoomed = torch.rand_like(batch.target).requires_grad_()
    training.adversary.term(zoomed, batch.target).backward()
    assert zoomed.grad[..., 56:-56, 56:-56].abs().sum() > 0
    assert zoomed.grad[..., :48, :].abs().sum() == 0  # the loss's border
    assert all(each.grad is None and each.requires_grad for each in training.adversary.network.parameters())


def test_a_restored_training_takes_the_same_step(batch, tmp_path):
    config = config_of()
    training = started(config)
    for _ in range(2):
        step.train_step(training, batch, config, 1e-3)
    state = training.state()
    checkpoint.save(
        tmp_path / "c", training.averaged, config=configs.to_dict(config), scores={}, trainer_state=state
    )  # fmt: skip
    assert configs.from_dict(checkpoint.load(tmp_path / "c").config).architecture == "SRResNet"
    resumed = started(config)
    resumed.restore(tmp_path / "c")
    for one in (training, resumed):
        step.train_step(one, batch, config, 1e-3)
    for networks in ((training.model, resumed.model), (training.adversary.network, resumed.adversary.network)):
        assert not changed(weights(networks[0]), networks[1])


def test_a_step_without_a_finite_loss_changes_neither_network(batch):
    config = config_of()
    training = started(config)
    step.train_step(training, batch, config, 1e-3)
    before = weights(training.model), weights(training.adversary.network)
    terms = step.train_step(training, batch._replace(x=torch.full_like(batch.x, math.nan)), config, 1e-3)
    assert float(terms["skipped"]) == 1
    assert not changed(before[0], training.model) and not changed(before[1], training.adversary.network)


def test_workers_average_the_discriminators_gradient(monkeypatch):
    """As if a second worker had gradients of three times the size."""
    monkeypatch.setattr(adversary.dist, "all_reduce", lambda values: values.mul_(4))
    monkeypatch.setattr(adversary.dist, "get_world_size", lambda: 2)
    gradients = [torch.ones(2, 3), torch.full((4,), 5.0)]
    adversary._average(gradients)
    assert torch.equal(gradients[0], torch.full((2, 3), 2.0)) and torch.equal(gradients[1], torch.full((4,), 10.0))


def test_settings_that_do_not_suit_it_are_refused():
    with pytest.raises(ConfigError, match=r"train\.accumulate: expected 1 with loss\.adversarial_weight"):
        config_of(**{"train.accumulate": 2})
    with pytest.raises(ConfigError, match=r"known_shift_weight: expected 0 for SRResNet"):
        config_of(**{"loss.known_shift_weight": 0.1})
    with pytest.raises(ConfigError, match="adversarial_kind: expected one of standard, relativistic"):
        config_of(**{"loss.adversarial_kind": "hinge"})
    with pytest.raises(ConfigError, match=r"border_px: expected at most 56"):
        config_of(**{"loss.border_px": 57})
    graph = config_of(**{"train.cuda_graph": True})
    with pytest.raises(ConfigError, match="expected no adversarial loss"):
        check_graph(graph, device_type="cuda", workers=1, precision="fp32")
