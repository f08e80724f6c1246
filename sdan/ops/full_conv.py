"""The full convolution: every window that touches the image, including windows that extend past its border."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdan.ops.precision import AMPERE, cuda_layout
from sdan.ops.rows import channels_last

_BAND_VALUES = 2**20
"""Input values in one band of the weight gradient by convolution: 4 MB in float32."""
_PRODUCT_VALUES = 2**18
"""The same by matrix products, which read K shifted copies: 3 MB for K = 3, which stay in the cache."""


def full_conv2d(input: Tensor, weight: Tensor) -> Tensor:
    """y(p) = sum_k weight_k . input(p + k) for every p whose window touches the image.

    Args:
        input: [N, Cin, H, W].
        weight: [Cout, Cin, K, K], K odd.

    Returns:
        [N, Cout, H + K - 1, W + K - 1], channels-last. Autocast treats it like `conv2d`.
    """
    input, weight = lowered(input, weight)
    if input.is_cuda:
        return convolve(input, weight)
    return _FullConv2d.apply(input, weight)


def lowered(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in autocast's type, on CUDA also in the layout in which cuDNN is fast.

    torch.compile chooses layouts itself. On the CPU `convolve` changes the layout, so that the saved input is no copy.
    """
    device = input.device
    dtype = input.dtype
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    if not input.is_cuda or torch.compiler.is_compiling():
        return input.to(dtype), weight.to(dtype)
    layout = layout_now(dtype, device.index)
    return _converted(input, dtype, layout), _converted(weight, dtype, layout)


