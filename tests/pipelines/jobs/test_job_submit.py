"""Following a job: its log, its exit code, a connection that breaks; and `--cluster` on the command line."""

import socket
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from pipelines import cli
from pipelines.jobs import submit as jobs
from pipelines.jobs.submit import Job, JobError


class FakeClient:
    """A job server with one job: `parts` of its log per connection, then the states that it reports in turn."""

    def __init__(self, logs, states):
        self.logs, self.states, self.submitted = list(logs), list(states), []

    def submit_job(self, *, entrypoint, runtime_env):
        self.submitted.append((entrypoint, runtime_env))
        return "raysubmit_1"

    async def tail_job_logs(self, identifier):
        for part in self.logs.pop(0):
            if isinstance(part, BaseException):
                raise part
            yield part

    def get_job_info(self, identifier):
        status, code = self.states.pop(0)
        return SimpleNamespace(status=status, driver_exit_code=code, message="worker died")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(jobs, "LOOK_S", 0.0)


@pytest.fixture
def server():
    """The address of something that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def follow(logs, states):
    """(exit code, what was written) of following such a job."""
    written = []
    return Job(FakeClient(logs, states), "http://h:8265", "raysubmit_1").follow(written.append), "".join(written)


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ((JobStatus.SUCCEEDED, 0), 0),
        ((JobStatus.FAILED, 3), 3),
        ((JobStatus.FAILED, 130), 130),
        ((JobStatus.STOPPED, None), 143),
    ],
)
def test_the_exit_code_is_passed_on(state, code):
    assert follow([["one\n", "two\n"]], [state]) == (code, "one\ntwo\n")


def test_a_log_goes_on_where_a_broken_connection_stopped_it():
    logs = [["one\n", "tw", RuntimeError("closed")], ["one\ntwo\n", "three\n"], ["one\ntwo\nthree\nfour\n"]]
    states = [(JobStatus.RUNNING, None), (JobStatus.SUCCEEDED, 0)]
    assert follow(logs, states) == (0, "one\ntwo\nthree\nfour\n")


def test_a_job_that_never_started_says_why():
    with pytest.raises(JobError, match="expected it to run, got worker died"):
        follow([[]], [(JobStatus.FAILED, None)])


def test_a_server_that_stays_away_ends_the_following(monkeypatch):
    monkeypatch.setattr(jobs, "LOST_S", -1.0)
    with pytest.raises(JobError, match="got connection refused; job raysubmit_1 goes on; follow it with"):
        follow([[OSError("connection refused")]], [])


def test_the_working_directory_is_uploaded_without_data(server, tmp_path):
    client = FakeClient([], [])
    jobs.submit(server, "sdan status", working_dir=tmp_path, env_vars={}, make=lambda address: client)
    ((_, runtime_env),) = client.submitted
    assert runtime_env["working_dir"] == str(tmp_path) and {"data", ".venv", ".git"} <= set(runtime_env["excludes"])
    jobs.submit(server, "sdan status", working_dir=None, env_vars={"A": "b"}, make=lambda address: client)
    assert client.submitted[1][1] == {"env_vars": {"A": "b"}}


def test_a_wrong_token_says_where_it_belongs(server):
    def refuses(address):
        raise RuntimeError("Request failed with status code 401: Unauthorized")

    with pytest.raises(JobError, match=r"export RAY_AUTH_MODE=token and put the cluster's token in ~/.ray/auth_token"):
        jobs.submit(server, "x", working_dir=None, env_vars={}, make=refuses)


def test_a_cluster_that_is_still_starting_is_waited_for(server, monkeypatch):
    """Ray's job server answers before a node can take jobs."""
    client, refusals = FakeClient([], []), [RuntimeError("500: No available agent to submit job, try again later.")] * 2

    def starting(address):
        if refusals:
            raise refusals.pop()
        return client

    jobs.submit(server, "x", working_dir=None, env_vars={}, make=starting)
    assert [command for command, _ in client.submitted] == ["x"]
    monkeypatch.setattr(jobs, "AGENT_S", -1.0)
    refusals.append(RuntimeError("500: No available agent to submit job, please try again later."))
    with pytest.raises(JobError, match=r"to take the job, got 500: No available agent .*agent-listen-port"):
        jobs.submit(server, "x", working_dir=None, env_vars={}, make=starting)


def test_an_address_where_nothing_listens_is_one_line():
    with pytest.raises(JobError, match="expected Ray's job server, got Connection refused"):
        jobs.submit("http://127.0.0.1:9", "x", working_dir=None, env_vars={})


def test_a_verb_with_cluster_submits_itself_and_does_nothing_here(server, tmp_path, monkeypatch):
    client = FakeClient([["done\n"]], [(JobStatus.FAILED, 2)])
    monkeypatch.setattr(jobs, "JobSubmissionClient", lambda address: client)
    monkeypatch.setattr(jobs.submit, "__kwdefaults__", jobs.submit.__kwdefaults__ | {"make": lambda address: client})
    given = ["--data", "/shared", "train", "s3://b/shards", "--set", "train.seed=3", "--resume", "--cluster", server]
    result = CliRunner().invoke(cli.app, given)
    assert result.exit_code == 2 and "done" in result.output
    ((entrypoint, _),) = client.submitted
    assert entrypoint.endswith("sdan --data /shared train --set train.seed=3 --resume s3://b/shards")
    assert "job raysubmit_1 goes on" in cli._INTERRUPTS.kept_line()


def test_a_working_directory_alone_is_refused():
    result = CliRunner().invoke(cli.app, ["evaluate", "x", "--working-dir", "."])
    assert "expected with --cluster ADDRESS" in str(result.exception)
