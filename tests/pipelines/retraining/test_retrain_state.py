"""What retrainings remember: the unfinished one, the last ones, reports; and systemd's timer."""

import json
import os
import time

from pipelines.retraining import state, timer
from pipelines.retraining.compare import Decision
from pipelines.retraining.lock import local_time
from pipelines.retraining.state import MOST_PAST, MOST_REPORTS, Pending, past, pending, report_path, write_report

STARTED = Pending("retrain-1", 1.0, "/raw", "/shards", "3", new_pairs=["a"], set_aside=["00001 x: cut"])


def test_an_unfinished_retraining_is_read_back(tmp_path):
    notes: list[str] = []
    assert pending(tmp_path, "/shards", notes) is None
    for stored in (STARTED, Pending("other", 2.0, "/raw", "s3://b/shards", None, decision=Decision(True, "why", 0.05))):
        stored.write(tmp_path)
        assert pending(tmp_path, stored.shards, notes) == stored
    assert state.all_pending(tmp_path) and len(state.all_pending(tmp_path)) == 2
    STARTED.forget(tmp_path)
    assert pending(tmp_path, "/shards", notes) is None and notes == []


def test_a_damaged_file_is_set_aside_with_a_note(tmp_path):
    STARTED.write(tmp_path)
    (path,) = (tmp_path / state.FOLDER).glob("*.json")
    path.write_text("{")
    notes: list[str] = []
    assert pending(tmp_path, "/shards", notes) is None and state.all_pending(tmp_path) == []
    assert "an unfinished retraining was left out" in notes[0] and path.with_suffix(".damaged").read_text() == "{"


def test_the_last_retrainings_are_kept_and_idle_ones_merged(tmp_path):
    (tmp_path / state.PAST).write_text(json.dumps({"time": 5.0, "reason": "of version 0.2"}))
    for number in range(3):
        state.note(tmp_path, f"{state.IDLE}; {number}", "/raw", "/shards")
    assert [entry["reason"] for entry in past(tmp_path)] == [f"{state.IDLE}; 2", "of version 0.2"]
    for number in range(MOST_PAST + 3):
        state.note(tmp_path, f"number {number}", "/raw", "/shards")
    found = past(tmp_path)
    assert len(found) == MOST_PAST and found[0]["reason"] == f"number {MOST_PAST + 2}"
    assert found[0]["shards"] == "/shards"


def test_old_reports_are_removed(tmp_path):
    for number in range(MOST_REPORTS + 2):
        write_report(tmp_path, f"r{number}", "text")
        os.utime(report_path(tmp_path, f"r{number}"), (number + 1, number + 1))
    write_report(tmp_path, "last", "text")
    left = {path.stem for path in (tmp_path / state.FOLDER).glob("*.md")}
    assert len(left) == MOST_REPORTS and "last" in left and "r0" not in left


def test_times_are_shown_with_their_zone(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert local_time(1_800_000_000) == "2027-01-15 09:00 CET"
    finally:
        monkeypatch.undo()
        time.tzset()


def systemctl(folder, monkeypatch, answers):
    """A systemctl that prints `answers[scope]`."""
    cases = "\n".join(f"{scope}) printf '{text}' ;;" for scope, text in answers.items())
    folder.mkdir(exist_ok=True)
    (folder / "systemctl").write_text(f'#!/bin/sh\ncase "$1" in\n{cases}\nesac\n')
    (folder / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_next_run_is_that_of_the_timer(tmp_path, monkeypatch):
    loaded = "LoadState=loaded\\nActiveState={}\\nNextElapseUSecRealtime={}\\n"
    systemctl(tmp_path / "on", monkeypatch, {"--user": "", "--system": loaded.format("active", "@1800000000")})
    assert timer.next_run() == f"{local_time(1_800_000_000)} (sdan-retrain.timer)"
    systemctl(tmp_path / "off", monkeypatch, {"--user": loaded.format("inactive", ""), "--system": ""})
    assert "enable --now sdan-retrain.timer" in timer.next_run()
    systemctl(tmp_path / "none", monkeypatch, {"--user": "LoadState=not-found\\n", "--system": ""})
    assert timer.next_run().startswith("no sdan-retrain.timer")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert timer.next_run().startswith("unknown: no systemd here")
