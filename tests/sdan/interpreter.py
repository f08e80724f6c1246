"""Runs the tests of Triton kernels under Triton's interpreter, which needs a process of its own."""

import os
import subprocess
import sys

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="run by test_under_the_interpreter in a separate process")


def run_under_the_interpreter(file: str, passed: int) -> None:
    """Run the tests of `file` whose names contain "interpreter"; as many as `passed` must pass."""
    if INTERPRETING:
        pytest.skip("this process runs under the interpreter already")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreter", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert f"{passed} passed" in run.stdout
