"""The sampling as Triton kernels, forward and backward.

    forward     output(p, c) = bias(c) + sum_q weight(p, q) input(q, c)
    backward    grad_input(q, c) += weight(p, q) grad(p, c)
                grad_offset(p) = sum_c grad(p, c) sum_q (d weight(p, q) / d offset) input(q, c)
                grad_bias(c) = sum_p grad(p, c)

q runs over the four frame pixels around p + margin + offset(p). `input` and its gradient are channels-last, so the C
values of a corner are contiguous; `output` and `grad` are channels-last or contiguous. A program takes BLOCK_P samples
of one image, reads their offsets once, and reads BLOCK_C channels per corner in wide loads. Positions, weights and sums
are in ACC (float64 for float64 inputs, else float32).

Addresses are 64-bit; a sample's position within its image is 32-bit. Before positions become integers, infinite ones
are clamped to just outside the frame and NaNs are replaced by a position there, so neither can form an address.
"""

import triton
import triton.language as tl


@triton.jit
def _axis(position: tl.tensor, size: tl.tensor) -> tl.tensor:
    """One axis of the corners: the lower index, whether the lower and the upper neighbour are in the frame, and the
    weights of both (NaN for a NaN position).
    """
    bounded = tl.where(position == position, position, -2.0)
    # -2, not -1: at exactly -1 the neighbour inside has weight 0, but the slope is not 0.
    bounded = tl.minimum(tl.maximum(bounded, -2.0), size.to(position.dtype))
    low = tl.floor(bounded)
    share = tl.where(position == position, bounded - low, position)
    index = low.to(tl.int32)
    return index, (index >= 0) & (index < size), (index >= -1) & (index < size - 1), 1.0 - share, share


