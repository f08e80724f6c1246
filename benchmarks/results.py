"""Writes the tables of benchmarks/RESULTS.md: one section per benchmark, headed by the origin of its numbers."""

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"
Tables = dict[str, tuple[str, Callable[[], Iterator[str]]]]
"""Name -> (title, function that yields the table's lines)."""


def provenance(command: str, folders: tuple[str, ...] = ("../sdan",)) -> str:
    """Where the numbers come from, on one line: command, commit, hardware, versions, date and load.

    folders   the folders whose code is measured, relative to benchmarks/; uncommitted changes in them are reported
    """
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", *folders, "."], capture_output=True, text=True, check=False
    ).stdout
    changed = "\n".join(line for line in changed.splitlines() if not line.endswith("RESULTS.md"))
    processor = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"`{command}`; commit {commit.strip() or 'unknown'}{' with changes' if changed else ''}; "
        f"{processor.group(1) if processor else platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores, {memory_gb:.0f} GB, {torch.backends.cpu.get_cpu_capability()}; "
        f"torch {torch.__version__}, Python {platform.python_version()}; "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC; load before {os.getloadavg()[0]:.1f}"
    )


def publish(section: str, origin: str, tables: Tables, only: str | None) -> None:
    """Print each table row by row as it is measured. Without `only`, write all tables to their section.

    origin   the section's first line, from `provenance`
    """
    text = [origin]
    print(origin, flush=True)
    for name, (title, rows) in tables.items():
        if only in (None, name):
            text.append(f"\n### {title}\n")
            print(text[-1], flush=True)
            for row in rows():
                text.append(row)
                print(row, flush=True)
    if only is None:
        update_section(section, "\n".join(text))


def update_section(name: str, text: str, results: Path = RESULTS) -> None:
    """Replace the text between `<!-- name -->` and `<!-- /name -->`; append the section if it is missing."""
    before = results.read_text() if results.exists() else "# Results\n"
    section = f"<!-- {name} -->\n{text.strip()}\n<!-- /{name} -->"
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    after = pattern.sub(lambda _: section, before) if pattern.search(before) else f"{before.rstrip()}\n\n{section}\n"
    results.write_text(after)
