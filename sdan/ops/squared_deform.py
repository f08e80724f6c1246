"""Squared deformable convolution (SDAN, eq. 5): one offset for the whole convolution window.

    output(p) = bias + sum_k weight_k . input(p + k + offset(p))        bilinear, zero outside the image

One offset serves the whole window and bilinear sampling commutes with convolution, so the window is convolved first
and sampled once: y = conv2d(input, weight, padding=K-1), then output(p) = y(p + K//2 + offset(p)). The convolution is
the vendor's, the sampling is the operator `sdan::bilinear_warp`: four reads per value instead of 4 K K, and no im2col
buffer.

Axes: N batch, C channels, H W rows and columns, K the (odd) kernel size. Offsets are (dy, dx) in input pixels.
"""

from typing import Any

import torch
from torch import Tensor

from sdan.ops import portable, rows
from sdan.ops.backend import kernels
from sdan.ops.full_conv import full_conv2d

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def bilinear_warp(input: Tensor, offset: Tensor) -> Tensor:
    """output(n, c, p) = input(n, c, p + offset(n, :, p)), bilinear, zero outside the image.

    Args:
        input: [N, C, H, W], float64, float32, bfloat16 or float16.
        offset: [N, 2, H, W], (dy, dx) in pixels; input's type or float32. Positions are computed in at least float32.
            An infinite offset samples outside (0); a NaN makes its own pixel NaN and touches no other.

    Returns:
        [N, C, H, W] in input's type and memory format. Once differentiable in both arguments.

    Raises:
        ValueError, TypeError: shapes, devices or types that do not fit, with both values.
    """
    check_warp(input, offset, None, margin=0)
    return _as_input(_sample(input, offset, None, margin=0, relu=False, with_mask=False)[0], input)


