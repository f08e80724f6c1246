"""Bias, pixel shuffle and ReLU as Triton kernels: the functions of `sdan.ops.upsampling.shuffle`.

    shuffle            out = [ReLU](shuffled y + bias)
    shuffle_gradient   grad_y = unshuffled g, and each program's part of the bias gradient

with g = grad_out, but 0 where the ReLU's output is 0. y is a matrix with one row of r r C values per cell; a program
moves tiles of BLOCK_P cells x BLOCK_V of their values. A row of a cell, r C values, is one run in both images, so both
sides are read and written in wide, neighbouring accesses.

Addresses are 64-bit. Sums are in ACC (float64 for float64 maps, else float32).
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdan.ops.triton_warp import Launch

_TILE_BYTES = 4096
"""Bytes of y in one tile: 32 for each thread."""
_WIDEST = 256
"""The most values of a cell in one tile."""
_STEPS = 8
"""Tiles of one program of the backward pass, which adds up their bias gradients."""


@triton.jit
def _tile(
    first: tl.tensor, v: tl.tensor, cells: tl.tensor, columns: tl.tensor, R: tl.constexpr, C: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Where the values v of BLOCK_P cells lie in y and in the shuffled image, and which of them exist.

    `columns` cells lie side by side. Value v of a cell is channel v % C of pixel v // C, in row v // (R C).
    """
    p = first + tl.arange(0, BLOCK_P)
    line, column = (p // columns).to(tl.int64), p % columns
    cell = p.to(tl.int64)[:, None] * (R * R * C) + v[None, :]
    row = line[:, None] * R + (v // (R * C))[None, :]
    place = (row * columns + column[:, None]) * (R * C) + (v % (R * C))[None, :]
    return cell, place, (p < cells)[:, None] & (v < R * R * C)[None, :]


@triton.jit(do_not_specialize=["columns"])
def shuffle_kernel(
    y_ptr: tl.tensor, bias_ptr: tl.tensor, out_ptr: tl.tensor, cells: tl.tensor, columns: tl.tensor,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """out = shuffled y + bias, 0 instead of negative values if RELU."""
    blocks_v = tl.cdiv(R * R * C, BLOCK_V)
    v = (tl.program_id(0) % blocks_v) * BLOCK_V + tl.arange(0, BLOCK_V)
    cell, place, valid = _tile((tl.program_id(0) // blocks_v) * BLOCK_P, v, cells, columns, R, C, BLOCK_P)
    out = tl.load(y_ptr + cell, mask=valid, other=0.0).to(ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + (v % C) * (R * R) + v // C, mask=v < R * R * C, other=0.0).to(ACC)
        out += bias[None, :]
    if RELU:
        out = tl.where(out < 0.0, 0.0, out)  # a NaN stays
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["columns"])
def shuffle_gradient_kernel(
    grad_ptr: tl.tensor, out_ptr: tl.tensor, grad_y_ptr: tl.tensor, parts_ptr: tl.tensor, cells: tl.tensor,
    columns: tl.tensor, NEED_BIAS: tl.constexpr, RELU: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """grad_y = unshuffled g; parts[program's cells] = sum of g over them, in the order of the bias."""
    blocks_v = tl.cdiv(R * R * C, BLOCK_V)
    v = (tl.program_id(0) % blocks_v) * BLOCK_V + tl.arange(0, BLOCK_V)
    part = tl.program_id(0) // blocks_v
    sums = tl.zeros([BLOCK_P, BLOCK_V], dtype=ACC)
    for step in range(STEPS):
        cell, place, valid = _tile((part * STEPS + step) * BLOCK_P, v, cells, columns, R, C, BLOCK_P)
        grad = tl.load(grad_ptr + place, mask=valid, other=0.0)
        if RELU:
            out = tl.load(out_ptr + place, mask=valid, other=0.0)
            grad = tl.where(out <= 0.0, 0.0, grad)
        tl.store(grad_y_ptr + cell, grad, mask=valid)
        if NEED_BIAS:
            sums += grad.to(ACC)
    if NEED_BIAS:
        place_of_bias = (v % C) * (R * R) + v // C
        tl.store(parts_ptr + part.to(tl.int64) * (R * R * C) + place_of_bias, tl.sum(sums, axis=0), mask=v < R * R * C)


def shuffle(y: Tensor, bias: Tensor | None, factor: int, *, relu: bool) -> Tensor:
    """As in `sdan.ops.upsampling.shuffle`."""
    num_images, values, height, width = y.shape
    rows = y.new_empty((num_images, height * factor, width * factor, values // factor**2))
    bias_type = None if bias is None else bias.dtype
    launch = _launch(shuffle_kernel, y.shape, (y.dtype, bias_type), y.get_device(), factor, relu)
    with torch.cuda.device_of(y):
        launch(y, y if bias is None else bias, rows)  # the kernel reads no bias without HAS_BIAS
    return rows.permute(0, 3, 1, 2)


def shuffle_gradient(grad: Tensor, out: Tensor | None, factor: int, *, need_bias: bool) -> tuple[Tensor, Tensor | None]:
    """As in `sdan.ops.upsampling.shuffle`."""
    num_images, channels, height, width = grad.shape
    cells = grad.new_empty((num_images, height // factor, width // factor, factor**2 * channels))
    sum_type = torch.promote_types(grad.dtype, torch.float32)
    shape = cells.permute(0, 3, 1, 2).shape
    parts = grad.new_empty((parts_of(shape, grad.dtype) if need_bias else 0, shape[1]), dtype=sum_type)
    types = (grad.dtype, sum_type if need_bias else None)
    launch = _launch(shuffle_gradient_kernel, shape, types, grad.get_device(), factor, out is not None)
    with torch.cuda.device_of(grad):
        launch(grad, grad if out is None else out, cells, parts if need_bias else cells)
    return cells.permute(0, 3, 1, 2), parts.sum(0) if need_bias else None


@lru_cache(maxsize=1024)
def _launch(
    kernel: Any,
    shape: torch.Size,
    types: tuple[torch.dtype, torch.dtype | None],
    device_index: int,
    factor: int,
    relu: bool,
) -> Launch:
    """The launch for y of this shape; types: of the maps, and of the bias or its parts if there are any."""
    num_images, values, height, width = shape
    meta = launch_meta(values, types[0], factor)
    programs = -(-num_images * height * width // meta["BLOCK_P"])
    flags: dict[str, int] = {"HAS_BIAS": types[1] is not None, "RELU": relu}
    if kernel is shuffle_gradient_kernel:
        programs = parts_of(shape, types[0])
        flags = {"NEED_BIAS": types[1] is not None, "RELU": relu, "STEPS": _STEPS}
    grid = programs * -(-values // meta["BLOCK_V"])
    return Launch(kernel, grid, (num_images * height * width, width), flags | meta, num_warps=4)


def parts_of(shape: torch.Size, dtype: torch.dtype) -> int:
    """The number of parts of the bias gradient, for y of this shape."""
    num_images, values, height, width = shape
    return -(-num_images * height * width // (_STEPS * launch_meta(values, dtype, 1)["BLOCK_P"]))


def launch_meta(values: int, dtype: torch.dtype, factor: int) -> dict[str, Any]:
    """The constants that both kernels have, for cells of `values` values."""
    block_v = min(triton.next_power_of_2(values), _WIDEST)
    return {
        "R": factor,
        "C": values // factor**2,
        "BLOCK_P": max(1, _TILE_BYTES // (dtype.itemsize * block_v)),
        "BLOCK_V": block_v,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }
