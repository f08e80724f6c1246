"""Exports a network, as it is used for zooming, to a file that other programs run without SDAN: ONNX, or PyTorch's pt2.

`TileZoom` is one module from picture to zoomed picture, for tiles of any size. As `inference.zoom` does, it finds the
offsets in windows of the size that the network was trained on, because cross packing attention sums over its window:
its logits grow with the window's area, so that on a larger window it would be another attention. The windows are a
batch inside the exported graph. All else depends on a pixel's neighbourhood only.

Axes: H W of the tile in pixels of the network's input x; n m rows and columns of windows, t the side of a window.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sdan.baselines import Network
from sdan.inference import OVERLAP_PX, default_overlap
from sdan.ops import portable_form
from sdan.raw_input import packed_to_mosaic, rgb_to_packed
from sdan.resample import low_pass

OPSET = 20
"""Version of ONNX's operators in exported files: the first whose GridSample does all that PyTorch's does."""
MAX_SIDE = 8192
"""Largest side of a tile, pixels of the picture."""
OUTPUT = "output"
"""Name of an exported file's output."""
METADATA = "metadata.json"
"""Name of the metadata inside a pt2 file; an ONNX file has them as its metadata_props."""


class ExportError(ValueError):
    """A network that cannot be exported; the message is one line that says what to do."""


class TileZoom(nn.Module):
    """Zooms one tile of any size from `min_side` to MAX_SIDE; this is what is exported."""

    def __init__(self, model: Network) -> None:
        """Raises ExportError: a network without a tile size, or with per-point offsets."""
        super().__init__()
        if model.input_tile_px is None:
            raise ExportError("model: expected a checkpoint with the size of its training crops, got none; train again")
        if model.config.offset == "per_point" and model.offset_channels:
            raise ExportError(
                "model: expected offset=squared, got per_point, for which ONNX has no operator; use another model"
            )
        self.model = model.eval()
        self.config = model.config
        self.tile_px: int = model.input_tile_px
        self.overlap_px = default_overlap(model.config, model.input_tile_px)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs: a picture has one, RAW comes with its rendering."""
        return ("input",) if self.config.is_rgb else ("raw", "rendering")

    @property
    def min_side(self) -> int:
        """Smallest side of a tile, pixels of the picture: just above that of a training crop."""
        return self.tile_px * self.config.mosaic_factor + (1 if self.config.is_rgb else 2)

    def metadata(self) -> dict[str, str]:
        """What a program must know to use the file."""
        return {
            "scale": str(self.config.scale),
            "curve": self.config.rendering_curve if not self.config.is_rgb else "srgb",
            "min_side_px": str(self.min_side),
            "max_side_px": str(MAX_SIDE),
            "overlap_px": str(OVERLAP_PX * self.config.mosaic_factor),
        }

    def example(self, height: int, width: int) -> tuple[Tensor, ...]:
        """Seeded random inputs for a tile of this size, in pixels of the picture (for RAW even)."""
        generator = torch.Generator().manual_seed(0)
        picture = torch.rand(1, 3, height, width, generator=generator)
        if self.config.is_rgb:
            return (picture,)
        return torch.rand(1, 4, height // 2, width // 2, generator=generator), picture

    def forward(self, first: Tensor, rendering: Tensor | None = None) -> Tensor:
        """Zoom one tile with its own rendering as reference ({X, X}).

        Args:
            first: for an RGB network the picture [1, 3, height, width], sRGB in [0, 1]; for a RAW network packed RAW
                [1, 4, height / 2, width / 2] in [0, 1] (raw_input.normalise).
            rendering: for a RAW network [1, 3, height, width] in [0, 1], with the network's rendering curve.

        Returns:
            [1, 3, scale height, scale width], sRGB in [0, 1].
        """
        height, width = (first if rendering is None else rendering).shape[-2:]
        if rendering is None:
            rendering = _to_even(first) if self.config.is_packed else first
            x = rgb_to_packed(rendering) if self.config.is_packed else rendering
        else:
            x = packed_to_mosaic(first) if self.config.input == "mosaic" else first
        zoomed = self.model.zoom_at(x, self._offset(x, rendering), rendering).clamp(0, 1)
        if not (self.config.is_packed and self.config.is_rgb):
            return zoomed
        # A slice would make torch.export assume that the sides are even, as those of the example are.
        rows, columns = (torch.arange(self.config.scale * side) for side in (height, width))
        return zoomed.index_select(2, rows).index_select(3, columns)

    def _offset(self, x: Tensor, rendering: Tensor) -> Tensor:
        """The offsets [1, C, H, W], found in windows and blended as `tiles.Tiling.join` blends tiles."""
        channels, t = self.model.offset_channels, self.tile_px
        if not channels:
            return x[:, :0]
        reference = low_pass(rendering, self.config.mosaic_factor)
        step = 2 if self.config.input == "mosaic" else 1  # a mosaic's windows start on an R photosite
        height, width = x.shape[-2:]
        tops, lefts = (starts(side, t, self.overlap_px, step) for side in (height, width))
        found = self.model.find_offset(_windows(x, tops, lefts, t), _windows(reference, tops, lefts, t))
        rows, columns = (blend(at, side, t, self.overlap_px) for at, side in ((tops, height), (lefts, width)))
        # Two plain products of matrices: torch.export does not prove the shapes of broadcast ones for every size.
        n, m = tops.shape[0], lefts.shape[0]
        grid = found.view(n, m, channels, t, t).permute(0, 2, 3, 1, 4).contiguous().view(n * channels * t, m * t)
        wide = (grid @ columns).view(n, channels, t, width).permute(1, 3, 0, 2).contiguous()
        return (wide.view(channels * width, n * t) @ rows).view(1, channels, width, height).transpose(2, 3)


def _to_even(image: Tensor) -> Tensor:
    """Continue odd sides by the outer pixel, for whole cells of 2x2 pixels."""
    height, width = image.shape[-2:]
    rows, columns = (torch.arange(2 * ((side + 1) // 2)).clamp(max=side - 1) for side in (height, width))
    return image.index_select(2, rows).index_select(3, columns)


def starts(side: int, t: int, overlap: int, step: int = 1) -> Tensor:
    """[n]: the windows' first pixels along one axis, as `tiles.cover` places them, for a side that torch.export
    leaves open. The last window ends at the edge."""
    stride = max(step, (t - overlap) // step * step)
    count = (side - t + stride - 1) // stride + 1
    return (torch.arange(count) * stride).clamp(max=side - t)


def blend(starts: Tensor, side: int, t: int, overlap: int) -> Tensor:
    """[n t, side]: the matrix that blends the windows' pixels along one axis, with the weights of `tiles.cover`."""
    away = torch.arange(side) - starts[:, None]  # from the window's first pixel
    position = away + 0.5
    margin, ramp = overlap / 4, overlap / 2
    rising = torch.where(starts[:, None] > 0, ((position - margin) / ramp).clamp(0, 1), 1.0)
    falling = torch.where(starts[:, None] + t < side, ((t - position - margin) / ramp).clamp(0, 1), 1.0)
    weight = torch.where((away >= 0) & (away < t), torch.minimum(rising, falling), 0.0)
    weight = weight / weight.sum(0)
    placed = torch.where(away[:, None] == torch.arange(t)[:, None], weight[:, None], 0.0)
    return placed.view(-1, side)


