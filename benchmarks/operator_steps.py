"""Calls of the operators that the benchmarks time: forward, and forward with backward, on random inputs."""

from collections.abc import Callable

import torch
from measure import Step
from torch import Tensor
from torch.nn import functional

CPU = torch.device("cpu")


def backward_of(operator: Callable[..., Tensor], tensors: list[Tensor], upstream: Tensor) -> Step:
    return lambda: torch.autograd.grad(operator(*tensors), tensors, upstream)


def forward_of(operator: Callable[..., Tensor], tensors: list[Tensor]) -> Step:
    def step() -> Tensor:
        with torch.no_grad():
            return operator(*tensors)

    return step


def operator_case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: torch.memory_format, device: torch.device = CPU
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(ours: input, offset, weight, bias), (conv: input, weight, bias), upstream gradient."""
    random = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device)

    num_images, channels, height, width = shape
    input = normal(*shape).to(dtype).contiguous(memory_format=layout)
    offset = 3 * normal(num_images, 2, height, width)
    weight = (normal(channels, channels, 3, 3) / 24).to(dtype)
    bias = normal(channels).to(dtype)
    upstream = normal(*shape).to(dtype).contiguous(memory_format=layout)
    ours = [tensor.requires_grad_() for tensor in (input, offset, weight, bias)]
    return ours, [ours[0], *ours[2:]], upstream


def plain_conv(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.conv2d(input, weight, bias, padding=1)


def module_step(module: torch.nn.Module, features: Tensor, reference: Tensor, dtype: torch.dtype) -> Step:
    """Forward and backward as in a training step: half types through autocast."""

    def step() -> None:
        with torch.autocast(features.device.type, dtype=dtype, enabled=dtype != torch.float32):
            aligned_features, aligned, _, _ = module(features, reference)
        (aligned_features.float().square().mean() + aligned.float().square().mean()).backward()

    return step


def relative_errors(
    operator: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    tensors: list[Tensor],
    upstream: Tensor,
    reference_dtype: torch.dtype,
) -> list[float]:
    """Largest difference between an operator and its reference, over the reference's largest value: the output, then
    the gradient of each tensor.
    """
    output = operator(*tensors)
    found = [output, *torch.autograd.grad(output, tensors, upstream)]
    exact = [tensor.detach().to(reference_dtype).requires_grad_() for tensor in tensors]
    output = reference(*exact)
    expected = [output, *torch.autograd.grad(output, exact, upstream.to(reference_dtype))]
    pairs = zip(found, expected, strict=True)
    return [float(((a.to(reference_dtype) - b).abs().max() / b.abs().max()).detach()) for a, b in pairs]