def squared_deform_conv2d(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """output(p) = bias + sum_k weight_k . input(p + k + offset(p)), bilinear, zero outside the image (paper, eq. 5).

    The same as `torchvision.ops.deform_conv2d(input, offset.repeat(1, K * K, 1, 1), weight, bias, padding=K // 2)`,
    border rule included. (Printed, eq. 5 adds p twice and indexes the weight by position; this is what its text and
    the authors' code mean.)

    Args:
        input: [N, Cin, H, W], float64, float32, bfloat16 or float16.
        offset: [N, 2, H, W], (dy, dx) in input pixels, one pair for the whole window; input's type or float32.
        weight: [Cout, Cin, K, K], K odd; stride 1, "same" size.
        bias: [Cout] or None.
        relu: also apply max(0, .), in the same pass.

    Returns:
        [N, Cout, H, W]; channels-last if input is. Under autocast the convolution runs in the lower type and offsets
        stay float32.

    Raises:
        ValueError, TypeError: shapes, devices or types that do not fit, with both values.
    """
    return _squared_deform(input, offset, weight, bias, relu=relu, with_mask=False)[0]


def squared_deform_conv2d_with_mask(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False
) -> tuple[Tensor, Tensor]:
    """`squared_deform_conv2d` and `offset_mask(offset)`, the mask M of eq. 6, from the same pass."""
    return _squared_deform(input, offset, weight, bias, relu=relu, with_mask=True)


def offset_mask(offset: Tensor, kernel: int = 1) -> Tensor:
    """M of eq. 6: 1 where the sampling point p + offset(p) lies inside the image, else 0; not differentiable.

    Args:
        offset: [N, 2, H, W], (dy, dx) in pixels.
        kernel: size of the window that the offset moves, odd. The moved window hangs over the border no further than
            an ordinary same-size convolution's does wherever its centre is inside, so that M is the same for every K.

    Returns:
        [N, 1, H, W] float32; 0 for NaN and infinite offsets.
    """
    if offset.dim() != 4 or offset.shape[1] != 2:
        raise ValueError(f"offset.shape is not valid: got {tuple(offset.shape)}, expected [N, 2, H, W] with (dy, dx)")
    if kernel % 2 != 1:
        raise ValueError(f"kernel is not valid: got {kernel}, expected an odd number")
    return rows.inside_mask(offset.detach())


def _squared_deform(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool, with_mask: bool
) -> tuple[Tensor, Tensor]:
    if torch.is_autocast_enabled(input.device.type) and offset.dtype in (torch.bfloat16, torch.float16):
        offset = offset.float()  # from a layer that ran in the lower type, over an input that did not
    _check_conv(input, offset, weight, bias)
    full = full_conv2d(input, weight)
    bias = None if bias is None else bias.to(full.dtype)
    output, mask = _sample(full, offset, bias, margin=weight.shape[-1] // 2, relu=relu, with_mask=with_mask)
    return _as_input(output, input), mask


def _sample(
    input: Tensor, offset: Tensor, bias: Tensor | None, *, margin: int, relu: bool, with_mask: bool
) -> tuple[Tensor, Tensor]:
    if portable.enabled():
        return portable.warp(input, offset, bias, margin=margin, relu=relu), rows.inside_mask(offset.detach())
    return _warp_op(input, offset, bias, margin, relu, with_mask)


def _as_input(output: Tensor, input: Tensor) -> Tensor:
    """conv2d's rule: channels-last in, channels-last out; else contiguous, so that what follows keeps its layout."""
    return output if input.is_contiguous(memory_format=torch.channels_last) else output.contiguous()


@torch.library.custom_op("sdan::bilinear_warp", mutates_args=())
def _warp_op(
    input: Tensor, offset: Tensor, bias: Tensor | None, margin: int, relu: bool, with_mask: bool
) -> tuple[Tensor, Tensor]:
    """Sample a frame that is `margin` pixels larger than the output on each side; returns (output, mask),
    channels-last.
    """
    check_warp(input, offset, bias, margin)
    if offset.numel() == 0:
        return _warp_fake(input, offset, bias, margin, relu, with_mask)
    return kernels(input).warp(input, offset, bias, margin=margin, relu=relu, with_mask=with_mask)


@_warp_op.register_fake
def _warp_fake(
    input: Tensor, offset: Tensor, bias: Tensor | None, margin: int, relu: bool, with_mask: bool
) -> tuple[Tensor, Tensor]:
    num_images, _, height, width = offset.shape
    output = _empty_channels_last(input, (num_images, input.shape[1], height, width))
    return output, offset.new_empty((num_images, 1, height, width) if with_mask else (0,), dtype=torch.float32)


@torch.library.custom_op("sdan::bilinear_warp_backward", mutates_args=())
def _backward_op(
    grad: Tensor, input: Tensor, offset: Tensor, margin: int, need_input: bool, need_offset: bool
) -> tuple[Tensor, Tensor]:
    """(grad_input, grad_offset), channels-last and contiguous; one that is not needed is an empty tensor."""
    if offset.numel() == 0:
        return tuple(zeros.zero_() for zeros in _backward_fake(grad, input, offset, margin, need_input, need_offset))
    return kernels(input).warp_backward(
        grad, input, offset, margin=margin, need_input=need_input, need_offset=need_offset
    )


@_backward_op.register_fake
def _backward_fake(
    grad: Tensor, input: Tensor, offset: Tensor, margin: int, need_input: bool, need_offset: bool
) -> tuple[Tensor, Tensor]:
    grad_input = _empty_channels_last(input, input.shape) if need_input else grad.new_empty(0)
    grad_offset = offset.new_empty(offset.shape) if need_offset else offset.new_empty(0)
    return grad_input, grad_offset


def _empty_channels_last(like: Tensor, shape: Any) -> Tensor:
    num_images, channels, height, width = shape
    return like.new_empty((num_images, height, width, channels)).permute(0, 3, 1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, offset, bias, ctx.margin, ctx.relu, _ = inputs
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(input, offset, output[0] if ctx.relu else None)


def _backward(ctx: Any, grad: Tensor, _grad_mask: Tensor | None) -> tuple[Tensor | None, ...]:
    input, offset, output = ctx.saved_tensors
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    need_input, need_offset = ctx.needs_input_grad[:2]
    grad_input = grad_offset = grad_bias = None
    if need_input or need_offset:
        grad_input, grad_offset = _backward_op(grad, input, offset, ctx.margin, need_input, need_offset)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_input if need_input else None, grad_offset if need_offset else None, grad_bias, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "sdan::bilinear_warp is once differentiable: got a double backward (create_graph=True); "
        "use `with sdan.ops.portable_form():`, whose plain form has every derivative"
    )


_warp_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(_no_second_derivative)


def _autocast(
    input: Tensor, offset: Tensor, bias: Tensor | None, margin: int, relu: bool, with_mask: bool
) -> tuple[Tensor, Tensor]:
    """The input keeps its type; offsets are raised to float32 (bfloat16 has half a pixel left at 100 px); bias
    follows the input.
    """
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32)) if input.dtype != torch.float64 else offset
    bias = None if bias is None else bias.to(input.dtype)
    with torch.amp.autocast(input.device.type, enabled=False):
        return _warp_op(input, offset, bias, margin, relu, with_mask)


