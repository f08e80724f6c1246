"""The lab, and the wall-clock of each phase at the end of the output."""

import time
from contextlib import contextmanager

import lab as labs
import pytest

PHASES: list[tuple[str, float]] = []


@contextmanager
def phase(name):
    """Measure a phase."""
    start = time.monotonic()
    yield
    PHASES.append((name, time.monotonic() - start))


def pytest_terminal_summary(terminalreporter):
    """Print the phases."""
    if PHASES:
        terminalreporter.section("wall-clock of each phase")
        for name, seconds in PHASES:
            terminalreporter.write_line(f"{seconds:7.1f} s  {name}")


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A desk and two hosts, up and reachable by ssh."""
    reason = labs.missing()
    if reason:
        pytest.skip(f"two hosts on one machine: {reason}")
    made = labs.Lab(tmp_path_factory.mktemp("lab"))
    try:
        made.start()
        yield made
    finally:
        made.stop()
