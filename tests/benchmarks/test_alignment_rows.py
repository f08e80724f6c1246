"""benchmarks/alignment.py: a row trains and resumes, its table is complete, and a copied reference is noticed."""

import alignment
import pytest
import torch

from pipelines.loader import index_split
from pipelines.scoring.held_out import held_out
from sdan.baselines import SRResNet
from sdan.ops.precision import compute_plan
from sdan.resample import bicubic

SMALL = {
    "train.crop_px": 16,
    "loss.border_px": 8,
    "model.features": 8,
    "model.blocks": 1,
    "model.max_shift_px": 8,
}


@pytest.fixture(scope="module")
def held(tiny_shards):
    config = alignment.row_config("srresnet", 4, 2, 0, SMALL)
    return held_out(index_split(str(tiny_shards), "val"), config, limit=2, align=True)


@pytest.mark.parametrize("row", alignment.ROWS)
def test_a_row_resumes_where_it_stopped(row, tiny_shards, held, tmp_path):
    for crops in (2, 4, 4):  # the second run continues, the third finds all done
        config = alignment.row_config(row, crops, 2, 0, SMALL)
        alignment.train_row(row, row, config, str(tiny_shards), held, tmp_path, 2)
    curve = alignment.read_curves(tmp_path)[row]
    assert [line["crops"] for line in curve] == [0, 2, 4]
    table = "\n".join(alignment.table(tmp_path, held))
    assert alignment.NAMES[row] in table and "bicubic of the camera" in table
    assert len(list(alignment.curve_rows(tmp_path))) == 5


def test_a_network_that_copies_its_reference_is_noticed(held):
    class Copy(SRResNet):
        def forward(self, x, reference, rendering=None):
            output = super().forward(x, reference, rendering)
            return output._replace(zoomed=bicubic(reference, 8))

    torch.manual_seed(0)
    config, plan = alignment.row_config("srresnet", 4, 2, 0, SMALL).model, compute_plan(torch.device("cpu"), "fp32")
    assert alignment.wrong_reference(SRResNet(config), held, plan) == pytest.approx(0, abs=1e-3)
    assert alignment.wrong_reference(Copy(config), held, plan) > 1
