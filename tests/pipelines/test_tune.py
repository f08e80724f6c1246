"""`sdan tune`: what is refused before Ray starts, and a sweep of two trials over the real trainer."""

import shutil
import urllib.error

import pytest
from mlflow.tracking import MlflowClient

from pipelines import config as configs
from pipelines import registry, tune
from pipelines.loader import index_split
from preprocessing.storage import held

CONFIG = configs.override(configs.smoke(), {"train.epochs": 1, "train.seed": 2})
IMPORTS = "from tuning.space import choice, loguniform\n"


@pytest.fixture
def no_ray(monkeypatch):
    """Makes any start of Ray fail the test."""

    def start_ray(**options):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("pipelines.cluster.start_ray", start_ray)


def asked(options):
    """Keyword arguments of `tune`: those that are fields of Options are put into one."""
    own = {name: value for name, value in options.items() if name in tune.Options.__dataclass_fields__}
    return {"options": tune.Options(**{"trials": 2} | own)} | {k: v for k, v in options.items() if k not in own}


def refuse(shards, data, message, space=None, config=CONFIG, **options):
    """Check that tune raises one line with `message` and writes nothing to `data`."""
    if space is not None:
        path = data.parent / "space.py"
        path.write_text(IMPORTS + space)
        options["space"] = str(path)
    with pytest.raises(ValueError, match=message) as caught:
        tune.tune(str(shards), config, data=data, **asked(options))
    assert "\n" not in str(caught.value)
    assert type(caught.value).__module__.partition(".")[0] in ("preprocessing", "sdan", "tuning", "pipelines")
    assert not data.exists()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("SPACE = {'loss.align_wieght': loguniform(0.1, 1)}", "did you mean loss.align_weight"),
        ("SPACE = {'name': choice(['a', 'b'])}", "expected a known key, got 'name'"),
        ("SPACE = {}", "space.py: "),
        ("SPACE = {'loss.align_weight': 0.5}", "space.py: .*expected one of choice"),
        ("SPACE = {'loss.align_weight': choice([])}", "space.py: .*expected at least one"),
        ("OTHER = {}", "space.py: .*SPACE"),
        ("1 / 0", "space.py: .*ZeroDivisionError"),
        ("SPACE = {'model.packing_kernel': choice([3, 5])}", "got none among 2: .*packing_kernel.*"),
        ("SPACE = {'model.blocks': choice([1, 2])}\ndef CONSTRAINT(values): return 'too slow'", "among 2: too slow"),
    ],
)
def test_a_wrong_space_is_refused_before_ray_starts(space, message, tiny_shards, no_ray, tmp_path):
    refuse(tiny_shards, tmp_path / "data", message, space)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../sweep"}, r"sweep name: expected letters, digits.*got '\.\./sweep'"),
        ({"trials": 0}, "trials: expected at least 1, got 0"),
        ({"resume": True}, "expected a sweep 'sweep' to resume, got none"),
        ({"search": "best"}, "--search: expected one of tpe, random, grid, got 'best'"),
        ({"search": "grid"}, "--search grid: expected only choice and integer, got loss.align_weight: loguniform"),
        ({"metrics": ("val_psnr:up",)}, "--metric val_psnr:up: expected NAME, NAME:min or NAME:max"),
        ({"repeats": 0}, "--repeats: expected at least 1, got 0"),
        ({"gpus_per_trial": 1.5}, "--gpus-per-trial: expected a share of a GPU"),
    ],
)
def test_wrong_options_are_refused_before_ray_starts(options, message, tiny_shards, no_ray, tmp_path):
    refuse(tiny_shards, tmp_path / "data", message, **options)


def test_a_sweep_that_runs_is_not_started_again(tiny_shards, no_ray, tmp_path):
    with held(tmp_path / "sweeps" / "one"), pytest.raises(ValueError, match="--name one: expected a sweep that no"):
        tune.tune(str(tiny_shards), CONFIG, tune.Options(), data=tmp_path, name="one")


def test_an_unknown_space_names_those_that_exist(tiny_shards, no_ray, tmp_path):
    with pytest.raises(ValueError, match=r"--space: expected one of default, paper, size, offsets, or a file FILE.py"):
        tune.tune(str(tiny_shards), CONFIG, tune.Options(space="sizes"), data=tmp_path / "data")


def test_shards_that_do_not_fit_are_refused_before_ray_starts(tiny_shards, no_ray, tmp_path):
    refuse(tiny_shards, tmp_path / "data", "expected scale 8, got shards of scale 4", config=configs.srraw_8x())
    refuse(tmp_path / "nosuch", tmp_path / "data", "expected")
    train_only = shutil.copytree(tiny_shards, tmp_path / "shards", ignore=shutil.ignore_patterns("split=val"))
    refuse(train_only, tmp_path / "data", "expected at least one pair in split=val")