def _converted(tensor: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """The tensor in this type and layout, by one copy at most."""
    if tensor.dtype != dtype:
        return tensor.to(dtype, memory_format=layout)
    return tensor.contiguous(memory_format=layout)


def layout_now(dtype: torch.dtype, device_index: int) -> torch.memory_format:
    """precision.cuda_layout for this GPU and PyTorch's TF32 switch as it is now."""
    tf32 = dtype == torch.float32 and _tf32_switch() == "tf32" and _has_tf32(device_index)
    return torch.channels_last if cuda_layout(dtype, tf32=tf32) == "channels_last" else torch.contiguous_format


def _tf32_switch() -> str:
    switch: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return switch


@lru_cache
def _has_tf32(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index) >= AMPERE


def convolve(input: Tensor, weight: Tensor) -> Tensor:
    """The full convolution of tensors from `lowered`, channels-last."""
    padding = weight.shape[-1] - 1
    if input.is_cuda:
        return torch.conv2d(input, weight, padding=padding).contiguous(memory_format=torch.channels_last)
    # No `contiguous` here: as it returns its argument, torch 2.11's Dynamo would lose the gradient of _FullConv2d.
    return torch.conv2d(channels_last(input), weight.contiguous(memory_format=torch.channels_last), padding=padding)


def convolve_backward(
    grad: Tensor, input: Tensor, weight: Tensor, need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `convolve`; None for a gradient that is not needed.

    On the CPU the weight gradient avoids two slow cases of oneDNN; the forward pass and the input gradient have none,
    and neither has cuDNN.
    """
    if input.is_cuda:
        return _cudnn_backward(grad, input, weight, need_input, need_weight)
    grad = channels_last(grad)
    grad_input = grad_weight = None
    if need_weight:  # first, to free its scratch memory before grad_input is allocated
        by_products = not torch.compiler.is_compiling() and _prefers_products()  # loops would fix the sizes
        grad_weight = (_weight_gradient_by_products if by_products else _weight_gradient)(grad, input, weight)
    if need_input:
        # The transpose of the full convolution is the valid one with the kernel rotated by 180 degrees.
        rotated = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        grad_input = functional.conv2d(grad, rotated)
    return grad_input, grad_weight


def _cudnn_backward(
    grad: Tensor, input: Tensor, weight: Tensor, need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients in one call, which also converts grad to the layout of input."""
    padding = [weight.shape[-1] - 1] * 2
    needs = [need_input, need_weight, False]
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        grad, input, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, needs
    )
    return grad_input, grad_weight


class _FullConv2d(torch.autograd.Function):
    """`convolve` with `convolve_backward`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        return convolve(input, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return convolve_backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad)


@lru_cache
def _prefers_products() -> bool:
    """Whether matrix products compute the weight gradient faster than oneDNN's channels-last convolution.

    They do on CPUs with AVX2 only, where the convolution takes over twice as long (docs/operator.md).
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def _weight_gradient_by_products(grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """grad_weight(k) = sum_q grad(q) input(q + k)^T: for each row of the window, one product of grad [Cout, Q] and K
    copies of input [Q, K Cin], each shifted by one column. Sums over bands of rows that fit in the cache.
    """
    channels, kernel = weight.shape[1], weight.shape[-1]
    pitch = grad.shape[3]
    rows = max(1, _PRODUCT_VALUES // max(1, channels * pitch))
    total = weight.new_zeros((kernel, len(weight), kernel * channels), dtype=_sum_type(weight))
    for grad_HWC, image in zip(grad.permute(0, 2, 3, 1), input, strict=True):
        for top in range(0, len(grad_HWC), rows):
            band_QC = grad_HWC[top : top + rows].reshape(-1, len(weight)).to(total.dtype)
            copies_QKC = _shifted_copies(image, top, top + rows, kernel, total.dtype)
            for row, part in enumerate(total):
                part.addmm_(band_QC.t(), copies_QKC[row * pitch : row * pitch + len(band_QC)])
    return total.view(kernel, len(weight), kernel, channels).permute(1, 3, 0, 2).to(weight.dtype)


def _shifted_copies(image: Tensor, top: int, bottom: int, kernel: int, dtype: torch.dtype) -> Tensor:
    """Rows top - (K - 1) to bottom of an image [C, H, W] in K copies [rows * (W + K - 1), K * C].

    Copy k at column q is the image at column q - (K - 1) + k; zero outside the image. The memory keeps the order of
    the image, because the products read both orders equally fast.
    """
    channels, height, width = image.shape
    reach = kernel - 1
    size = (bottom - top + reach, width + reach)
    if image.stride(0) == 1:  # channels-last
        memory = image.new_zeros((*size, kernel, channels), dtype=dtype)
        copies, flat = memory.permute(2, 3, 0, 1), memory.view(-1, kernel * channels)
    else:
        copies = image.new_zeros((kernel, channels, *size), dtype=dtype)
        flat = copies.view(kernel * channels, -1).t()
    low, high = max(top - reach, 0), min(bottom, height)
    for column, copy in enumerate(copies):
        start = reach - column
        copy[:, low - top + reach : high - top + reach, start : start + width] = image[:, low:high]
    return flat


def _sum_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _weight_gradient(grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """The weight gradient by convolutions with an input that is padded by hand: oneDNN's takes 3-5 times as long when
    the padding exceeds K // 2. Sums over bands of rows, so that the padded copy and oneDNN's scratch memory are needed
    for one band only.
    """
    num_images, channels, height, width = input.shape
    if torch.compiler.is_compiling():  # loops would fix the sizes
        return _band_gradient(grad, input, weight, 0, grad.shape[2])
    images = max(1, _BAND_VALUES // max(1, channels * height * width))
    rows = max(1, _BAND_VALUES // max(1, images * channels * width))
    total = torch.zeros_like(weight, dtype=_sum_type(weight))
    input = channels_last(input)
    for first in range(0, num_images, images):
        some = slice(first, first + images)
        for top in range(0, grad.shape[2], rows):
            total += _band_gradient(grad[some], input[some], weight, top, min(top + rows, grad.shape[2]))
    return total.to(weight.dtype)


def _band_gradient(grad: Tensor, input: Tensor, weight: Tensor, top: int, bottom: int) -> Tensor:
    """The part of the weight gradient from rows top to bottom (exclusive) of y.

    Row r of y depends on rows r - (K - 1) to r of the input.
    """
    num_images, channels, height, width = input.shape
    reach, half = weight.shape[-1] - 1, weight.shape[-1] // 2
    padded = input.new_zeros((num_images, bottom - top + reach, width + 2 * half, channels)).permute(0, 3, 1, 2)
    low, high = max(top - reach, 0), min(bottom, height)
    padded[:, :, low - top + reach : high - top + reach, half : half + width] = input[:, :, low:high]
    return torch.ops.aten.convolution_backward(
        grad[:, :, top:bottom], padded, weight, None, (1, 1), (0, half), (1, 1), False, (0, 0), 1, (False, True, False)
    )[1]
