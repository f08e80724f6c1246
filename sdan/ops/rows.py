"""The sampling in plain PyTorch, on channels-last rows, for every device and every floating type; deterministic.

An image is a table with one row of C values per pixel. Bilinear sampling is then a weighted sum of four rows, which
`embedding_bag` with per-sample weights computes in one pass. The backward pass scatters: it sorts the samples by target
and applies `embedding_bag` again. There are no atomics, so the result does not depend on the order of threads.

Axes: N batch, C channels, H W output rows and columns, P = N H W samples, Q = N frame_height frame_width frame pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_SUM = 0  # embedding_bag's code for mode="sum"
_INT32_ROWS = 2**29  # below this, indices are int32, which halves the time of the sort
_BAND_SAMPLES = 2**14  # samples per band of the half-type offset gradient, which copies their channels


@dataclass(frozen=True)
class Corners:
    """The four pixels around each sample and their bilinear weights. Axis 0 of `inside_*` and `weight_*` is (y, x)."""

    index_P4: Tensor
    """Row of the frame table for each corner (top left, top right, bottom left, bottom right); always a valid row."""
    inside_low: Tensor
    """[2, P] 1 if the upper (left) corner is inside the frame, else 0."""
    inside_high: Tensor
    """[2, P] the same for the lower (right) corner."""
    weight_low: Tensor
    """[2, P] bilinear weight of the upper (left) corner, 0 if outside."""
    weight_high: Tensor
    """[2, P] the same for the lower (right) corner."""
    invalid: Tensor
    """[P] True if the offset is NaN."""

    def weights_P4(self, dtype: torch.dtype) -> Tensor:
        """The weight of each corner, in the order of `index_P4`."""
        (top, left), (bottom, right) = self.weight_low, self.weight_high
        return torch.stack((top * left, top * right, bottom * left, bottom * right), dim=1).to(dtype)


def positions(offset_N2HW: Tensor, margin: int) -> Tensor:
    """Sampling positions [2, N, H, W], (y, x), at least float32, in a frame `margin` pixels larger on each side."""
    offset = offset_N2HW.transpose(0, 1)
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
    height, width = offset.shape[2:]
    rows = torch.arange(margin, margin + height, device=offset.device, dtype=offset.dtype)
    columns = torch.arange(margin, margin + width, device=offset.device, dtype=offset.dtype)
    return offset + torch.stack(torch.meshgrid(rows, columns, indexing="ij")).unsqueeze(1)


def find_corners(offset_N2HW: Tensor, frame: tuple[int, int], margin: int) -> Corners:
    """The four corners of each sample; NaN and infinite offsets get weight 0 and a valid row index."""
    num_images, (height, width) = offset_N2HW.shape[0], frame
    position = positions(offset_N2HW, margin)
    size = torch.tensor(frame, device=position.device, dtype=position.dtype).view(2, 1, 1, 1)
    bounded = torch.minimum(position.clamp(min=-2), size)  # -2, not -1: at exactly -1 the slope is not 0
    low = bounded.floor()
    share = bounded - low
    inside_low = (low >= 0) & (low < size)  # False for NaN
    inside_high = (low >= -1) & (low < size - 1)
    # A corner outside the frame takes the index of its neighbour inside, so that a NaN elsewhere in the image is not
    # read.
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
    """The image in channels-last memory, without a copy if it already is.

    On the CPU each image is transposed separately: PyTorch tiles the copy of a transposed matrix but not that of a
    permuted batch, so this takes half the time. Tracing copies the batch, because a loop would fix its size.
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


def contiguous(image_NCHW: Tensor) -> Tensor:
    """The image in contiguous memory, without a copy if it already is. The reverse of `channels_last`."""
    if image_NCHW.device.type != "cpu" or not image_NCHW.is_contiguous(memory_format=torch.channels_last):
        return image_NCHW.contiguous()
    output = torch.empty_like(image_NCHW, memory_format=torch.contiguous_format)
    for target, image in zip(output.flatten(2), image_NCHW.permute(0, 2, 3, 1).flatten(1, 2), strict=True):
        target.copy_(image.t())
    return output


def to_rows(image_NCHW: Tensor) -> Tensor:
    """[N H W, C]; free when the image is channels-last."""
    return channels_last(image_NCHW).permute(0, 2, 3, 1).reshape(-1, image_NCHW.shape[1])


def from_rows(rows: Tensor, num_images: int, size: tuple[int, int]) -> Tensor:
    """The inverse of `to_rows`: channels-last [N, C, H, W]."""
    return rows.view(num_images, *size, rows.shape[-1]).permute(0, 3, 1, 2)