@triton.jit
def _corners(
    offset_ptr: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    frame_height: tl.tensor,
    frame_width: tl.tensor,
    margin: tl.tensor,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:
    """This program's samples and the four frame pixels around each. Offsets are contiguous [N, 2, H, W].

    Returns image (int64), sample index within it, whether the sample exists, its position (y, x) without margin; then
    the upper left pixel's index in the batch (int64), which rows and columns are in the frame, and their weights.
    """
    plane = height * width
    num_blocks = tl.cdiv(plane, BLOCK_P)
    image = (tl.program_id(0) // num_blocks).to(tl.int64)
    sample = (tl.program_id(0) % num_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = sample < plane
    offsets = offset_ptr + image * 2 * plane + sample
    y = (sample // width).to(ACC) + tl.load(offsets, mask=valid, other=0.0).to(ACC)
    x = (sample % width).to(ACC) + tl.load(offsets + plane, mask=valid, other=0.0).to(ACC)
    row, has_top, has_bottom, top, bottom = _axis(y + margin.to(ACC), frame_height)
    column, has_left, has_right, left, right = _axis(x + margin.to(ACC), frame_width)
    pixel = (image * frame_height + row) * frame_width + column
    return image, sample, valid, y, x, pixel, has_top, has_bottom, has_left, has_right, top, bottom, left, right


@triton.jit
def _first_channel(
    image: tl.tensor,
    sample: tl.tensor,
    channels: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    CHANNELS_LAST: tl.constexpr,
) -> tl.tensor:
    """Where channel 0 of each sample lies in a batch [N, C, H, W] of that layout (int64, [BLOCK_P, 1])."""
    if CHANNELS_LAST:
        return ((image * height * width + sample) * channels)[:, None]
    return (image * channels * height * width + sample)[:, None]


@triton.jit
def _at_channel(
    first: tl.tensor, channel: tl.tensor, height: tl.tensor, width: tl.tensor, CHANNELS_LAST: tl.constexpr
) -> tl.tensor:
    """The address of `channel` [1, BLOCK_C] where channel 0 is at the address `first` [BLOCK_P, 1]."""
    if CHANNELS_LAST:
        return first + channel
    return first + channel.to(tl.int64) * (height * width)


@triton.jit(do_not_specialize=["height", "width", "frame_height", "frame_width", "margin"])
def warp_forward_kernel(
    input_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    output_ptr: tl.tensor,
    channels: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    frame_height: tl.tensor,
    frame_width: tl.tensor,
    margin: tl.tensor,
    HAS_BIAS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """output(p, c) = bias(c) + sum_q weight(p, q) input(q, c). CHANNELS_LAST is the layout of the output."""
    image, sample, valid, _y, _x, pixel, has_top, has_bottom, has_left, has_right, top, bottom, left, right = _corners(
        offset_ptr, height, width, frame_height, frame_width, margin, BLOCK_P, ACC
    )
    corner = input_ptr + pixel[:, None] * channels
    below = frame_width.to(tl.int64) * channels
    target = output_ptr + _first_channel(image, sample, channels, height, width, CHANNELS_LAST)
    for start in range(0, channels, BLOCK_C):
        channel = (start + tl.arange(0, BLOCK_C))[None, :]
        active = valid[:, None] & (channel < channels)
        acc = (top * left)[:, None] * tl.load(
            corner + channel, mask=active & (has_top & has_left)[:, None], other=0.0
        ).to(ACC)
        acc += (top * right)[:, None] * tl.load(
            corner + channels + channel, mask=active & (has_top & has_right)[:, None], other=0.0
        ).to(ACC)
        acc += (bottom * left)[:, None] * tl.load(
            corner + below + channel, mask=active & (has_bottom & has_left)[:, None], other=0.0
        ).to(ACC)
        acc += (bottom * right)[:, None] * tl.load(
            corner + below + channels + channel, mask=active & (has_bottom & has_right)[:, None], other=0.0
        ).to(ACC)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(ACC)
        place = _at_channel(target, channel, height, width, CHANNELS_LAST)
        tl.store(place, acc.to(output_ptr.dtype.element_ty), mask=active)


@triton.jit
def _corner_gradient(
    grad: tl.tensor,
    input_ptr: tl.tensor,
    grad_input_ptr: tl.tensor,
    address: tl.tensor,
    weight: tl.tensor,
    keep: tl.tensor,
    NEED_INPUT: tl.constexpr,
    NEED_OFFSET: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:
    """Add this corner's share to grad_input; return grad . input(corner) over the block's channels, 0 if not `keep`."""
    dot = tl.sum(grad * 0.0, axis=1)
    if NEED_OFFSET:
        dot = tl.sum(grad * tl.load(input_ptr + address, mask=keep, other=0.0).to(ACC), axis=1)
    if NEED_INPUT:
        # For a NaN offset the weight is NaN, but `keep` is False: the position that replaces it is outside the frame.
        share = (weight[:, None] * grad).to(grad_input_ptr.dtype.element_ty)
        tl.atomic_add(grad_input_ptr + address, share, mask=keep, sem="relaxed")
    return dot


@triton.jit(do_not_specialize=["height", "width", "frame_height", "frame_width", "margin"])
def warp_backward_kernel(
    grad_ptr: tl.tensor,
    input_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    grad_offset_ptr: tl.tensor,
    channels: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    frame_height: tl.tensor,
    frame_width: tl.tensor,
    margin: tl.tensor,
    NEED_INPUT: tl.constexpr,
    NEED_OFFSET: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """grad_input(q, c) += weight(p, q) grad(p, c), by atomics. CHANNELS_LAST is the layout of grad.

    One program sums grad_offset(p) over all channels, and adds its sum of grad(p, c) to one of the BIAS_ROWS rows of
    grad_bias [BIAS_ROWS, C], so that few programs wait for the same address. `sums_ptr` has those rows if NEED_BIAS,
    followed by grad_input if NEED_INPUT.
    """
    grad_input_ptr = sums_ptr
    if NEED_BIAS:
        grad_input_ptr = sums_ptr + BIAS_ROWS * channels
    image, sample, valid, y, x, pixel, has_top, has_bottom, has_left, has_right, top, bottom, left, right = _corners(
        offset_ptr, height, width, frame_height, frame_width, margin, BLOCK_P, ACC
    )
    corner = pixel[:, None] * channels
    below = frame_width.to(tl.int64) * channels
    source = grad_ptr + _first_channel(image, sample, channels, height, width, CHANNELS_LAST)
    dot_tl = tl.zeros([BLOCK_P], dtype=ACC)
    dot_tr = tl.zeros([BLOCK_P], dtype=ACC)
    dot_bl = tl.zeros([BLOCK_P], dtype=ACC)
    dot_br = tl.zeros([BLOCK_P], dtype=ACC)
    for start in range(0, channels, BLOCK_C):
        channel = (start + tl.arange(0, BLOCK_C))[None, :]
        active = valid[:, None] & (channel < channels)
        grad = tl.load(_at_channel(source, channel, height, width, CHANNELS_LAST), mask=active, other=0.0).to(ACC)
        if NEED_BIAS:
            total = sums_ptr + (tl.program_id(0) % BIAS_ROWS) * channels + channel
            tl.atomic_add(total, tl.sum(grad, axis=0)[None, :], mask=channel < channels, sem="relaxed")
        here = corner + channel
        dot_tl += _corner_gradient(
            grad,
            input_ptr,
            grad_input_ptr,
            here,
            top * left,
            active & (has_top & has_left)[:, None],
            NEED_INPUT,
            NEED_OFFSET,
            ACC,
        )
        dot_tr += _corner_gradient(
            grad,
            input_ptr,
            grad_input_ptr,
            here + channels,
            top * right,
            active & (has_top & has_right)[:, None],
            NEED_INPUT,
            NEED_OFFSET,
            ACC,
        )
        dot_bl += _corner_gradient(
            grad,
            input_ptr,
            grad_input_ptr,
            here + below,
            bottom * left,
            active & (has_bottom & has_left)[:, None],
            NEED_INPUT,
            NEED_OFFSET,
            ACC,
        )
        dot_br += _corner_gradient(
            grad,
            input_ptr,
            grad_input_ptr,
            here + below + channels,
            bottom * right,
            active & (has_bottom & has_right)[:, None],
            NEED_INPUT,
            NEED_OFFSET,
            ACC,
        )
    if NEED_OFFSET:
        # The dot of a corner outside the frame is 0, so its weight needs no mask here.
        grad_y = left * (dot_bl - dot_tl) + right * (dot_br - dot_tr)
        grad_x = top * (dot_tr - dot_tl) + bottom * (dot_br - dot_bl)
        invalid = (y != y) | (x != x)
        grad_y = tl.where(invalid, y + x, grad_y)  # NaN, like the output
        grad_x = tl.where(invalid, y + x, grad_x)
        plane = height * width
        target = grad_offset_ptr + image * 2 * plane + sample
        tl.store(target, grad_y.to(grad_offset_ptr.dtype.element_ty), mask=valid)
        tl.store(target + plane, grad_x.to(grad_offset_ptr.dtype.element_ty), mask=valid)


@triton.jit
def warp_backward_sums_kernel(
    sums_ptr: tl.tensor,
    grad_input_ptr: tl.tensor,
    grad_bias_ptr: tl.tensor,
    channels: tl.tensor,
    values: tl.tensor,
    CAST_INPUT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """grad_input, of `values` values, and grad_bias in their types, from the sums of `warp_backward_kernel`."""
    if CAST_INPUT:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        first = sums_ptr
        if NEED_BIAS:
            first = sums_ptr + BIAS_ROWS * channels
        total = tl.load(first + index, mask=index < values, other=0.0)
        tl.store(grad_input_ptr + index, total.to(grad_input_ptr.dtype.element_ty), mask=index < values)
    if NEED_BIAS:
        channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        if tl.program_id(0) * BLOCK_C < channels:
            places = sums_ptr + tl.arange(0, BIAS_ROWS)[:, None] * channels + channel[None, :]
            rows = tl.load(places, mask=(channel < channels)[None, :], other=0.0)
            total_bias = tl.sum(rows, axis=0).to(grad_bias_ptr.dtype.element_ty)
            tl.store(grad_bias_ptr + channel, total_bias, mask=channel < channels)
