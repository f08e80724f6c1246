"""The sampling in plain PyTorch, on channels-last rows: every device, every floating type, deterministic.

A picture is a table of rows, one per pixel, C values each. Bilinear sampling is then a weighted sum of four rows,
which is what `embedding_bag` with per-sample weights computes in one pass; its transpose (the scatter of the backward
pass) is the same operation on the samples sorted by target. No atomics, so that the result never depends on the order
of threads.

Axes: N batch, C channels, H W output rows and columns, P = N H W samples, Q = N frame_height frame_width frame pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_SUM = 0  # embedding_bag's number for mode="sum"
_INT32_ROWS = 2**29  # 4 P and Q below 2^31: int32 indices halve the time of the sort
_BAND_SAMPLES = 2**14  # samples whose channels are held a second time


@dataclass(frozen=True)
class Corners:
    """Where each sample falls between the four pixels around it. Axis 0 of `inside_*`, `weight_*`, `invalid` is (y,
    x).
    """

    index_P4: Tensor
    """row of the frame table per corner (top left, top right, bottom left, bottom right), always inside the table"""
    inside_low: Tensor
    """[2, P] whether the upper (left) corner lies in the frame, 0 or 1"""
    inside_high: Tensor
    """[2, P] the same for the lower (right) corner"""
    weight_low: Tensor
    """[2, P] bilinear weight of the upper (left) corner, 0 where outside"""
    weight_high: Tensor
    """[2, P] the same for the lower (right) corner"""
    invalid: Tensor
    """[P] True where the offset is NaN"""

    def weights_P4(self, dtype: torch.dtype) -> Tensor:
        (top, left), (bottom, right) = self.weight_low, self.weight_high
        return torch.stack((top * left, top * right, bottom * left, bottom * right), dim=1).to(dtype)


def positions(offset_N2HW: Tensor, margin: int) -> Tensor:
    """Sampling positions [2, N, H, W] (y, x) in a frame that is `margin` pixels larger on each side; at least
    float32.
    """
    offset = offset_N2HW.transpose(0, 1)
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
    height, width = offset.shape[2:]
    rows = torch.arange(margin, margin + height, device=offset.device, dtype=offset.dtype)
    columns = torch.arange(margin, margin + width, device=offset.device, dtype=offset.dtype)
    return offset + torch.stack(torch.meshgrid(rows, columns, indexing="ij")).unsqueeze(1)


def inside_mask(offset_N2HW: Tensor) -> Tensor:
    """[N, 1, H, W] float32, 1 where p + offset(p) lies in the image; 0 for NaN."""
    y, x = positions(offset_N2HW, margin=0)
    height, width = offset_N2HW.shape[2:]
    return ((y >= 0) & (y <= height - 1) & (x >= 0) & (x <= width - 1)).to(torch.float32).unsqueeze(1)


def find_corners(offset_N2HW: Tensor, frame: tuple[int, int], margin: int) -> Corners:
    """The four corners of each sample; NaN and infinite offsets give weight 0 and an index inside the table."""
    num_images, (height, width) = offset_N2HW.shape[0], frame
    position = positions(offset_N2HW, margin)
    size = torch.tensor(frame, device=position.device, dtype=position.dtype).view(2, 1, 1, 1)
    bounded = torch.minimum(position.clamp(min=-2), size)  # -1 itself still has a slope
    low = bounded.floor()
    share = bounded - low
    inside_low = (low >= 0) & (low < size)  # False for NaN
    inside_high = (low >= -1) & (low < size - 1)
    # The index of a corner outside is the index of its neighbour inside, so that a NaN elsewhere in the picture
    # cannot leak in.
    finite = low.nan_to_num_(nan=0.0)
    last = size - 1
    wide = torch.int32 if num_images * max(height * width, 4 * offset_N2HW[0, 0].numel()) < _INT32_ROWS else torch.int64
    low_index = torch.minimum(finite.clamp(min=0), last).to(wide)
    high_index = torch.minimum(finite + 1, last).clamp_(min=0).to(wide)
    images = torch.arange(num_images, device=position.device, dtype=wide).view(-1, 1, 1) * (height * width)
    top, bottom = images + low_index[0] * width, images + high_index[0] * width
    left, right = low_index[1], high_index[1]
    return Corners(
        index_P4=torch.stack((top + left, top + right, bottom + left, bottom + right), dim=-1).view(-1, 4),
        inside_low=inside_low.to(position.dtype).flatten(1),
        inside_high=inside_high.to(position.dtype).flatten(1),
        weight_low=torch.where(inside_low, 1 - share, 0).flatten(1),
        weight_high=torch.where(inside_high, share, 0).flatten(1),
        invalid=torch.isnan(position).any(dim=0).flatten(),
    )


def channels_last(image_NCHW: Tensor) -> Tensor:
    """The image in channels-last memory; itself if it is.

    A transposed copy of a matrix goes by tiles in PyTorch, a permuted copy of a batch does not: image by image takes
    half the time. (Not while tracing, where the loop would fix the batch size.)
    """
    if image_NCHW.is_contiguous(memory_format=torch.channels_last) or torch.compiler.is_compiling():
        return image_NCHW.contiguous(memory_format=torch.channels_last)
    if image_NCHW.device.type != "cpu" or not image_NCHW.is_contiguous():
        return image_NCHW.contiguous(memory_format=torch.channels_last)
    num_images, channels, height, width = image_NCHW.shape
    rows = image_NCHW.new_empty((num_images, height * width, channels))
    for target, image in zip(rows, image_NCHW.flatten(2), strict=True):
        target.copy_(image.t())
    return from_rows(rows, num_images, (height, width))


def to_rows(image_NCHW: Tensor) -> Tensor:
    """[N H W, C]; free when the image is channels-last."""
    return channels_last(image_NCHW).permute(0, 2, 3, 1).reshape(-1, image_NCHW.shape[1])


def from_rows(rows: Tensor, num_images: int, size: tuple[int, int]) -> Tensor:
    """The channels-last [N, C, H, W] whose rows these are."""
    return rows.view(num_images, *size, rows.shape[-1]).permute(0, 3, 1, 2)


def warp(
    input: Tensor, offset: Tensor, bias: Tensor | None, *, margin: int, relu: bool, with_mask: bool
) -> tuple[Tensor, Tensor]:
    """output(p) = bias + sum over the four corners q of weight(p, q) input(q), then ReLU if asked; and the mask M."""
    corners = find_corners(offset, _frame(input), margin)
    rows = _sum_rows(to_rows(input), corners.index_P4, corners.weights_P4(input.dtype))
    outside = (corners.weight_low + corners.weight_high).amin(dim=0) == 0
    # A sample wholly outside is 0 even if the border pixel next to it is not finite; a NaN offset is not hidden.
    rows.index_fill_(0, outside.nonzero().flatten(), 0.0)
    rows.index_fill_(0, corners.invalid.nonzero().flatten(), float("nan"))
    if bias is not None:
        rows.add_(bias)
    if relu:
        rows.relu_()
    mask = inside_mask(offset) if with_mask else offset.new_empty(0, dtype=torch.float32)
    return from_rows(rows, input.shape[0], (offset.shape[2], offset.shape[3])), mask


def warp_backward(
    grad: Tensor, input: Tensor, offset: Tensor, *, margin: int, need_input: bool, need_offset: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of `warp` with respect to input and offset; an empty tensor for one that is not needed."""
    corners = find_corners(offset, _frame(input), margin)
    grad_rows = to_rows(grad)
    grad_input, grad_offset = grad.new_empty(0), offset.new_empty(0)
    if need_offset:
        num_images, _, height, width = offset.shape
        steps = _offset_gradient(grad_rows, to_rows(input), corners).view(2, num_images, height, width)
        grad_offset = offset.new_empty(offset.shape).copy_(steps.transpose(0, 1))
    if need_input:
        num_targets = input.shape[0] * input.shape[2] * input.shape[3]
        grad_input = from_rows(scatter(grad_rows, corners, num_targets), input.shape[0], _frame(input))
    return grad_input, grad_offset


