"""What a trial measures besides its training, without Ray: crops, cost, per-crop scores of a checkpoint."""

import json
from contextlib import contextmanager

import pytest
from PIL import Image

from pipelines import config as configs
from pipelines.loader import index_split
from pipelines.registry import RegistryError
from pipelines.scoring.held_out import held_out
from pipelines.sweeping.trainer import cost, register_winner, save_crops, tiles_of
from pipelines.training.run_folder import HELD_OUT
from sdan import checkpoint
from sdan.network import SDAN


@pytest.fixture(scope="module")
def held(tiny_shards):
    return held_out(index_split(str(tiny_shards), "val"), configs.smoke(), limit=2, align=False)


def test_a_trials_crops_are_one_picture(held, tmp_path):
    config = configs.smoke()
    saved = checkpoint.save(tmp_path / "model", SDAN(config.model), config=configs.to_dict(config), scores={})
    save_crops(saved, held, tmp_path / "crops" / "t1.jpg")
    with Image.open(tmp_path / "crops" / "t1.jpg") as picture:
        assert picture.format == "JPEG" and picture.width > 3 * 128 and picture.height > 2 * 128


def test_the_cost_is_positive_and_grows_with_the_network(held):
    def of(blocks):
        return cost(SDAN(configs.override(configs.smoke(), {"model.blocks": blocks, "model.features": 32}).model), held)

    assert 0 < of(1) < of(24)


def test_per_crop_scores_come_from_the_checkpoint(tmp_path):
    class Saved:
        @contextmanager
        def as_directory(self):
            yield str(tmp_path)

    assert tiles_of(None) is None and tiles_of(Saved()) is None
    (tmp_path / HELD_OUT).write_text(json.dumps({"00001/a@0,0": 21.5}))
    assert tiles_of(Saved()) == {"00001/a@0,0": 21.5}


def test_a_stopped_winner_cannot_be_registered(tmp_path):
    with pytest.raises(RegistryError, match=r"--register, .*: expected the model of trial t1, got none") as caught:
        register_winner(tmp_path, "sweep", "t1", "run")
    assert "\n" not in str(caught.value)
