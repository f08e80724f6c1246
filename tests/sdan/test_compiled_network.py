"""One training step of the whole network, compiled and eager."""

import copy
import importlib

import pytest
import torch
from torch import nn

from sdan.network import SDAN, SDANConfig
from sdan.ops import narrow_conv
from sdan.ops.precision import compute_plan


def training_step(
    model: nn.Module, run: nn.Module, *, autocast: bool, device: str = "cpu"
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One forward pass, backward pass and optimizer step; returns (loss, new weights)."""
    random = torch.Generator().manual_seed(1)
    shapes = (2, 1, 16, 16), (2, 3, 16, 16), (2, 3, 32, 32)
    x, reference, target = (torch.rand(shape, generator=random).to(device) for shape in shapes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        output = run(x, reference)
    loss = (output.zoomed.float() - target).abs().mean() + (output.aligned.float() * output.mask).abs().mean()
    loss.backward()
    optimizer.step()
    return loss.detach(), [parameter.detach() for parameter in model.parameters()]


def compare(
    backend: str, *, autocast: bool, limit: float, dynamic: bool | None = None, device: str = "cpu", packing: int = 4
) -> None:
    torch.manual_seed(0)
    eager = SDAN(SDANConfig(scale=2, features=8, blocks=1, packing_kernel=packing)).to(device)
    if device != "cpu":
        eager = eager.to(memory_format=torch.channels_last)
    with torch.no_grad():  # gamma starts at 0, which disables the attention
        for name, parameter in eager.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
    start = [parameter.detach().clone() for parameter in eager.parameters()]
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    expected_loss, expected = training_step(eager, eager, autocast=autocast, device=device)
    loss, weights = training_step(model, compiled, autocast=autocast, device=device)
    assert float((loss - expected_loss).abs()) <= limit
    moved = max(float((b - a).abs().max()) for a, b in zip(start, expected, strict=True))
    assert moved > 0.01  # else equal weights would prove nothing
    for a, b in zip(weights, expected, strict=True):
        assert float((a - b).abs().max()) <= limit * max(1.0, moved)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_traced_training_step_equals_the_eager_one(autocast):
    compare("aot_eager", autocast=autocast, limit=2e-2 if autocast else 1e-5)


def test_a_gpus_way_is_traced_like_eager_code(monkeypatch):
    """The ways of the upsampling and of the offsets' convolution that are otherwise taken on a GPU only."""
    upsampling = importlib.import_module("sdan.ops.upsampling.conv_shuffle")
    monkeypatch.setattr(upsampling, "_keeps_channels_last", lambda x: True)
    monkeypatch.setattr(narrow_conv, "_as_product", lambda input, weight: True)
    compare("aot_eager", autocast=False, limit=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_training_step_equals_the_eager_one(dynamic, autocast):
    torch._dynamo.reset()
    compare("inductor", autocast=autocast, limit=2e-2 if autocast else 1e-4, dynamic=dynamic)


@pytest.mark.slow
def test_skip_rendering_compiles_for_any_size():
    """Here no activation separates the upsampling convolutions, so Inductor sees views of unknown size."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = SDANConfig(input="packed", scale=2, features=8, blocks=1, packing_kernel=4, skip="rendering")
    model = SDAN(config)
    nn.init.normal_(model.super_resolution.last.weight, std=0.1)  # it starts at 0, which hides all earlier layers
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for num_images, height, width in ((2, 8, 12), (3, 16, 8)):
        shapes = (4, height, width), (3, height, width), (3, 2 * height, 2 * width)
        images = [torch.rand(num_images, *shape) for shape in shapes]
        results = []
        for run in (model, compiled):
            model.zero_grad()
            output = run(*images)
            (output.zoomed.square().mean() + output.aligned.square().mean()).backward()
            gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
            results.append([output.zoomed, *gradients])
        for got, expected in zip(results[1], results[0], strict=True):
            assert float((got - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")
@pytest.mark.parametrize("packing", [2, 8])  # 64 values per token, for a fused kernel, and 4, in blocks
@pytest.mark.parametrize("autocast", [False, True])
def test_gpu_compiled_training_step_equals_the_eager_one(autocast, packing):
    torch._dynamo.reset()
    limit = 2e-2 if autocast else 1e-3
    with compute_plan(torch.device("cuda"), "fp32").tf32_flags():  # cudnn.flags would switch cuDNN off, too
        compare("inductor", autocast=autocast, limit=limit, device="cuda", packing=packing)