def scatter(grad_rows: Tensor, corners: Corners, num_targets: int) -> Tensor:
    """grad_input(q) = sum over samples p that touch q of weight(p, q) grad(p): the samples sorted by q, then bags of
    rows.
    """
    index = corners.index_P4.flatten()
    order = index.sort(stable=True).indices
    ends = torch.zeros(num_targets + 1, dtype=torch.int64, device=index.device)
    torch.cumsum(torch.bincount(index, minlength=num_targets), dim=0, out=ends[1:])
    weights = corners.weights_P4(grad_rows.dtype).flatten()[order]
    return _bags(grad_rows, order.bitwise_right_shift_(2), ends, weights)


def _offset_gradient(grad_rows: Tensor, input_rows: Tensor, corners: Corners) -> Tensor:
    """[2, P]: sum over channels of grad(p) times the slope of the bilinear patch, (d/dy, d/dx), at least float32."""
    if grad_rows.dtype in (torch.float32, torch.float64):
        steps = _slopes(corners, _dots(grad_rows, input_rows, corners.index_P4).t().contiguous().to(corners.weight_low))
    else:  # the scalar dots are slow in half types: sample with the slopes as weights, then one dot each
        corner_slopes = _slopes(corners, torch.eye(4, device=grad_rows.device).unsqueeze(-1))  # [2, 4, P]
        steps = torch.empty_like(corner_slopes[:, 0])
        for first in range(0, len(grad_rows), _BAND_SAMPLES):
            band = slice(first, first + _BAND_SAMPLES)
            for step_P, slope_4P in zip(steps, corner_slopes, strict=True):
                weights = slope_4P[:, band].t().to(grad_rows.dtype).contiguous()
                slope_rows = _sum_rows(input_rows, corners.index_P4[band], weights)
                step_P[band] = slope_rows.mul_(grad_rows[band]).sum(dim=1, dtype=torch.float32)
    outside = (corners.inside_low + corners.inside_high).amin(dim=0) == 0
    return steps.masked_fill_(outside, 0.0).masked_fill_(corners.invalid, float("nan"))