def _windows(image: Tensor, tops: Tensor, lefts: Tensor, t: int) -> Tensor:
    """[1, C, H, W] -> [n m, C, t, t]."""
    rows, columns = (first[:, None] + torch.arange(t) for first in (tops, lefts))
    grid = image[0][:, rows][..., columns].permute(1, 3, 0, 2, 4).contiguous()
    return grid.view(-1, *grid.shape[2:])


def trace(module: TileZoom) -> ExportedProgram:
    """PyTorch's graph of the module, of elementary operators, with height and width left open."""
    unit, side = 1 if module.config.is_rgb else 2, 4 * module.tile_px * module.config.mosaic_factor
    height, width = (Dim(name, min=module.min_side // unit, max=MAX_SIDE // unit) for name in ("height", "width"))
    shapes: tuple[Any, ...] = ({2: height, 3: width},)
    if not module.config.is_rgb:
        shapes = (*shapes, {2: 2 * height, 3: 2 * width})
    with torch.no_grad(), portable_form(), _quiet():
        # Otherwise PyTorch refuses sizes for which it cannot prove what it assumes about the number of windows.
        return torch.export.export(
            module,
            module.example(side, side + 6),
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def write_pt2(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write PyTorch's own format; `torch.export.load(path).module()` runs it without SDAN."""
    with _quiet():
        torch.export.save(program, path, extra_files={METADATA: json.dumps(dict(metadata))})


def write_onnx(program: ExportedProgram, path: Path, metadata: Mapping[str, str], inputs: tuple[str, ...]) -> None:
    """Write ONNX, weights included.

    The open sides of a picture are named `height` and `width`; of RAW `half_height` and `half_width`.

    Args:
        inputs: TileZoom.inputs.
    """
    prefix = "" if len(inputs) == 1 else "half_"
    names = ({2: f"{prefix}height", 3: f"{prefix}width"}, *({} for _ in inputs[1:]))
    with _quiet():
        written = torch.onnx.export(
            program,
            input_names=list(inputs),
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamic_shapes=names,
            dynamo=True,
            verbose=False,
        )
        assert written is not None  # it is None only for the exporter of TorchScript
        written.model.metadata_props.update(metadata)
        written.save(path, external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of PyTorch's exporters, which are for their own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
