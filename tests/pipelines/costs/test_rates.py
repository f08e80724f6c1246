"""Each rate is in the tables of benchmarks/RESULTS.md, and each price has a date."""

import re
from dataclasses import fields
from datetime import date
from pathlib import Path

import pytest
import yaml

from pipelines.costs import prices, rates
from pipelines.costs.rates import Rate

ROOT = Path(__file__).parents[3]
ALL = [value for value in vars(rates).values() if isinstance(value, Rate)]
ALL += [rate for group in (*rates.TRAINING.values(), rates.ZOOM) for rate in group]
DERIVED = {0.915: 4.37}
"""Rates that are four crops by the seconds of their step."""


@pytest.mark.parametrize("rate", ALL, ids=lambda rate: f"{rate.value:g}-{rate.commit}")
def test_a_rate_stands_in_the_results_with_its_commit(rate):
    pages = (ROOT / "benchmarks/RESULTS.md").read_text() + (ROOT / "docs/scale.md").read_text()
    assert re.search(rf"(?<![\d.]){re.escape(f'{DERIVED.get(rate.value, rate.value):,g}')}0?(?![\d])", pages)
    assert rate.commit in pages and rate.command.split(" --")[0] in pages


@pytest.mark.parametrize("rate", ALL, ids=lambda rate: f"{rate.value:g}-{rate.commit}")
def test_a_rate_says_how_it_was_measured(rate):
    assert rate.value > 0 and date.fromisoformat(rate.date) <= date(2100, 1, 1)
    assert all(getattr(rate, field.name) for field in fields(rate))


def test_every_gpu_rate_has_an_instance_with_a_price():
    gpus = {rate.hardware for rate in ALL} - {rates.CPU_CORE}
    assert gpus == {"H200"} and all(prices.nodes_with(gpu) for gpu in gpus)
    assert date.fromisoformat(prices.DATE)


def test_the_instances_of_cluster_yaml_have_prices():
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    used = {each["node_config"]["InstanceType"] for each in types.values()}
    assert used <= set(prices.INSTANCES)
