"""What --dry-run says, and that it changes nothing."""

import json

import pytest
from typer.testing import CliRunner

from pipelines import cli
from pipelines import config as configs
from pipelines.costs import estimate, rates
from pipelines.costs.estimate import PriceError, parse_prices
from pipelines.tune import Options
from preprocessing.estimate import Estimate

FREE = parse_prices([])


def files(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_preprocessing_by_measured_rates():
    cost = estimate.preprocessing(
        1000, Estimate(40_000, 10**10, None, 16.0), registers=False, asked=parse_prices(["2"])
    )
    hours = 1000 * rates.CPU_TASK_S.value / 3600
    name, got, dollars = cost.machines[0]
    assert (name, got, dollars) == ("here, 16 CPUs", pytest.approx(hours / 16), pytest.approx(hours / 8))
    name, got, dollars = cost.machines[1]
    assert name.startswith("c6i.4xlarge") and dollars == pytest.approx(0.68 * got)
    assert "1,000 tasks" in str(cost) and "10.00 GB" in str(cost) and rates.CPU_TASK_S.commit in str(cost)


def test_registration_takes_longer():
    plain, registered = (
        estimate.preprocessing(1, Estimate(40, 1, None, 1.0), registers=ecc, asked=FREE).machines[0][1]
        for ecc in (False, True)
    )
    assert registered == pytest.approx(plain + rates.ECC_TASK_S.value / 3600)


def test_the_rate_of_shards_is_better_than_ours():
    cost = estimate.preprocessing(10, Estimate(400, 10**8, 7200.0, 4.0), registers=True, asked=FREE)
    assert cost.machines[0][1] == 2.0 and "last run into these SHARDS" in str(cost)


def test_a_training_on_gpus_of_known_rate(tiny_shards, tmp_path):
    config = configs.override(configs.named("paper_4x"), {"train.epochs": 1000, "train.crops_per_epoch": 4270})
    cost = estimate.training(str(tiny_shards), config, tmp_path, workers=2, asked=parse_prices(["p5en.48xlarge=80"]))
    _, hours, dollars = next(one for one in cost.machines if one[0].startswith("p5en"))
    assert hours == pytest.approx(4_270_000 / (427 * 8) / 3600) and dollars == pytest.approx(80 * hours)
    assert "4,270,000 crops" in str(cost)


def test_the_rate_of_an_earlier_run_is_used(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "crops_per_s", lambda data, config, workers: 10.0)
    config = configs.override(configs.named("demo"), {"train.epochs": 36, "train.crops_per_epoch": 1000})
    cost = estimate.training(str(tiny_shards), config, tmp_path, workers=1, asked=FREE)
    assert cost.machines == (("here, 1 workers", 1.0, None),) and "earlier run" in str(cost)


def test_an_unmeasured_network_has_no_hours(tiny_shards, tmp_path):
    config = configs.override(configs.named("paper_4x"), {"model.blocks": 2})
    cost = estimate.training(str(tiny_shards), config, tmp_path, workers=None, asked=FREE)
    assert cost.machines == () and "hours: unknown" in str(cost)


def test_a_sweep_is_its_trials(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "crops_per_s", lambda data, config, workers: 10.0)
    config = configs.override(configs.named("demo"), {"train.epochs": 36, "train.crops_per_epoch": 1000})
    cost = estimate.sweep(str(tiny_shards), config, tmp_path, Options(trials=8, repeats=2), workers=None, asked=FREE)
    assert cost.machines == (("here, 1 workers", 12.0, None),) and "8 trials, and 4 repeats" in str(cost)


def test_zooming_counts_what_is_left():
    cost = estimate.zooming(1000, 400, asked=parse_prices(["0.5"]))
    assert "600 of 1,000 photographs" in str(cost) and "113.4 GB" in str(cost)
    assert next(one for one in cost.machines if one[0].startswith("p5en"))[1] == pytest.approx(600 * 11.4 / 8 / 3600)


@pytest.mark.parametrize("text", ["cheap", "-1", "x9.large=3", "nan", "inf", "g5.2xlarge="])
def test_prices_that_are_none_are_refused(text):
    with pytest.raises(PriceError, match="--dollars-per-hour"):
        parse_prices([text])


def test_a_dry_run_of_train_starts_and_writes_nothing(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.cluster.start_ray", lambda **kwargs: pytest.fail("Ray was started"))
    given = ["--data", str(tmp_path / "data"), "train", str(tiny_shards), "--config", "smoke", "--dry-run"]
    result = CliRunner().invoke(cli.app, given)
    assert result.exit_code == 0 and "dry run: " in result.output
    assert files(tmp_path) == []


def test_a_dry_run_of_tune_writes_nothing(tiny_shards, tmp_path):
    given = [
        "--data",
        str(tmp_path / "data"),
        "tune",
        str(tiny_shards),
        "--config",
        "smoke",
        "--trials",
        "3",
        "--dry-run",
    ]
    result = CliRunner().invoke(cli.app, given)
    assert result.exit_code == 0 and "3 trials" in result.output and files(tmp_path) == []


def test_a_dry_run_of_zoom_counts_a_folder(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png", "c.ARW", "c.JPG"):
        (photos / name).write_bytes(b"x")
    before = files(tmp_path)
    result = CliRunner().invoke(cli.app, ["zoom", str(photos), "-o", str(tmp_path / "out"), "--dry-run"])
    assert result.exit_code == 0 and "3 of 3 photographs" in result.output
    assert files(tmp_path) == before


def test_finished_photographs_are_not_counted(tmp_path):
    from pipelines.costs.photographs import counted
    from pipelines.zoom_folder.plan import RECORDS, _key

    photos, out = tmp_path / "photos", tmp_path / "out"
    (out / RECORDS).mkdir(parents=True)
    photos.mkdir()
    for name in ("a.png", "b.png"):
        (photos / name).write_bytes(b"x")
    (out / RECORDS / f"{_key('a_4x.png')}.{'0' * 16}.1").touch()
    (out / RECORDS / "options.json").write_text(json.dumps({}))
    assert counted([str(photos)], str(out), 4) == (2, 1)
