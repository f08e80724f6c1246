"""Named configs, dotted names, and the one-line message for a wrong name or value."""

import json

import pytest

from pipelines import config as configs
from pipelines.config import ConfigError


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_every_named_config_is_valid_and_survives_json(name):
    config = configs.named(name)
    assert config.name == name
    assert configs.from_dict(json.loads(json.dumps(configs.to_dict(config)))) == config


def test_paper_4x_has_the_papers_values():
    config = configs.paper_4x()
    assert (config.model.input, config.model.features, config.model.blocks) == ("mosaic", 64, 16)
    assert config.model.skip == "none"
    assert config.loss.self_reference_weight == 0
    assert (config.train.crop_px, config.input_px, config.train.epochs) == (64, 128, 300)
    assert (config.train.precision, config.train.use_tf32) == ("fp32", False)


def test_deterministic_training_does_not_use_tf32():
    assert configs.srraw_4x().train.use_tf32
    assert not configs.override(configs.srraw_4x(), {"train.deterministic": "true"}).train.use_tf32


def test_a_config_of_an_older_version_is_read():
    stored = configs.to_dict(configs.srraw_4x())
    for name in ("tf32", "cuda_graph"):
        del stored["train"][name]
    stored["train"]["layout"] = "channels_last"  # the default then
    assert configs.from_dict(stored) == configs.override(configs.srraw_4x(), {"train.layout": "channels_last"})


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
def test_set_parses_text_as_the_type_of_the_field(key, text, expected):
    changed = configs.override(configs.paper_4x(), {key: text})
    assert configs.flatten(changed)[key] == expected


def test_values_of_a_search_space_need_not_be_text():
    changed = configs.override(configs.paper_4x(), {"model.packing_kernel": 2, "loss.align_weight": 0.5})
    assert (changed.model.packing_kernel, changed.loss.align_weight) == (2, 0.5)


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("model.packing=4", "did you mean model.packing_kernel"),
        ("packing_kernel", "--set: expected KEY=VALUE"),
        ("model.packing_kernel=7", "packing_kernel=7"),
        ("model.features=many", "expected int, got many"),
        ("model.features=1.5", "expected int, got 1.5"),
        ("model.flips=perhaps", "expected true or false"),
        ("model.input=jpeg", "expected one of mosaic"),
        ("train.epochs=0", "expected at least 1, got 0"),
        ("train.epochs=inf", "expected int, got inf"),
        ("train.grad_clip=-1", "expected 0 or more, got -1"),
        ("train.betas=2,3", "expected two values in [0, 1)"),
        ("loss.border_px=256", "expected at most 255"),
        ("loss.pixel_weight=0", "expected at least one above 0"),
        ("train.betas=0.9", "expected 2 values"),
        ("name=other", "expected a known key, got 'name'"),
    ],
)
def test_a_wrong_assignment_gets_one_line(assignment, said):
    with pytest.raises(ConfigError) as caught:
        configs.override(configs.paper_4x(), configs.parse_assignments([assignment]))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_message_for_an_unknown_config_lists_the_known():
    with pytest.raises(ConfigError, match="srraw_4x"):
        configs.named("srraw")
