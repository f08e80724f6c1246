"""Packing for cross packing attention as Triton kernels: the functions of `sdan.ops.attention.packing`.

    pack              tokens = packed x, and their negative
    unpack            out = [ReLU](x + gamma unpacked(attended))
    pack_gradient     grad_tokens = gamma packed(g), -tokens, and each program's part of sum(g * unpacked(attended))
    unpack_gradient   grad_x = g + unpacked(dV + dK - dQ), and the sum of those parts, the gradient of gamma

with g = grad_out, but 0 where the ReLU's output is 0. Row i of all K x K windows of image n is one matrix: P = H/K W/K
windows times K C values. Images hold it window by window, each window's values side by side if they are channels-last;
tokens hold its transpose, [K C, P]. A program moves one tile of BLOCK_P windows x BLOCK_E values. Triton transposes it
in shared memory, so both sides are read and written in wide, neighbouring accesses.

Addresses are 64-bit. Sums and products are in ACC (float64 for float64 images, else float32).
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdan.ops.attention.packing import Packing
from sdan.ops.triton_warp import Launch

_SIDE = {2: 64, 4: 32, 8: 32}
"""Windows and values per tile, by bytes per value: at least 128 neighbouring bytes in both directions."""
_BLOCK_PARTS = 1024
"""Parts of the gradient of gamma that are read at once."""


@triton.jit
def _tile(
    values: tl.tensor,
    windows: tl.tensor,
    columns: tl.tensor,
    K: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> tl.tensor:
    """This program's tile: where its values lie in the image batch and in the tokens, and which of them exist.

    An image has `windows` windows, `columns` of them side by side, and K `values` values in each. Value e of a window's
    row is channel e % C of column e // C in channels-last images, else column e % K of channel e // K.
    """
    blocks_p, blocks_e = tl.cdiv(windows, BLOCK_P), tl.cdiv(values, BLOCK_E)
    block = tl.program_id(0) // blocks_e
    matrix = (block // blocks_p).to(tl.int64)  # K n + i
    image, i = matrix // K, matrix % K
    p = (block % blocks_p) * BLOCK_P + tl.arange(0, BLOCK_P)
    e = (tl.program_id(0) % blocks_e) * BLOCK_E + tl.arange(0, BLOCK_E)
    line = image * K * windows + ((p // columns) * K + i) * columns  # that many windows' rows lie before this row's
    if CHANNELS_LAST:
        place = (line + p % columns)[:, None] * values + e[None, :]
    else:
        first = image * (values - K) * K * windows + (line + p % columns) * K  # in channel 0
        place = first[:, None] + ((e // K).to(tl.int64) * (K * K * windows) + e % K)[None, :]
    token = (matrix * values + e)[None, :] * windows + p[:, None]
    return place, token, (p < windows)[:, None] & (e < values)[None, :]


@triton.jit(do_not_specialize=["columns"])
def pack_kernel(
    x_ptr: tl.tensor, tokens_ptr: tl.tensor, negated_ptr: tl.tensor, values: tl.tensor, windows: tl.tensor,
    columns: tl.tensor, K: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
    ACC: tl.constexpr,
) -> None:  # fmt: skip
    """tokens = packed x; negated = -tokens."""
    place, token, valid = _tile(values, windows, columns, K, CHANNELS_LAST, BLOCK_P, BLOCK_E)
    x = tl.load(x_ptr + place, mask=valid, other=0.0).to(ACC)
    tl.store(tokens_ptr + token, x.to(tokens_ptr.dtype.element_ty), mask=valid)
    tl.store(negated_ptr + token, (-x).to(negated_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["columns"])
def unpack_kernel(
    x_ptr: tl.tensor, attended_ptr: tl.tensor, gamma_ptr: tl.tensor, out_ptr: tl.tensor, values: tl.tensor,
    windows: tl.tensor, columns: tl.tensor, RELU: tl.constexpr, K: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """out = x + gamma unpacked(attended), 0 instead of negative values if RELU."""
    place, token, valid = _tile(values, windows, columns, K, CHANNELS_LAST, BLOCK_P, BLOCK_E)
    attended = tl.load(attended_ptr + token, mask=valid, other=0.0).to(ACC)
    out = tl.load(x_ptr + place, mask=valid, other=0.0).to(ACC) + tl.load(gamma_ptr).to(ACC) * attended
    if RELU:
        out = tl.where(out < 0.0, 0.0, out)  # a NaN stays
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _after_relu(
    grad_ptr: tl.tensor, out_ptr: tl.tensor, place: tl.tensor, valid: tl.tensor, RELU: tl.constexpr, ACC: tl.constexpr
) -> tl.tensor:
    """g: grad, but 0 where the ReLU's output is 0 if RELU."""
    grad = tl.load(grad_ptr + place, mask=valid, other=0.0).to(ACC)
    if RELU:
        out = tl.load(out_ptr + place, mask=valid, other=0.0).to(ACC)
        grad = tl.where(out <= 0.0, 0.0, grad)
    return grad


