"""The operators written out plainly and slowly: the references for the tests and the self-test."""

import math

import torch
from torch import Tensor


def squared_deform_loops(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Eq. 5 as nested loops in float64: every tap of every window is sampled separately.

    Arguments and result as in `squared_deform_conv2d`, but offsets must be finite. Takes about N Cout Cin K K H W
    microseconds.
    """
    num_images, channels_in, height, width = input.shape
    channels_out, half = weight.shape[0], weight.shape[2] // 2
    picture, shift, kernel = input.double().tolist(), offset.double().tolist(), weight.double().tolist()
    output = torch.zeros(num_images, channels_out, height, width, dtype=torch.float64)
    for n in range(num_images):
        for row in range(height):
            for column in range(width):
                for dy in range(-half, half + 1):
                    for dx in range(-half, half + 1):
                        y = row + dy + shift[n][0][row][column]
                        x = column + dx + shift[n][1][row][column]
                        for c in range(channels_in):
                            value = _bilinear(picture[n][c], y, x)
                            for out in range(channels_out):
                                output[n, out, row, column] += kernel[out][c][dy + half][dx + half] * value
    return output if bias is None else output + bias.double()[:, None, None]


def _bilinear(plane: list[list[float]], y: float, x: float) -> float:
    """The value at (y, x): each of the four pixels around it has weight (1 - |dy|) (1 - |dx|), or 0 if outside."""
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < len(plane) and 0 <= column < len(plane[0]):
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * plane[row][column]
    return total


def squared_deform_repeated(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The authors' implementation: torchvision's per-point operator with the same offset for each of the K*K taps."""
    from torchvision.ops import deform_conv2d  # `import sdan` must not need torchvision

    kernel = weight.shape[-1]
    return deform_conv2d(input, offset.repeat(1, kernel * kernel, 1, 1), weight, bias, padding=kernel // 2)


def explicit_attention(x_NLC: Tensor) -> Tensor:
    """The authors' implementation: softmax(rowmax(E) - E) X with the whole matrix E = X X^T."""
    energy_NLL = torch.bmm(x_NLC, x_NLC.transpose(1, 2))
    energy_NLL = energy_NLL.amax(dim=-1, keepdim=True).expand_as(energy_NLL) - energy_NLL
    return torch.bmm(energy_NLL.softmax(dim=-1).to(x_NLC.dtype), x_NLC)
