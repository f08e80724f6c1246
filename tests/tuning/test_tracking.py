"""Waiting for MLflow, the time that is left, and keys of trials; Ray is not started."""

import os

import pytest
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException

from tuning.sweep import missing_repeats
from tuning.tracking import REPEAT, Pace, PatientClient, TrialKey, TrialRow, identify, patiently, repeat_config


def test_a_server_that_comes_back_is_waited_for():
    answers = [MlflowException("API request failed: Connection refused"), ConnectionError("store"), 42]

    def call():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(call, retry_s=0.01) == 42 and not answers


def test_a_call_of_a_dead_server_returns_soon(monkeypatch):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    PatientClient("http://127.0.0.1:9")
    assert int(os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]) <= 2  # MLflow's own retries grow to minutes


@pytest.mark.parametrize(("error_code", "calls"), [(INVALID_PARAMETER_VALUE, 1), (None, 3)])
def test_refusals_and_long_silence_are_raised(error_code, calls):
    made = []

    def call():
        made.append(1)
        raise MlflowException("no", **({} if error_code is None else {"error_code": error_code}))

    with pytest.raises(MlflowException):
        patiently(call, patience_s=0.05, retry_s=0.03)
    assert len(made) >= calls and (error_code is None or len(made) == 1)


def test_repeats_have_keys_of_their_own():
    assert identify({"a": 1}, "t1") == (TrialKey("t1"), {"a": 1})
    config = {REPEAT: repeat_config("t1", 2, {"a": 1})}
    assert identify(config, "whatever") == (TrialKey("t1-r2", 2, "t1"), {"a": 1})


def test_the_time_left_follows_the_trials_that_ended():
    pace = Pace(0.0)
    assert pace.left(8, 2) == ""
    for number in range(4):
        pace.start(str(number), 0.0)
        pace.end(str(number), 100.0)
    assert pace.left(8, 2) == "; 4 of 8 ended, about 3 min left"
    assert pace.left(4, 2) == ""


def row(trial_id, score, status="finished", repeat_of="", repeat=0, **overrides):
    return TrialRow(trial_id, "", overrides, status, score, 1, (), "", repeat, repeat_of)


def test_the_best_three_and_the_default_are_repeated():
    rows = [row(f"t{n}", 30.0 - n, a=n) for n in range(6)]
    rows.insert(0, row("t9", 40.0, "stopped", a=9))
    rows.append(row("t1-r1", 29.0, repeat_of="t1", repeat=1, a=1))
    missing = missing_repeats(rows, 2, {"a": 5})
    assert missing == [("t0", 1, {"a": 0}), ("t2", 1, {"a": 2}), ("t5", 1, {"a": 5})]
    assert missing_repeats(rows, 1, None) == []
    assert len(missing_repeats(rows, 3, {"a": 0})) == 5