def test_a_searched_feature_loss_needs_its_weights(tiny_shards, no_ray, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("sdan.perceptual.st_lpips.find_spec", lambda name: None)  # nor VGG16
    space = "SPACE = {'loss.perceptual_weight': loguniform(0.1, 1)}"
    refuse(tiny_shards, tmp_path / "data", "--vgg-weights PATH", space)
    space = "SPACE = {'loss.st_lpips_weight': loguniform(0.1, 1)}"
    refuse(tiny_shards, tmp_path / "data", "expected the package stlpips-pytorch, got none", space)


@pytest.fixture(scope="module")
def swept(tiny_shards, tmp_path_factory):
    """(data folder, options, result) of a sweep of two trials."""
    data = tmp_path_factory.mktemp("tune") / "data"
    options = asked({"data": data, "trials": 2, "workers": 1, "name": "two", "space": "paper"})
    with (data.parent / "stderr.txt").open("w") as stderr, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", stderr)
        return data, options, tune.tune(str(tiny_shards), CONFIG, **options)


def runs_of(data):
    """Every run of the sweeps' experiment, by id: status, end, params and metrics."""
    client = MlflowClient(registry.default_tracking_uri(data))
    found = client.search_runs([client.get_experiment_by_name("sdan-sweeps").experiment_id])
    return {run.info.run_id: run for run in found}


@pytest.mark.slow
def test_a_redirected_sweep_prints_lines_for_each_trial(swept):
    data, _, result = swept
    said = (data.parent / "stderr.txt").read_text().splitlines()
    assert said[0].startswith("tune: plan: 2 trials, one after the other, each with ")
    lines = [line for line in said if line.startswith("tune: trial ")]
    assert [line.split(" (")[0] for line in lines] == ["tune: trial 1"] * 2 + ["tune: trial 2"] * 2
    for trial in result.trials:
        start, end = (line for line in lines if trial.trial_id in line)
        assert " started with " in start and f"model.packing_kernel={trial.overrides['model.packing_kernel']}" in start
        assert f" finished: val_psnr {trial.score:.4f} at epoch 1, with " in end


@pytest.mark.slow
def test_a_sweep_has_one_finished_child_run_per_trial(swept, tiny_shards):
    data, _, result = swept
    runs = runs_of(data)
    parent = runs.pop(result.parent_run_id)
    assert parent.info.status == "FINISHED" and parent.data.tags["config"] == "smoke"
    assert set(runs) == {trial.run_id for trial in result.trials} and len(runs) == 2
    for trial in result.trials:
        run = runs[trial.run_id]
        assert (trial.status, run.info.status) == ("finished", "FINISHED")
        assert run.data.tags["mlflow.parentRunId"] == result.parent_run_id
        assert set(trial.overrides) == {"model.packing_kernel", "loss.align_weight"}
        assert {name: run.data.params[name] for name in trial.overrides} == {
            name: str(value) for name, value in trial.overrides.items()
        }
        assert run.data.params["train.epochs"] == "1"
        assert run.data.metrics["val_psnr"] == trial.score
        model = registry.resolve_model("", data / "runs" / f"two-{trial.trial_id}" / "model")
        assert model.is_dir()
    assert index_split(str(tiny_shards), "train").num_tiles == 8  # the sweep wrote nothing to the shards


@pytest.mark.slow
def test_the_summary_names_the_best_trial(swept):
    _, _, result = swept
    best = result.trials[0]
    assert result.best_score == best.score == max(trial.score for trial in result.trials)
    lines = tune.summary(result).splitlines()
    assert [line for line in lines if line.startswith("*")] == [line for line in lines if best.trial_id in line]
    (named,) = [line for line in lines if line.startswith("best: ")]
    assert named.startswith(f"best: {best.score:.3f} with ")
    for name, value in best.overrides.items():
        assert f"--set {name}={value}" in named
    assert str(result.folder) in lines[-1] and (result.folder / "trials.txt").is_file()


@pytest.mark.slow
def test_resuming_a_finished_sweep_changes_nothing(swept, tiny_shards):
    data, options, result = swept
    before = runs_of(data)
    again = tune.tune(str(tiny_shards), CONFIG, **options, resume=True)
    assert again == result
    after = runs_of(data)
    assert after.keys() == before.keys()
    for trial in result.trials:
        assert after[trial.run_id].info.end_time == before[trial.run_id].info.end_time
        assert after[trial.run_id].data.metrics == before[trial.run_id].data.metrics
