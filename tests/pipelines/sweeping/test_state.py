"""The sweeps that `sdan status` shows."""

import os
import time

from pipelines.status import status
from pipelines.sweeping.state import SWEEPS, sweeps
from tuning.folder import LIVE, RECORD, Live, Record, write_json, write_live


def make(data, name, live=None, age_s=0.0):
    folder = data / SWEEPS / name
    folder.mkdir(parents=True)
    write_json(folder / RECORD, Record(name, "sdan-sweeps", "id", {}, "val_psnr", "max", 8, 3, 1, 0))
    if live is not None:
        write_json(folder / LIVE, live)
    os.utime(folder / RECORD, (time.time() - age_s,) * 2)
    return folder


def test_running_stopped_finished_and_damaged_sweeps(tmp_path):
    assert sweeps(tmp_path) == [] and "sweeps" not in str(status(tmp_path))
    write_live(make(tmp_path, "now"), 2, 1)
    make(tmp_path, "cut", Live(time.time() - 1000, 3, 1), age_s=2000)
    make(tmp_path, "over", Live(time.time() - 9000, 8, 0, done=True), age_s=10000)
    (make(tmp_path, "bad", age_s=20000) / RECORD).write_text("{}")
    found = {sweep.name: sweep for sweep in sweeps(tmp_path)}
    assert {name: sweep.state for name, sweep in found.items()} == {
        "now": "running", "cut": "stopped", "over": "finished", "bad": "damaged",
    }  # fmt: skip
    assert found["now"].detail == "2 of 8 trials ended, 1 running"
    assert "3 of 8 trials ended; continue with" in found["cut"].detail and "--resume" in found["cut"].detail
    assert "sweep.html" in found["over"].detail
    lines = str(status(tmp_path)).splitlines()
    assert [line.split()[:3] for line in lines if "now" in line] == [["sweeps", "now", "running"]] or any(
        "now  running" in line for line in lines
    )
