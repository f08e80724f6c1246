"""The command of a job, and which paths it may name."""

import shlex
from pathlib import Path

import pytest
import typer

from pipelines import cli
from pipelines.jobs import request
from pipelines.jobs.command import ClusterCommand
from pipelines.jobs.request import ClusterRequestError, Given, check_address, command, environment

VERBS = {
    name: verb for name, verb in typer.main.get_command(cli.app).commands.items() if isinstance(verb, ClusterCommand)
}


def words(verb, *given, data="/shared", working_dir=None):
    """The words of the job's command after the setting of the path."""
    return shlex.split(command(verb, given, data=data, working_dir=working_dir))[1:]


def test_verbs_that_work_on_data_take_cluster():
    assert {"preprocess", "train", "evaluate", "tune", "retrain", "zoom", "doctor"} <= set(VERBS)
    for verb in VERBS.values():
        assert {"--cluster", "--working-dir"} <= {option for one in verb.params for option in one.opts}


def test_every_parameter_that_names_a_path_is_checked():
    kinds = ("RAW", "SHARDS", "PHOTO", "OUT", "URI", "PATH", "FILE", "DIR")
    named = {
        one.name
        for verb in VERBS.values()
        for one in verb.params
        if one.name != "working_dir" and any(kind in (one.metavar or "") for kind in kinds)
    }
    assert named <= request.PLACES and len(named) >= 9


def test_the_command_repeats_what_was_given():
    raw = Given("raw", None, ("s3://b/raw",))
    values = Given("assignments", "--set", ("a=1", "b=two words"))
    flag = Given("resume", "--resume", (True,), flag=True)
    assert words("train", values, flag, raw) == [
        *("sdan", "--data", "/shared", "train", "--set", "a=1", "--set", "b=two words", "--resume", "s3://b/raw"),
    ]


def test_a_working_directory_runs_its_own_code():
    assert words("preprocess", data=None, working_dir=Path())[:3] == ["python", "-m", "pipelines.cli"]


def test_names_that_start_with_a_dash_stay_arguments():
    given = Given("version", None, ("-1",))
    assert words("train", given)[-2:] == ["--", "-1"]


@pytest.mark.parametrize(
    "value", ["s3://bucket/raw", "/shared/raw", "/shared/a/../raw", "models:/sdan@champion", "runs:/abc"]
)
def test_places_that_the_cluster_sees_pass(value):
    assert value in words("train", Given("shards", None, (value,)))


@pytest.mark.parametrize(
    "value", ["raw", "./raw", "/other/raw", "/shared/../etc", "/sharedx/raw", "file:///shared/raw"]
)
def test_local_paths_are_refused_in_one_line(value):
    with pytest.raises(ClusterRequestError, match="expected with --cluster an s3:// URI or a path below") as caught:
        command("train", [Given("shards", None, (value,))], data="/shared", working_dir=None)
    assert str(caught.value).startswith(f"SHARDS {value}: ") and "\n" not in str(caught.value)


def test_names_of_models_and_spaces_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "starter-rgb" in words("evaluate", Given("model", "--model", ("starter-rgb",)))
    (tmp_path / "mine").mkdir()
    with pytest.raises(ClusterRequestError, match="--model mine"):
        command("evaluate", [Given("model", "--model", ("mine",))], data="/shared", working_dir=None)


def test_small_files_come_from_the_working_directory(tmp_path):
    (tmp_path / "bad.txt").write_text("00001/00002\n")
    given = Given("exclude", "--exclude", ("bad.txt",))
    assert "bad.txt" in words("preprocess", given, data=None, working_dir=tmp_path)
    with pytest.raises(ClusterRequestError, match="expected a file in --working-dir"):
        command("preprocess", [Given("exclude", "--exclude", ("no.txt",))], data=None, working_dir=tmp_path)


@pytest.mark.parametrize(("data", "said"), [(None, "expected with --cluster a folder"), ("data", "got a relative one")])
def test_runs_need_an_absolute_shared_folder(data, said):
    with pytest.raises(ClusterRequestError, match=said):
        command("train", [], data=data, working_dir=None)


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "ray://head:10001", "http://head", "auto", "http://:8265"])
def test_other_addresses_are_refused(address):
    with pytest.raises(ClusterRequestError, match="http://HOST:8265"):
        check_address(address)


def test_addresses_of_job_servers_pass():
    assert check_address("http://127.0.0.1:8265/") == "http://127.0.0.1:8265"
    assert check_address("https://ray.example.org:443") == "https://ray.example.org:443"


def test_a_password_in_the_address_is_refused_and_not_shown():
    with pytest.raises(ClusterRequestError, match="expected no password") as caught:
        check_address("http://me:secret@head:8265")
    assert "secret" not in str(caught.value)


def test_only_the_address_of_mlflow_goes_with_the_job():
    shell = {"MLFLOW_TRACKING_URI": "http://10.0.0.1:5000", "AWS_SECRET_ACCESS_KEY": "x"}
    assert environment(shell) == {"MLFLOW_TRACKING_URI": "http://10.0.0.1:5000"}
    assert environment({"MLFLOW_TRACKING_URI": "sqlite:///x.db"}) == {}
    with pytest.raises(ClusterRequestError, match="expected no password") as caught:
        environment({"MLFLOW_TRACKING_URI": "http://me:secret@10.0.0.1:5000"})
    assert "secret" not in str(caught.value)
