"""Every table of a GPU in one command: `python benchmarks/gpu.py` (under 8 minutes).

The docstrings of the modules in benchmarks/on_gpu explain the columns. Each table has a share of the time, and one that
fails or hangs costs only itself. `--write` puts the tables that were measured between their markers in
benchmarks/RESULTS.md.

Needs torch, torchvision, Triton, OpenCV, rawpy, exifread, Pillow, pydantic and safetensors; neither Ray, MLflow nor
PyArrow.

Exit codes: 0 all tables were measured, 1 a table or a row failed, 2 there is no GPU.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from on_gpu import attention_tables, operator_tables, step_tables  # noqa: E402
from on_gpu.runner import Outcome, Session, Table, run_tables  # noqa: E402
from results import RESULTS, gpu_provenance, update_section  # noqa: E402

DEFAULT_MINUTES = 7.5
"""Without the start of Python, for a whole of less than 8 minutes."""


def zoom_rows(session: Session) -> Iterator[str]:
    """A 12 MP photo; imported here because only this table needs to read and write photos."""
    from on_gpu import zoom_table

    yield from zoom_table.zoom_rows(session)


OPERATORS = (
    Table("operator", "Squared deformable convolution, ms", operator_tables.operator_rows, 90),
    Table("overhead", "What an eager call costs beyond its kernels, ms", operator_tables.overhead_rows, 20),
    Table("attention", "Packed attention, ms", attention_tables.attention_rows, 45),
    Table("cpa", "Cross packing attention with packing and ReLU, ms", attention_tables.cpa_rows, 35),
    Table("module", "The whole alignment module, forward+backward, ms", operator_tables.module_rows, 30),
    Table("errors", "Largest error against float64, relative", operator_tables.error_rows, 15),
)
TRAINING = (
    Table("step", "A training step", step_tables.step_rows, 110),
    Table("kinds", "Where the time of a step goes, ms", step_tables.kind_rows, 40),
    Table("kernels", "The longest kernels of a step of paper_4x, batch 8, bf16", step_tables.kernel_rows, 15),
    Table("compiled", "A training step, compiled", step_tables.compiled_rows, 100),
)
ZOOM = Table("zoom", "A 12 MP RAW to 192 MP by `sdan zoom`, starter model", zoom_rows, 50)
TABLES = (*OPERATORS, *TRAINING[:-1], ZOOM, TRAINING[-1])  # the compiler last, with the time that the others leave
NO_GPU = "--device cuda: expected a CUDA GPU, got none; run on a machine that has one, or with --device cpu"


def add_device_options(parser: argparse.ArgumentParser, on_cpu: Iterable[str], on_gpu: Sequence[Table]) -> None:
    """The options --device and --only of a program that has other tables on a CPU than on a GPU."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=found, help=f"default here: {found}")
    names = list(dict.fromkeys([*on_cpu, *(table.name for table in on_gpu)]))
    parser.add_argument("--only", choices=names, help="run this table only, and leave RESULTS.md as it is")


def run_some(tables: Sequence[Table], only: str | None, command: str) -> int:
    """Measure the table `only` on the GPU, or all of `tables` and update RESULTS.md; return the exit code."""
    chosen = [table for table in tables if only in (None, table.name)]
    if not chosen:
        names = ", ".join(table.name for table in tables)
        print(f"--only: expected a table of the GPU, {names}, got {only}; add --device cpu", file=sys.stderr)
        return 2
    return run(chosen, command=command, write=None if only else RESULTS)


def run(
    tables: Sequence[Table],
    *,
    command: str,
    device: str = "cuda",
    minutes: float | None = None,
    write: Path | None = None,
    commit: str | None = None,
) -> int:
    """Measure tables and print them; return the exit code.

    Args:
        command: the command line, for the tables' first line.
        minutes: total time; None: what these tables have of the whole run's time.
        write: file whose sections are replaced by the tables that were measured.
        commit: for a copy of the repository without its history.
    """
    if device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    part = sum(table.share_s for table in tables) / sum(table.share_s for table in TABLES)
    seconds = 60 * (DEFAULT_MINUTES * part if minutes is None else minutes)
    origin, card = gpu_provenance(command, device, commit)
    print(origin, flush=True)
    outcomes = []
    for outcome in run_tables(named_after(card, tables), device, seconds, device == "cpu", say):
        outcomes.append(outcome)
        if write and not outcome.error:
            text = "\n".join([origin, f"\n### {outcome.table.title}\n", *outcome.lines])
            update_section(f"gpu-{outcome.table.name}", text, write)
    print(f"\n{summary(outcomes)}", flush=True)
    return 0 if all(outcome.good for outcome in outcomes) else 1


def named_after(card: str, tables: Sequence[Table]) -> list[Table]:
    """The tables with titles that name the card."""
    return [Table(table.name, f"{table.title} ({card})", table.rows, table.share_s) for table in tables]


def say(line: str) -> None:
    print(line, flush=True)


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line: how many tables were measured, what failed and what was left out."""
    parts = [f"{sum(outcome.error is None for outcome in outcomes)} of {len(outcomes)} tables measured"]
    failed = [f"{one.table.name} ({one.error})" for one in outcomes if one.error]
    failed += [f"{one.table.name}: {', '.join(one.failed)}" for one in outcomes if one.failed]
    parts += [f"failed: {'; '.join(failed)}"] if failed else []
    left_out = sum(len(outcome.left_out) for outcome in outcomes)
    parts += [f"{left_out} rows left out for lack of time; give more with --minutes"] if left_out else []
    return "; ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [table.name for table in TABLES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="run these tables only")
    parser.add_argument("--minutes", type=float, help=f"time for all tables (default {DEFAULT_MINUTES})")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: try every table on tiny shapes")
    parser.add_argument("--commit", help="the commit to name, for a copy without the repository's history")
    parser.add_argument(
        "--write", type=Path, nargs="?", const=RESULTS, metavar="FILE", help=f"update FILE ({RESULTS.name})"
    )
    chosen = parser.parse_args(given)
    if chosen.write and chosen.device == "cpu":
        parser.error("--write: expected a GPU, got --device cpu, whose times mean nothing")
    shown = [text for text in given if text not in ("--write", str(chosen.write))]
    return run(
        [table for table in TABLES if table.name in chosen.only],
        command=" ".join(["python benchmarks/gpu.py", *shown]),
        device=chosen.device,
        minutes=chosen.minutes,
        write=chosen.write,
        commit=chosen.commit,
    )


if __name__ == "__main__":
    sys.exit(main())
