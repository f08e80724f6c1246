"""A fine-tuning draws a set share of its crops from pairs that its model has been trained on."""

from collections import Counter
from dataclasses import replace

import pytest

from pipelines import config as configs
from pipelines.config import ConfigError
from pipelines.loader import index_split, pair_names, replayed, training_stream, with_new
from pipelines.retrain import fine_tuning
from pipelines.training.run_folder import RunShards


@pytest.fixture(scope="module")
def index(tiny_shards):
    return index_split(str(tiny_shards), "train")


def many(index, pairs, new):
    """The index as if it had `pairs` pairs, of which the last `new` are new."""
    paths = tuple(f"/s/split=train/{number:05d}_00005-00001_0.parquet" for number in range(pairs))
    return replace(index, paths=paths, tiles=(2,) * pairs, new=tuple(range(pairs - new, pairs)))


def drawn(index, share, crops):
    config = configs.override(configs.smoke(), {"train.replay_share": share})
    stream = training_stream(index, config)
    return Counter(stream.pair(number) for number in range(crops))


def test_new_pairs_are_those_the_model_has_not_seen(index):
    names = pair_names(index)
    assert with_new(index, names[:3]).new == (3,)
    assert with_new(index, []).new == (0, 1, 2, 3) and with_new(index, names).new == ()
    assert with_new(index, names[:3]).digest == index.digest


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
def test_the_share_of_old_pairs_is_exact(index, share):
    counts = drawn(many(index, 40, 20), share, 1000)
    old = sum(counts[pair] for pair in range(20))
    assert old == max(1000 * share, round(1000 * 20 / (20 + 10 * 20)))  # at least as if new pairs counted tenfold
    for kind in (range(20), range(20, 40)):  # within a kind, each pair comes equally often
        found = [counts[pair] for pair in kind]
        assert max(found) - min(found) <= 1


def test_few_new_pairs_are_not_learnt_by_heart(index):
    few = many(index, 1001, 1)
    assert replayed(few, 0.5) == pytest.approx(1000 / 1010)
    counts = drawn(few, 0.5, 1000)
    assert counts[1000] == 10  # ten times as often as an old pair


def test_batches_mix_old_and_new(index):
    stream = training_stream(many(index, 40, 20), configs.smoke())
    for first in range(0, 200, 4):
        kinds = {stream.pair(number) >= 20 for number in range(first, first + 4)}
        assert kinds == {True, False}


@pytest.mark.parametrize("new", [(), (0, 1, 2, 3)])
def test_without_both_kinds_all_pairs_are_alike(index, new):
    plain = training_stream(index, configs.smoke())
    stream = training_stream(replace(index, new=new), configs.smoke())
    assert [stream.pair(n) for n in range(40)] == [plain.pair(n) for n in range(40)]


def test_a_resumed_run_knows_its_new_pairs(index, tmp_path):
    shards = RunShards(replace(index, new=(1, 3)), index)
    shards.write(tmp_path)
    assert RunShards.read(tmp_path) == shards


def test_the_share_is_a_config_value_with_bounds():
    config = configs.smoke()
    assert config.train.replay_share == 0.5 and fine_tuning(config).train.replay_share == 0.5
    assert fine_tuning(config, replay_share=0.8).train.replay_share == 0.8
    stored = configs.to_dict(config)
    del stored["train"]["replay_share"]  # a champion of an older version
    assert configs.from_dict(stored).train.replay_share == 0.5
    for wrong in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=r"train\.replay_share: expected a value from 0 to below 1"):
            configs.override(config, {"train.replay_share": wrong})
