"""Random inputs and comparisons shared by the tests of the squared deformable convolution."""

import torch

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Errors relative to the largest value; half types are compared with float64 of the same rounded inputs."""


def case(size=(9, 13), *, batch=2, channels=(3, 4), kernel=3, dtype=torch.float64, spread=3.0, seed=0):
    """Seeded [input, offset, weight, bias]; many offsets leave the image."""
    random = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, channels[0], *size),
        (batch, 2, *size),
        (channels[1], channels[0], kernel, kernel),
        (channels[1],),
    )
    input, offset, weight, bias = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
    return [tensor.to(dtype) for tensor in (input, spread * offset, weight, bias)]


def value_and_gradients(operator, tensors, upstream=None):
    """[value, gradient of each tensor] for a seeded upstream gradient."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = operator(*leaves)
    if upstream is None:
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output))]


def assert_near(got, expected, limit):
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape
        scale = max(float(b.detach().abs().max()), 1e-3)
        error = float((a.detach().double() - b.detach().double()).abs().max())
        assert error <= limit * scale, f"tensor {number} (0 is the value)"
