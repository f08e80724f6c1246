"""Dollars per hour of named instance types. They are for orders of magnitude: prices change, and differ by region.

Approximate list prices on demand, us-east-1, Linux, written down on 2026-11-28 and not read from AWS.
`--dollars-per-hour` replaces them; https://aws.amazon.com/ec2/pricing/on-demand/ has today's.
"""

from __future__ import annotations

from dataclasses import dataclass

DATE = "2026-11-28"


@dataclass(frozen=True)
class Instance:
    """One type of machine."""

    dollars: float
    """Per hour."""
    cpus: int
    """Physical cores' worth of vCPUs are half of this; rates were measured with a task per vCPU."""
    gpus: int = 0
    gpu: str = ""


INSTANCES = {
    "c6i.4xlarge": Instance(0.68, 16),
    "m6i.2xlarge": Instance(0.38, 8),
    "g5.2xlarge": Instance(1.21, 8, 1, "A10G"),
    "p4d.24xlarge": Instance(22.0, 96, 8, "A100"),
    "p5en.48xlarge": Instance(63.3, 192, 8, "H200"),
}
"""cluster.yaml uses the first three."""
CPU_NODES = ("c6i.4xlarge",)


def nodes_with(hardware: str) -> list[str]:
    """The instance types that have this GPU; none for CPUs."""
    return [name for name, one in INSTANCES.items() if one.gpu == hardware]
