"""Say in one line why this machine cannot hold the environment, before anything is installed.

Runs under any Python (2.7 included), so that an old interpreter gets the message and not a SyntaxError.
"""

import os
import sys

MIN_PYTHON = (3, 11)
MIN_FREE_GB = 12


def free_gb(folder):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize / 1e9


def problem(version, free):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The one line, or None when all is well."""
    if version[:2] < MIN_PYTHON:
        return "Python: expected 3.11 or newer, got %d.%d; name another: make setup PYTHON=python3.11" % version[:2]  # noqa: UP031
    if free < MIN_FREE_GB:
        return (
            "disk: expected %d GB free for .venv, got %.1f GB; free some space or clone SDAN onto a larger disk"  # noqa: UP031
            % (MIN_FREE_GB, free)
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return "Python: expected the venv module, got none; on Debian and Ubuntu: apt-get install python3-venv"
    return None


if __name__ == "__main__":
    message = problem(tuple(sys.version_info[:3]), free_gb("."))
    if message:
        sys.exit("sdan: " + message)
