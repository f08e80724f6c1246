"""Runs an exported file as another program would, and compares it with the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sdan.export import TileZoom

TOLERANCE = 1e-3
"""Largest accepted difference, where pixels are in [0, 1]."""
_SIDES = ((2, 34), (46, 8))
"""Height and width of the compared tiles beyond the smallest side."""

Run = Callable[[tuple[Tensor, ...]], Tensor]


def largest_difference(module: TileZoom, path: Path) -> float:
    """The largest difference, over two small tiles of random pixels, between the file's output and the model's."""
    run = _onnx(path) if path.suffix == ".onnx" else _pt2(path)
    worst = 0.0
    for more_height, more_width in _SIDES:
        inputs = module.example(*((module.min_side + more) // 2 * 2 for more in (more_height, more_width)))
        with torch.inference_mode():
            worst = max(worst, float((run(inputs) - module(*inputs)).abs().max()))
    return worst


def _onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda inputs: torch.from_numpy(
        session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})[0]
    )


def _pt2(path: Path) -> Run:
    program = torch.export.load(path).module()

    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        output: Tensor = program(*inputs)
        return output

    return run
