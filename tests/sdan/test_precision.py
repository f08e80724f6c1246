"""The precision chosen for each kind of CPU and GPU, independent of this machine."""

import platform
import sys
from pathlib import Path

import pytest
import torch

from sdan.ops import precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def cpu_bf16(monkeypatch, request):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: request.param)
    return request.param


@pytest.mark.parametrize(("cpu_bf16", "expected"), [(True, "bf16"), (False, "fp32")], indirect=["cpu_bf16"])
def test_auto_on_a_cpu(cpu_bf16, expected):
    assert precision.resolve("auto", CPU) == expected
    with precision.autocast("auto", CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if cpu_bf16 else torch.float32)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_on_a_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.resolve("auto", CUDA) == expected


@pytest.mark.parametrize("cpu_bf16", [True, False], indirect=True)
def test_an_explicit_precision_is_kept(cpu_bf16):
    assert precision.resolve("bf16", CPU) == "bf16"
    assert precision.resolve("fp32", CPU) == "fp32"
    assert precision.resolve("fp16", CPU) == "fp32"
    assert precision.resolve("fp16", CUDA) == "fp16"
    assert (precision.emulation_warning("bf16", CPU) is None) == cpu_bf16
    assert precision.emulation_warning("auto", CPU) is None
    assert precision.emulation_warning("bf16", CUDA) is None


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="expected auto, fp32, bf16 or fp16, got 'int8'"):
        precision.resolve("int8", CPU)


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="reads x86 flags from /proc")
def test_bf16_support_matches_the_processors_flags():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    if flags & {"avx512_bf16", "amx_bf16"}:
        assert precision.cpu_has_bf16()
    elif "avx512f" not in flags and "avx_ne_convert" not in flags:
        assert not precision.cpu_has_bf16()


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [({}, False), ({"avx512_bf16"}, True), ({"amx_tile"}, True)],
)
def test_bf16_on_x86_needs_instructions(monkeypatch, instructions, expected):
    """oneDNN accepts bf16 on every AVX-512 CPU and emulates it on those without these instructions."""
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512_bf16" in instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx_tile" in instructions)
    assert precision.cpu_has_bf16() == expected


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [(["bf16", "bf16"], "bf16"), (["bf16", "fp16"], "fp16"), (["fp32", "bf16"], "fp32"), (["fp16"], "fp16")],
)
def test_ranks_agree_on_one_precision(chosen, expected):
    assert precision.common_precision(chosen) == expected
