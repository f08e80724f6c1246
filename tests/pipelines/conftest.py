"""Fixtures of several test files: a network whose output is known."""

import pytest
import torch

from pipelines import config as configs
from pipelines.zoom import Zoomer
from sdan import checkpoint
from sdan.network import SDAN


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A checkpoint of an untrained network with skip="rendering": its output is bicubic enlargement."""
    torch.manual_seed(0)
    config = configs.smoke()
    folder = tmp_path_factory.mktemp("models") / "untrained"
    return checkpoint.save(folder, SDAN(config.model), config=configs.to_dict(config), scores={})


@pytest.fixture(scope="module")
def zoomer(untrained):
    return Zoomer.load(untrained)