@triton.jit(do_not_specialize=["columns"])
def pack_gradient_kernel(
    grad_ptr: tl.tensor, out_ptr: tl.tensor, tokens_ptr: tl.tensor, attended_ptr: tl.tensor, gamma_ptr: tl.tensor,
    grad_tokens_ptr: tl.tensor, negated_ptr: tl.tensor, parts_ptr: tl.tensor, values: tl.tensor, windows: tl.tensor,
    columns: tl.tensor, RELU: tl.constexpr, K: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """grad_tokens = gamma packed(g); negated = -tokens; parts[program] = sum of g * attended over the tile."""
    place, token, valid = _tile(values, windows, columns, K, CHANNELS_LAST, BLOCK_P, BLOCK_E)
    grad = _after_relu(grad_ptr, out_ptr, place, valid, RELU, ACC)
    grad_tokens = tl.load(gamma_ptr).to(ACC) * grad
    tl.store(grad_tokens_ptr + token, grad_tokens.to(grad_tokens_ptr.dtype.element_ty), mask=valid)
    tokens = tl.load(tokens_ptr + token, mask=valid, other=0.0).to(ACC)
    tl.store(negated_ptr + token, (-tokens).to(negated_ptr.dtype.element_ty), mask=valid)
    attended = tl.load(attended_ptr + token, mask=valid, other=0.0).to(ACC)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(tl.sum(grad * attended, axis=1), axis=0))


