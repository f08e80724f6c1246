"""The runner of the GPU tables: a table that fails, crashes or hangs costs only itself, and the total time holds."""

import math
import os
import subprocess
import time
from pathlib import Path

import pytest
from on_gpu import runner
from on_gpu.runner import Session, Table, reason, run_tables, share_of


def good(session):
    yield f"| good | {session.device} |"


def raises(session):
    yield "| first row |"
    raise RuntimeError("CUDA error: an illegal memory access\nsecond line")


def crashes(session):
    yield "| first row |"
    os._exit(3)


def hangs(session):
    yield "| first row |"
    time.sleep(600)


def leaves_a_child(session):
    yield str(subprocess.Popen(["sleep", "600"]).pid)
    raise SystemExit("the child did not end")


def table(rows, share_s=1.0):
    return Table(rows.__name__, f"Title of {rows.__name__}", rows, share_s)


def measured(tables, seconds):
    said = []
    outcomes = {outcome.table.name: outcome for outcome in run_tables(tables, "cpu", seconds, True, said.append)}
    return outcomes, said


def test_a_table_that_fails_costs_only_itself():
    outcomes, said = measured([table(raises), table(crashes), table(good)], seconds=400)
    assert outcomes["raises"].error.startswith("RuntimeError: CUDA error: an illegal memory access (tests/")
    assert outcomes["crashes"].error == "its process ended with exit code 3"
    assert outcomes["crashes"].lines == ["| first row |"] and not outcomes["crashes"].good
    assert outcomes["good"].lines == ["| good | cpu |"] and outcomes["good"].good
    assert said.index("\n### Title of raises\n") < said.index("| first row |") < said.index("| good | cpu |")
    assert f"raises: {outcomes['raises'].error}" in said
    assert all("\n" not in outcome.error for outcome in outcomes.values() if outcome.error)


def test_a_failed_table_leaves_no_process_behind():
    outcomes, _ = measured([table(leaves_a_child)], seconds=400)
    assert outcomes["leaves_a_child"].error.startswith("SystemExit: the child did not end")
    (child,) = outcomes["leaves_a_child"].lines
    deadline = time.monotonic() + 60
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid):
    """False also for a zombie, which stays where nobody collects orphans."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_table_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr(runner, "GRACE_S", 1.0)
    outcomes, _ = measured([table(hangs, share_s=0.01), table(good, share_s=100.0)], seconds=120)
    assert outcomes["hangs"].error == "stopped: expected an end within 1 s; give more with --minutes"
    assert outcomes["good"].good


def test_without_time_no_table_is_measured():
    outcomes, _ = measured([table(good)], seconds=0.0)
    assert outcomes["good"].error == "not measured: its process did not start in time"


def test_unused_time_goes_to_later_tables():
    assert share_of(100, [1, 1, 2]) == 25
    assert share_of(99, [1, 2]) == 33  # the first table took 1 of its 25 seconds
    assert share_of(90, [2]) == 90
    assert share_of(-5, [1, 1]) == 0


@pytest.fixture
def session():
    return Session("cpu", stop_at=math.inf)


def test_a_row_that_fails_shows_its_reason(session):
    def row(case):
        return f"| {case} | {1 / case} |"

    assert list(session.rows([2, 0, 4], lambda case: f"case {case}", row))[::2] == ["| 2 | 0.5 |", "| 4 | 0.25 |"]
    assert session.failed == ["case 0"] and session.left_out == []


def test_no_row_begins_after_the_time(session):
    def row(case):
        session.stop_at = time.monotonic()
        return f"| {case} |"

    lines = list(session.rows(["a", "b"], str, row))
    assert lines == ["| a |", "| b | not measured: the table's time was used up |"]
    assert session.left_out == ["b"] and session.failed == []


def test_a_reason_is_one_short_line_with_its_place():
    try:
        raise ValueError("x | y " + 500 * "z" + "\nmore")
    except ValueError as error:
        text = reason(error)
    assert text.startswith("ValueError: x / y zzz") and "\n" not in text and "|" not in text
    assert "(tests/benchmarks/test_gpu_runner.py:" in text and len(text) < 300
