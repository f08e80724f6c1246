"""The checks of `make setup` before it installs anything."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("preflight", Path(__file__).parents[1] / ".ci" / "preflight.py")
preflight = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(preflight)


@pytest.mark.parametrize(
    ("version", "free_gb", "said"),
    [
        ((3, 10, 14), 100.0, "Python: expected 3.11 or newer, got 3.10"),
        ((3, 11, 7), 3.2, "disk: expected 12 GB free for .venv, got 3.2 GB"),
    ],
)
def test_a_missing_requirement_gets_one_line(version, free_gb, said):
    assert preflight.problem(version, free_gb).startswith(said)


def test_a_suitable_machine_passes():
    assert preflight.problem((3, 11, 7), 100.0) is None
    assert preflight.problem((3, 14, 0), 12.0) is None