@triton.jit(do_not_specialize=["columns"])
def unpack_gradient_kernel(
    grad_ptr: tl.tensor, out_ptr: tl.tensor, grad_values_ptr: tl.tensor, grad_keys_ptr: tl.tensor,
    grad_queries_ptr: tl.tensor, parts_ptr: tl.tensor, grad_x_ptr: tl.tensor, grad_gamma_ptr: tl.tensor,
    values: tl.tensor, windows: tl.tensor, columns: tl.tensor, RELU: tl.constexpr, THREE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, K: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """grad_x = g + unpacked(values [+ keys - queries if THREE]). The first program adds up the parts of grad_gamma, of
    which there are as many as programs.
    """
    place, token, valid = _tile(values, windows, columns, K, CHANNELS_LAST, BLOCK_P, BLOCK_E)
    grad = _after_relu(grad_ptr, out_ptr, place, valid, RELU, ACC)
    share = tl.load(grad_values_ptr + token, mask=valid, other=0.0).to(ACC)
    if THREE:
        share += tl.load(grad_keys_ptr + token, mask=valid, other=0.0).to(ACC)
        share -= tl.load(grad_queries_ptr + token, mask=valid, other=0.0).to(ACC)
    tl.store(grad_x_ptr + place, (grad + share).to(grad_x_ptr.dtype.element_ty), mask=valid)
    if tl.program_id(0) == 0:
        part = tl.arange(0, BLOCK_PARTS)
        sums = tl.zeros([BLOCK_PARTS], dtype=ACC)
        for start in range(0, tl.num_programs(0), BLOCK_PARTS):
            sums += tl.load(parts_ptr + start + part, mask=start + part < tl.num_programs(0), other=0.0)
        tl.store(grad_gamma_ptr, tl.sum(sums, axis=0).to(grad_gamma_ptr.dtype.element_ty))


def pack(x_NCHW: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """As in `sdan.ops.attention.packing`."""
    tokens = x_NCHW.new_empty(packing.token_shape(x_NCHW.shape))
    negated = torch.empty_like(tokens)
    launch = _launch(pack_kernel, _case(x_NCHW, None, packing))
    with torch.cuda.device_of(x_NCHW):
        launch(x_NCHW, tokens, negated)
    return tokens, negated


def unpack(x_NCHW: Tensor, attended_NLP: Tensor, gamma: Tensor, packing: Packing, *, relu: bool) -> Tensor:
    """As in `sdan.ops.attention.packing`."""
    out = torch.empty_like(x_NCHW, memory_format=packing.memory_format)
    launch = _launch(unpack_kernel, _case(x_NCHW, gamma, packing), ("RELU", relu))
    with torch.cuda.device_of(x_NCHW):
        launch(x_NCHW, attended_NLP, gamma, out)
    return out


def pack_gradient(
    grad_NCHW: Tensor,
    out_NCHW: Tensor | None,
    tokens_NLP: Tensor,
    attended_NLP: Tensor,
    gamma: Tensor,
    packing: Packing,
) -> tuple[Tensor, Tensor, Tensor]:
    """As in `sdan.ops.attention.packing`; the third result has one sum for each program."""
    case = _case(grad_NCHW, gamma, packing)
    grad_tokens, negated = torch.empty_like(tokens_NLP), torch.empty_like(tokens_NLP)
    parts = grad_NCHW.new_empty(_grid(case), dtype=torch.promote_types(grad_NCHW.dtype, torch.float32))
    launch = _launch(pack_gradient_kernel, case, ("RELU", out_NCHW is not None))
    out = grad_NCHW if out_NCHW is None else out_NCHW  # the kernel reads no out without RELU
    with torch.cuda.device_of(grad_NCHW):
        launch(grad_NCHW, out, tokens_NLP, attended_NLP, gamma, grad_tokens, negated, parts)
    return grad_tokens, negated, parts


def unpack_gradient(
    grad_NCHW: Tensor,
    out_NCHW: Tensor | None,
    grads_NLP: tuple[Tensor, ...],
    parts: Tensor,
    gamma: Tensor,
    packing: Packing,
) -> tuple[Tensor, Tensor]:
    """As in `sdan.ops.attention.packing`."""
    grad_x = torch.empty_like(grad_NCHW, memory_format=packing.memory_format)
    grad_gamma = torch.empty_like(gamma)
    flags = (("RELU", out_NCHW is not None), ("THREE", len(grads_NLP) == 3), ("BLOCK_PARTS", _BLOCK_PARTS))
    launch = _launch(unpack_gradient_kernel, _case(grad_NCHW, gamma, packing), *flags)
    out = grad_NCHW if out_NCHW is None else out_NCHW
    grads = grads_NLP if len(grads_NLP) == 3 else grads_NLP * 3  # without THREE the kernel reads the first only
    with torch.cuda.device_of(grad_NCHW):
        launch(grad_NCHW, out, *grads, parts, grad_x, grad_gamma)
    return grad_x, grad_gamma


class _Case(NamedTuple):
    """What a launch depends on, besides its kernel and flags."""

    shape: torch.Size
    dtypes: tuple[torch.dtype, torch.dtype | None]
    device_index: int
    packing: Packing


def _case(image_NCHW: Tensor, gamma: Tensor | None, packing: Packing) -> _Case:
    dtypes = image_NCHW.dtype, None if gamma is None else gamma.dtype
    return _Case(image_NCHW.shape, dtypes, image_NCHW.get_device(), packing)


@lru_cache(maxsize=1024)
def _launch(kernel: Any, case: _Case, *flags: tuple[str, int]) -> Launch:
    constants = dict(flags) | launch_meta(case.shape, case.dtypes[0], case.packing)
    return Launch(kernel, _grid(case), sizes(case.shape, case.packing), constants, num_warps=4)


def sizes(shape: torch.Size, packing: Packing) -> tuple[int, int, int]:
    """(values, windows, columns) as in `_tile` for images of this shape."""
    _, channels, height, width = shape
    columns = width // packing.kernel
    return packing.kernel * channels, height // packing.kernel * columns, columns


def launch_meta(shape: torch.Size, dtype: torch.dtype, packing: Packing) -> dict[str, Any]:
    """The constants that all kernels have."""
    values, windows, _ = sizes(shape, packing)
    side = _SIDE[dtype.itemsize]
    return {
        "K": packing.kernel,
        "CHANNELS_LAST": packing.channels_last,
        "BLOCK_P": min(triton.next_power_of_2(windows), side),
        "BLOCK_E": min(triton.next_power_of_2(values), side),
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }


@lru_cache(maxsize=1024)
def _grid(case: _Case) -> int:
    """The number of programs, one for each tile, all on one axis (the others are limited to 65535)."""
    values, windows, _ = sizes(case.shape, case.packing)
    meta = launch_meta(case.shape, case.dtypes[0], case.packing)
    tiles = int(triton.cdiv(windows, meta["BLOCK_P"]) * triton.cdiv(values, meta["BLOCK_E"]))
    return case.shape[0] * case.packing.kernel * tiles
