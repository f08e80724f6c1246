"""Named runs, dotted names, and the one line that a wrong one gets."""

import json

import pytest

from pipelines import config as configs
from pipelines.config import ConfigError


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_every_named_config_is_valid_and_survives_json(name):
    config = configs.named(name)
    assert config.name == name
    assert configs.from_dict(json.loads(json.dumps(configs.to_dict(config)))) == config


def test_the_papers_config_is_the_papers():
    config = configs.paper_4x()
    assert (config.model.input, config.model.features, config.model.blocks) == ("mosaic", 64, 16)
    assert config.model.skip == "none"
    assert config.loss.self_reference_weight == 0
    assert (config.train.crop_px, config.input_px, config.train.epochs) == (64, 128, 300)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("model.packing_kernel", "4", 4),
        ("model.flips", "false", False),
        ("model.offset", "per_point", "per_point"),
        ("loss.align_weight", "0.25", 0.25),
        ("train.betas", "0.8,0.95", (0.8, 0.95)),
        ("train.crops_per_epoch", "none", None),
        ("train.crops_per_epoch", "12", 12),
        ("train.learning_rate", "2e-4", 2e-4),
    ],
)
def test_text_is_read_as_the_fields_type(key, text, expected):
    changed = configs.override(configs.paper_4x(), {key: text})
    assert configs.flatten(changed)[key] == expected


def test_values_of_a_search_space_need_no_text():
    changed = configs.override(configs.paper_4x(), {"model.packing_kernel": 2, "loss.align_weight": 0.5})
    assert (changed.model.packing_kernel, changed.loss.align_weight) == (2, 0.5)


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("model.packing=4", "did you mean model.packing_kernel"),
        ("packing_kernel", "KEY=VALUE expected"),
        ("model.packing_kernel=7", "7"),
        ("model.features=many", "int expected, got many"),
        ("model.features=1.5", "int expected, got 1.5"),
        ("model.flips=perhaps", "true or false expected"),
        ("model.input=jpeg", "mosaic"),
        ("train.epochs=0", "at least 1 expected, got 0"),
        ("train.epochs=inf", "int expected, got inf"),
        ("train.grad_clip=-1", "0 or more expected"),
        ("train.betas=2,3", "from 0 up to 1"),
        ("loss.border_px=256", "at most 255 expected"),
        ("loss.pixel_weight=0", "above 0 expected"),
        ("train.betas=0.9", "2 values"),
        ("name=other", "unknown key 'name'"),
    ],
)
def test_a_wrong_assignment_gets_one_clear_line(assignment, said):
    with pytest.raises(ConfigError) as caught:
        configs.override(configs.paper_4x(), configs.parse_assignments([assignment]))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_config_names_the_known_ones():
    with pytest.raises(ConfigError, match="srraw_4x"):
        configs.named("srraw")