_library = torch.library.Library("sdan", "FRAGMENT")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("bilinear_warp", _autocast, _key)


def check_warp(input: Tensor, offset: Tensor, bias: Tensor | None, margin: int) -> None:
    """Refuse what the kernels could not read safely; both numbers in the message, as torchvision's."""
    if input.dim() != 4 or offset.dim() != 4:
        raise ValueError(f"Expected 4-D input and offset: got input.dim()={input.dim()}, offset.dim()={offset.dim()}")
    if offset.shape[1] != 2:
        raise ValueError(
            f"offset.shape[1] is not valid: got {offset.shape[1]}, expected 2 (dy, dx) for the whole window"
        )
    if offset.shape[0] != input.shape[0]:
        raise ValueError(f"invalid batch size of offset: got {offset.shape[0]}, expected {input.shape[0]} as in input")
    expected = (input.shape[2] - 2 * margin, input.shape[3] - 2 * margin)
    if (offset.shape[2], offset.shape[3]) != expected:
        got = (offset.shape[2], offset.shape[3])
        raise ValueError(f"offset output dims: got {got}, while the computed output dims are {expected}")
    if bias is not None and bias.shape != (input.shape[1],):
        raise ValueError(f"bias.shape is not valid: got {tuple(bias.shape)}, expected ({input.shape[1]},)")
    if input.dtype not in _FLOATS:
        raise TypeError(f"input.dtype is not valid: got {input.dtype}, expected one of {', '.join(map(str, _FLOATS))}")
    if offset.dtype not in (input.dtype, torch.float32):
        raise TypeError(
            f"offset.dtype is not valid: got {offset.dtype}, expected {input.dtype} as input or torch.float32"
        )
    for name, tensor in (("offset", offset), ("bias", bias)):
        if tensor is not None and tensor.device != input.device:
            raise ValueError(
                f"input and {name} must be on one device: got input on {input.device}, {name} on {tensor.device}"
            )


def _check_conv(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 != 1:
        raise ValueError(f"weight.shape is not valid: got {tuple(weight.shape)}, expected [Cout, Cin, K, K] with K odd")
    check_warp(input, offset, None, margin=0)
    if input.shape[1] != weight.shape[1]:
        raise ValueError(f"Got input.shape[1]={input.shape[1]}, while weight.shape[1]={weight.shape[1]}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"Got bias.shape={tuple(bias.shape)}, while weight.shape[0]={weight.shape[0]}")
    same_type = torch.is_autocast_enabled(input.device.type)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != input.device:
            raise ValueError(
                f"input and {name} must be on one device: got input on {input.device}, {name} on {tensor.device}"
            )
        if tensor is not None and tensor.dtype != input.dtype and not same_type:
            raise TypeError(f"Got input.dtype={input.dtype}, while {name}.dtype={tensor.dtype}")
