"""The GPU tables on a CPU: every table runs on tiny shapes; formatting, exit codes and sections of RESULTS.md."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import results
import torch
from authors_operators import authors_way
from on_gpu.arithmetic import ms_text, pair_text, ratio_text, shape_text, table_head, table_row
from on_gpu.runner import Outcome, Session
from training_steps import synthetic_inputs

from pipelines import config as configs
from sdan.network import SDAN, check_inputs

BENCHMARKS = Path(gpu.__file__).parent
CPU = torch.device("cpu")


@pytest.mark.parametrize("table", gpu.TABLES, ids=lambda table: table.name)
def test_every_table_runs_on_tiny_shapes(table):
    session = Session("cpu", stop_at=math.inf, rehearsal=True)
    lines = "\n".join(table.rows(session)).splitlines()
    assert session.failed == [] and session.left_out == [], lines
    assert lines[1].startswith("|---") and len(lines) > 2
    assert {line.count("|") for line in lines if line.startswith("|")} == {lines[0].count("|")}


def test_cells_of_a_table():
    assert [ms_text(ms) for ms in (0.0154, 1.234, 12.34, 123.4, None)] == ["0.015", "1.23", "12.3", "123", "-"]
    assert pair_text([0.5, None]) == "0.500 / -"
    assert [ratio_text(3.0, 2.0), ratio_text(None, 2.0), ratio_text(1.0, None), ratio_text(4.0, 3.0, 1)] == [
        "1.50",
        "-",
        "-",
        "1.3",
    ]
    assert shape_text((4, 64, 128, 128)) == "4x64x128x128"
    assert table_head("a | b, c") == "| a | b, c |\n|---|---|"
    assert table_row(("x", 1)) == "| x | 1 |"


@pytest.mark.parametrize("name", ["paper_4x", "paper_4x_rgb", "srraw_4x", "starter", "smoke"])
def test_synthetic_inputs_fit_the_config(name):
    config = configs.named(name)
    inputs = synthetic_inputs(config, 2, CPU)
    check_inputs(config.model, inputs.x, inputs.self_reference, inputs.rendering)
    assert inputs.oracle_reference.shape == inputs.self_reference.shape
    assert inputs.target.shape == (2, 3, *(2 * config.train.crop_px * config.model.scale,) * 2)
    assert (inputs.truth is None) == (config.loss.self_target != "truth")
    assert all(tensor.min() >= 0 and tensor.max() <= 1 for tensor in inputs if tensor is not None)


def test_the_authors_way_computes_the_same():
    torch.manual_seed(0)
    config = configs.override(configs.smoke(), {"model.skip": "none"})
    model, inputs = SDAN(config.model), synthetic_inputs(config, 1, CPU)
    with torch.no_grad():
        model.alignment.offset_learner.attention1.gamma.fill_(0.5)
        ours = model(inputs.x, inputs.oracle_reference)
        with authors_way():
            theirs = model(inputs.x, inputs.oracle_reference)
        again = model(inputs.x, inputs.oracle_reference)
    assert ours.offset.abs().max() > 0.1
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.zoomed, again.zoomed) and not torch.equal(ours.zoomed, theirs.zoomed)


def test_without_a_gpu_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == f"{gpu.NO_GPU}\n" and said.err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--device", "cpu", "--write"])


def test_a_table_that_a_gpu_lacks_is_named(capsys):
    assert gpu.run_some(gpu.OPERATORS, "memory", "command") == 2
    assert "got memory; add --device cpu" in capsys.readouterr().err


def fake_run(monkeypatch, outcomes):
    """`gpu.run` on a GPU whose tables end as `outcomes` says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "gpu_provenance", lambda command, device, commit: (f"`{command}`; H200", "H200"))
    monkeypatch.setattr(
        gpu, "run_tables", lambda tables, *_: [dataclasses.replace(one, table=tables[0]) for one in outcomes]
    )


@pytest.mark.parametrize(
    ("outcome", "code", "text"),
    [
        ({}, 0, "1 of 1 tables measured"),
        ({"error": "RuntimeError: x"}, 1, "0 of 1 tables measured; failed: operator (RuntimeError: x)"),
        ({"failed": ["1x8"]}, 1, "1 of 1 tables measured; failed: operator: 1x8"),
        ({"left_out": ["a", "b"]}, 0, "2 rows left out for lack of time"),
    ],
)
def test_exit_code_and_summary(monkeypatch, capsys, outcome, code, text):
    fake_run(monkeypatch, [Outcome(gpu.TABLES[0], ["| a |"], **outcome)])
    assert gpu.main(["--only", "operator"]) == code
    assert text in capsys.readouterr().out.splitlines()[-1]


def test_tables_are_written_between_their_markers(monkeypatch, tmp_path):
    target = tmp_path / "RESULTS.md"
    target.write_text("before\n<!-- gpu-operator -->\nold\n<!-- /gpu-operator -->\nafter\n")
    fake_run(monkeypatch, [Outcome(gpu.TABLES[0], ["| a |"])])
    assert gpu.main(["--only", "operator", "--write", str(target)]) == 0
    title = "### Squared deformable convolution, ms (H200)"
    middle = f"`python benchmarks/gpu.py --only operator`; H200\n\n{title}\n\n| a |"
    assert target.read_text() == f"before\n<!-- gpu-operator -->\n{middle}\n<!-- /gpu-operator -->\nafter\n"
    before = target.read_text()
    fake_run(monkeypatch, [Outcome(gpu.TABLES[0], ["| half |"], error="stopped")])
    assert gpu.main(["--only", "operator", "--write", str(target)]) == 1
    assert target.read_text() == before


def test_results_page_has_a_place_for_every_table():
    page = results.RESULTS.read_text()
    for table in gpu.TABLES:
        assert page.count(f"<!-- gpu-{table.name} -->") == page.count(f"<!-- /gpu-{table.name} -->") == 1


def test_the_origin_of_the_numbers_is_named(monkeypatch):
    chip = type("Chip", (), {"name": "NVIDIA H200", "total_memory": 139 * 2**30, "major": 9, "minor": 0})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: chip)
    origin, card = results.gpu_provenance("python benchmarks/gpu.py", "cuda", "abc1234")
    assert card == "NVIDIA H200"
    for text in ("commit abc1234", "NVIDIA H200, 139 GB, sm_90, driver", "torch 2", "Triton 3", "TF32", " UTC"):
        assert text in origin


BARE = """
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.partition(".")[0] in "ray pyarrow mlflow optuna pandas matplotlib boto3 psutil jinja2".split()
        return None if missing else super().find_spec(name, path, target)

sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, sys.argv[1])
import math, gpu, training, operators
from on_gpu.runner import Session
session = Session("cpu", math.inf, rehearsal=True)
print(*gpu.step_tables.step_rows(session), sep="\\n")
sys.exit(len(session.failed))
"""


def test_a_bare_gpu_machine_needs_neither_ray_nor_arrow(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(BENCHMARKS)], cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.count("| smoke, 2 |") == 2
