"""When the next retraining starts, as far as systemd knows."""

from __future__ import annotations

import shutil
import subprocess

from pipelines.retraining.lock import local_time

TIMER = "sdan-retrain.timer"
"""The name in docs/retraining.md."""
TIMEOUT_S = 5.0


def next_run() -> str:
    """One line for `sdan status`: the timer's next start, of this user's or the system's systemd."""
    if shutil.which("systemctl") is None:
        return f"unknown: no systemd here, so no {TIMER}; another scheduler may start it"
    for scope in ("--user", "--system"):
        found = _show(scope)
        if found.get("LoadState") != "loaded":
            continue
        if found.get("ActiveState") != "active":
            return f"none: {TIMER} is {found.get('ActiveState', 'off')}; systemctl {scope} enable --now {TIMER}"
        due = found.get("NextElapseUSecRealtime", "").removeprefix("@")
        if due.isdigit():
            return f"{local_time(int(due))} ({TIMER})"
        return f"unknown: {TIMER} is active, but states no time"
    return f"no {TIMER}; another scheduler may start it (docs/retraining.md)"


def _show(scope: str) -> dict[str, str]:
    """The timer's properties; {} if systemd does not answer."""
    names = "LoadState,ActiveState,NextElapseUSecRealtime"
    command = ["systemctl", scope, "show", TIMER, "--timestamp=unix", f"--property={names}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(line.partition("=")[::2] for line in done.stdout.splitlines() if "=" in line)