def _slopes(corners: Corners, values_4P: Tensor) -> Tensor:
    """(d/dy, d/dx) of the bilinear patch through four corner values; values may have more axes before the last."""
    (top, left), (bottom, right) = corners.weight_low, corners.weight_high
    (has_top, has_left), (has_bottom, has_right) = corners.inside_low, corners.inside_high
    top_left, top_right, bottom_left, bottom_right = values_4P
    slope_y = has_bottom * (left * bottom_left + right * bottom_right) - has_top * (left * top_left + right * top_right)
    slope_x = has_right * (top * top_right + bottom * bottom_right) - has_left * (top * top_left + bottom * bottom_left)
    return torch.stack((slope_y, slope_x))


def _sum_rows(rows: Tensor, index_P4: Tensor, weights_P4: Tensor) -> Tensor:
    return functional.embedding_bag(index_P4, rows, per_sample_weights=weights_P4, mode="sum")


def _dots(grad_rows: Tensor, input_rows: Tensor, index_P4: Tensor) -> Tensor:
    """[P, 4]: grad(p) . input(q) for the four corners q, without gathering them: embedding_bag's own weight
    gradient.
    """
    num_samples = index_P4.shape[0]
    bag = torch.arange(4 * num_samples, device=index_P4.device, dtype=index_P4.dtype).bitwise_right_shift_(2)
    starts = torch.arange(0, 4 * num_samples, 4, device=index_P4.device, dtype=index_P4.dtype)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_rows, input_rows, index_P4.flatten(), starts, bag, _SUM
    )
    return dots.view(-1, 4)


def _bags(rows: Tensor, index: Tensor, ends: Tensor, weights: Tensor) -> Tensor:
    """Row q of the result: the weighted sum of rows[index[ends[q] : ends[q + 1]]]; 0 for an empty bag."""
    return functional.embedding_bag(index, rows, ends, per_sample_weights=weights, mode="sum", include_last_offset=True)


def _frame(input: Tensor) -> tuple[int, int]:
    return input.shape[2], input.shape[3]