def warp(input: Tensor, offset: Tensor, bias: Tensor | None, margin: int, *, channels_last: bool = True) -> Tensor:
    """output(p) = bias + sum over the four corners q of weight(p, q) input(q), in the layout that is asked for."""
    corners = find_corners(offset, _frame(input), margin)
    rows = _sum_rows(to_rows(input), corners.index_P4, corners.weights_P4(input.dtype))
    outside = (corners.weight_low + corners.weight_high).amin(dim=0) == 0
    # A sample wholly outside is 0 even if the nearest border pixel is not finite. A NaN offset gives NaN.
    rows.index_fill_(0, outside.nonzero().flatten(), 0.0)
    rows.index_fill_(0, corners.invalid.nonzero().flatten(), float("nan"))
    if bias is not None:
        rows.add_(bias)
    output = from_rows(rows, input.shape[0], (offset.shape[2], offset.shape[3]))
    return output if channels_last else contiguous(output)


def warp_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    margin: int,
    needs: tuple[bool, bool, bool],
    bias_type: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `warp` with respect to input, offset and bias; None where `needs` is False.

    Args:
        bias_type: of the gradient of bias; default: at least float32.
    """
    need_input, need_offset, need_bias = needs
    corners = find_corners(offset, _frame(input), margin)
    grad_rows = to_rows(grad)
    grad_input = grad_offset = grad_bias = None
    if need_offset:
        num_images, _, height, width = offset.shape
        steps = _offset_gradient(grad_rows, to_rows(input), corners).view(2, num_images, height, width)
        grad_offset = offset.new_empty(offset.shape).copy_(steps.transpose(0, 1))
    if need_input:
        num_targets = input.shape[0] * input.shape[2] * input.shape[3]
        grad_input = from_rows(scatter(grad_rows, corners, num_targets), input.shape[0], _frame(input))
    if need_bias:
        grad_bias = bias_gradient(grad, bias_type)
    return grad_input, grad_offset, grad_bias


def bias_gradient(grad: Tensor, bias_type: torch.dtype | None = None) -> Tensor:
    """The sum over images and pixels, at least float32 until it is cast to `bias_type`."""
    total = to_rows(grad).sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
    return total if bias_type is None else total.to(bias_type)


def scatter(grad_rows: Tensor, corners: Corners, num_targets: int) -> Tensor:
    """grad_input(q) = sum of weight(p, q) grad(p) over the samples p that read q.

    Sorts the samples by q, then sums one bag of rows per q.
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
    else:  # `_dots` is slow in half types: sample with the slopes as weights, then take one dot product per axis
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
    """(d/dy, d/dx) of the bilinear patch through four corner values [4, ..., P]."""
    (top, left), (bottom, right) = corners.weight_low, corners.weight_high
    (has_top, has_left), (has_bottom, has_right) = corners.inside_low, corners.inside_high
    top_left, top_right, bottom_left, bottom_right = values_4P
    slope_y = has_bottom * (left * bottom_left + right * bottom_right) - has_top * (left * top_left + right * top_right)
    slope_x = has_right * (top * top_right + bottom * bottom_right) - has_left * (top * top_left + bottom * bottom_left)
    return torch.stack((slope_y, slope_x))


def _sum_rows(rows: Tensor, index_P4: Tensor, weights_P4: Tensor) -> Tensor:
    return functional.embedding_bag(index_P4, rows, per_sample_weights=weights_P4, mode="sum")


def _dots(grad_rows: Tensor, input_rows: Tensor, index_P4: Tensor) -> Tensor:
    """[P, 4]: grad(p) . input(q) for the four corners q.

    This is embedding_bag's gradient for its weights, which does not gather the corners.
    """
    num_samples = index_P4.shape[0]
    bag = torch.arange(4 * num_samples, device=index_P4.device, dtype=index_P4.dtype).bitwise_right_shift_(2)
    starts = torch.arange(0, 4 * num_samples, 4, device=index_P4.device, dtype=index_P4.dtype)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_rows, input_rows, index_P4.flatten(), starts, bag, _SUM
    )
    return dots.view(-1, 4)


def _bags(rows: Tensor, index: Tensor, ends: Tensor, weights: Tensor) -> Tensor:
    """Row q of the result is the weighted sum of rows[index[ends[q] : ends[q + 1]]]; 0 for an empty bag."""
    return functional.embedding_bag(index, rows, ends, per_sample_weights=weights, mode="sum", include_last_offset=True)


def _frame(input: Tensor) -> tuple[int, int]:
    return input.shape[2], input.shape[3]
