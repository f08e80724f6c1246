"""Writes the tables of benchmarks/RESULTS.md: one section per benchmark, headed by the origin of its numbers."""

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
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
    return (
        f"`{command}`; commit {commit_text(folders)}; {_processor()}, {torch.backends.cpu.get_cpu_capability()}; "
        f"torch {torch.__version__}, Python {platform.python_version()}; "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC; load before {os.getloadavg()[0]:.1f}"
    )


def gpu_provenance(command: str, device: str, commit: str | None = None) -> tuple[str, str]:
    """(where the numbers come from, on one line; the card's name).

    commit   the commit that was measured, for a copy without the repository's history
    """
    card, details = "no GPU", "rehearsal on a CPU, times mean nothing"
    if device == "cuda":
        chip = torch.cuda.get_device_properties(0)
        card = chip.name
        details = (
            f"{card}, {chip.total_memory / 2**30:.0f} GB, sm_{chip.major}{chip.minor}, driver {_driver()}; "
            f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
    return (
        f"`{command}`; commit {commit or commit_text(('../sdan', '../pipelines'))}; {details}; "
        f"torch {torch.__version__}, Triton {_version('triton')}, torchvision {_version('torchvision')}, "
        f"Python {platform.python_version()}; TF32 as each row says; {_processor()}; "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    ), card


def commit_text(folders: tuple[str, ...]) -> str:
    """The commit, followed by "with changes" if files in `folders` or here are not committed."""
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", *folders, "."], capture_output=True, text=True, check=False
    ).stdout
    changed = "\n".join(line for line in changed.splitlines() if not line.endswith("RESULTS.md"))
    return f"{commit.strip() or 'unknown'}{' with changes' if changed else ''}"


def _processor() -> str:
    """Model, cores that this process may use, and memory."""
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = model.group(1) if model else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {memory_gb:.0f} GB"


def _driver() -> str:
    """Version of the GPU's driver."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


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
