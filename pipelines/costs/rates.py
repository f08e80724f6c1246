"""Measured rates, each with its command, commit, hardware and date: the one place that estimates take them from.

A run's own rate is better: `sdan preprocess` uses that of SHARDS, `sdan train` and `sdan tune` that of an earlier run
in --data with the same network. These are for what has not run yet. benchmarks/RESULTS.md has the tables.
"""

from __future__ import annotations

from dataclasses import dataclass

EPYC = "AMD EPYC, 2 cores, AVX2 without bf16"
EPYC_512 = "AMD EPYC, 2 cores, AVX512"
XEON = "Intel Xeon, 2 cores, AVX512"
H200 = "H200"
CPU_CORE = "CPU core"


@dataclass(frozen=True)
class Rate:
    """One measured number."""

    value: float
    unit: str
    command: str
    commit: str
    machine: str
    """What it was measured on."""
    date: str
    hardware: str = CPU_CORE
    """What one unit of hardware is for an estimate: a CPU core, or a GPU by its name."""

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit} ({self.machine}; {self.command}; commit {self.commit}, {self.date})"


_PREPROCESS = "python benchmarks/preprocess.py --seconds 3"
CPU_TASK_S = Rate(1.58, "s of one CPU a 12 MP pair", _PREPROCESS, "5f47543", XEON, "2026-11-26")
"""A task of the job, `--align scale`, 40 tiles, with two CPUs busy; registration (`ecc`) adds ECC_TASK_S."""
ECC_TASK_S = Rate(
    1.42,
    "s of one CPU a 12 MP pair",
    "python benchmarks/geometry.py --sequences 4 --wide 1",
    "c7396ad",
    XEON,
    "2026-11-26",
)
"""Registration of a pair of 4240 px wide frames."""
TILES_PER_PAIR = Rate(40, "tiles of 96 a 12 MP pair", _PREPROCESS, "5f47543", XEON, "2026-11-26")
TASK_MB = Rate(538, "MB, peak of a task", _PREPROCESS, "5f47543", XEON, "2026-11-26")
PLAN_S = Rate(
    29.4, "s to plan 42,853 pairs", "python benchmarks/preprocess.py --only tree", "7b7b691", EPYC_512, "2026-11-24"
)
"""Tags and fingerprints of the frames, local disk; PLAN_PAIRS pairs."""
PLAN_PAIRS = 42_853
PLAN_MB = Rate(
    540, "MB, peak of the driver with 99,997 pairs", "python benchmarks/scale.py", "5e5b8aa", EPYC, "2026-11-28"
)
"""Python and its libraries are in it; PLAN_MB_PAIRS pairs."""
PLAN_MB_PAIRS = 99_997

_GPU = "python benchmarks/gpu.py --minutes 6.8"
_TRAIN = "python benchmarks/training.py --seconds 4"
TRAINING: dict[str, tuple[Rate, ...]] = {
    "paper_4x": (
        Rate(427, "crops/s", _GPU, "76a0f5b", "NVIDIA H200, bf16, batch 8", "2026-11-27", H200),
        Rate(0.915, "crops/s on 2 cores", _TRAIN, "17ec9bd", f"{EPYC_512}, float32, batch 4", "2026-11-26"),
    ),
    "srraw_4x": (Rate(222, "crops/s", _GPU, "76a0f5b", "NVIDIA H200, bf16, batch 8", "2026-11-27", H200),),
    "starter": (
        Rate(531, "crops/s", _GPU, "76a0f5b", "NVIDIA H200, bf16, batch 8", "2026-11-27", H200),
        Rate(15.9, "crops/s on 2 cores", "python benchmarks/feeding.py --only speed", "4448e97", EPYC, "2026-11-27"),
    ),
}
"""Config -> crops per second of one GPU, or of two CPU cores. Other networks have no rate here."""

ZOOM: tuple[Rate, ...] = (
    Rate(61.6, "s a 12 MP RAW on 2 cores", "python benchmarks/zoom.py", "b63a0cf", EPYC, "2026-11-27"),
    Rate(11.4, "s a 12 MP RAW", _GPU, "76a0f5b", "NVIDIA H200", "2026-11-27", H200),
)
"""Starter model, to 192 MP; the start of Python and of the model (3 and 7 s) is in it."""
ZOOMED_MB = Rate(189, "MB a 192 MP PNG of 8 bits", "python benchmarks/zoom.py", "b63a0cf", EPYC, "2026-11-27")
MEGAPIXELS = 12.0
"""Of the photographs that were measured."""
