"""The operators under PyTorch's own checks, torch.compile, torch.export and DistributedDataParallel."""

import pytest
import torch
from operator_cases import assert_near, case
from torch import nn

from sdan.ops import offset_mask, packed_attention, portable_form, squared_deform_conv2d


@pytest.mark.parametrize("size", [(1, 1), (4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(size, dtype):
    input, offset, _, _ = case(size, dtype=dtype)
    bias = torch.randn(3, dtype=dtype)
    for sample in (
        (input.requires_grad_(), offset.requires_grad_(), bias.requires_grad_(), 0),
        (input.contiguous(memory_format=torch.channels_last), offset.float(), None, 0),
    ):
        torch.library.opcheck(torch.ops.sdan.bilinear_warp.default, sample)
    grad = torch.randn(2, 3, *size, dtype=dtype)
    for need_input in (True, False):
        sample = (grad, input.detach(), offset.detach(), 0, need_input, True, not need_input)
        torch.library.opcheck(torch.ops.sdan.bilinear_warp_backward.default, sample)


class Layer(nn.Module):
    """A module that uses the operators as the network does."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Conv2d(3, 2, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1)))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        offset = 4 * self.shift(x)
        output = squared_deform_conv2d(x, offset, self.weight, self.bias).relu()
        return output * offset_mask(offset) + packed_attention(x.flatten(2)).sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    torch.manual_seed(0)
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((8, 9), (7, 12)) if dynamic else ((8, 9),):
        x = torch.randn(2, 3, *size)
        expected = layer(x)
        expected.square().mean().backward()
        gradients = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        output = compiled(x)
        output.square().mean().backward()
        assert_near([output, *(p.grad for p in layer.parameters())], [expected, *gradients], 1e-5)
        layer.zero_grad()


def test_compiles_for_any_batch():
    """`mark_dynamic` raises if tracing fixes the batch size."""
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)

    def run(x):
        moved = squared_deform_conv2d(x, x[:, :2].contiguous(), weight)
        return moved.sum() + packed_attention(x.flatten(2)).sum()

    x = torch.randn(2, 3, 6, 7, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    other = torch.randn(5, 3, 6, 7)
    assert_near([compiled(other)], [run(other)], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_with_inductor(dynamic, autocast):
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3, 12, 14), (3, 3, 8, 9)) if dynamic else ((2, 3, 12, 14),):
        x = torch.randn(shape)
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = run(x)
            output.float().square().mean().backward()
            results.append([output, *(p.grad.clone() for p in layer.parameters())])
        assert results[1][0].dtype == results[0][0].dtype
        assert_near(results[1], results[0], 5e-2 if autocast else 1e-4)


def test_exports_with_and_without_the_operator():
    torch.manual_seed(0)
    layer, x = Layer().eval(), torch.randn(2, 3, 8, 9)
    shapes = {"x": {2: torch.export.Dim("height", min=4, max=64), 3: torch.export.Dim("width", min=4, max=64)}}
    exported = torch.export.export(layer, (x,), dynamic_shapes=shapes)
    other = torch.randn(2, 3, 11, 7)
    assert_near([exported.module()(other)], [layer(other)], 1e-5)
    assert "sdan." in str(exported.graph)
    with portable_form():
        portable = torch.export.export(layer, (x,), dynamic_shapes=shapes)
    assert "sdan." not in str(portable.graph)
    assert_near([portable.module()(other)], [layer(other)], 1e-5)


@pytest.mark.slow
def test_trains_under_ddp(tmp_path):
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path / "store"),), nprocs=2)


def _ddp_worker(rank, store):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = Layer()
    parallel = nn.parallel.DistributedDataParallel(layer)
    batches = torch.randn(2, 1, 3, 8, 9, generator=torch.Generator().manual_seed(5))
    parallel(batches[rank]).mean().backward()
    got = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    torch.stack([layer(batch).mean() for batch in batches]).mean().backward()
    assert_near(got, [p.grad for p in layer.parameters()], 1e-4)
    torch.distributed.destroy_process_group()
