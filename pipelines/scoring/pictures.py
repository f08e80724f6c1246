"""Labelled picture grids: the validation sheet that MLflow shows over the epochs, and before | after strips."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from pipelines.loader import model_inputs
from pipelines.scoring.held_out import HeldOut
from pipelines.scoring.scores import deployed
from sdan.baselines import Network
from sdan.ops.precision import ComputePlan

PAPER, INK = (250, 250, 248), (32, 32, 32)
CELL_PX, GAP_PX, LABEL_PX = 256, 8, 18
SHEET_ROWS = 4


def to_uint8(image: Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] -> uint8 [H, W, 3]."""
    return (image.float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def training_sheet(model: Network, held: HeldOut, plan: ComputePlan) -> np.ndarray:
    """One row per crop: input, reference Y', aligned X', output (self), target, mask M, offsets as colours (oracle).

    Returns:
        uint8 [H, W, 3].
    """
    from torchvision.utils import flow_to_image  # torchvision loads torch's compiler, three seconds in each process

    model.eval()
    part = held.select(range(min(SHEET_ROWS, len(held))))
    inputs = model_inputs(part.batch, model.config, plan.device)
    with plan.inference():
        oracle = model(inputs.x, inputs.oracle_reference, inputs.rendering)
        zoomed = deployed(model, inputs)
    offset = oracle.offset.float().nan_to_num()  # a diverged network must not crash the run here
    reach = offset.abs().amax().clamp_min(1e-3)
    # flow_to_image takes (dx, dy) and scales each batch to its own maximum.
    colours = flow_to_image(offset.flip(1)).float() / 255
    columns = {
        "input (rendering)": inputs.rendering,
        "reference Y'": inputs.oracle_reference,
        "aligned X'": oracle.aligned,
        "SDAN (self)": zoomed,
        "target": inputs.target,
        "mask M": oracle.mask.expand(-1, 3, -1, -1),
        f"offsets, to {float(reach):.2f} px": colours,
    }
    cells = {label: _resized(images, CELL_PX) for label, images in columns.items()}
    rows = [[to_uint8(cells[label][number]) for label in cells] for number in range(len(part))]
    return labelled_grid(rows, list(columns))


def labelled_grid(rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str], title: str | None = None) -> np.ndarray:
    """Arrange uint8 [h, w, 3] pictures of one size in rows, with a label above each column and an optional title."""
    cell_h, cell_w = rows[0][0].shape[:2]
    size = LABEL_PX
    while size > 9 and max(ImageFont.load_default(size=size).getlength(label) for label in labels) > cell_w:
        size -= 1
    font = ImageFont.load_default(size=size)
    head = LABEL_PX + 2 * GAP_PX
    top = head + (head if title else 0)
    width = len(labels) * (cell_w + GAP_PX) + GAP_PX
    sheet = Image.new("RGB", (width, top + len(rows) * (cell_h + GAP_PX)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((GAP_PX, GAP_PX), title, INK, ImageFont.load_default(size=LABEL_PX))
    for column, label in enumerate(labels):
        left = GAP_PX + column * (cell_w + GAP_PX)
        draw.text((left, top - head + GAP_PX), label, INK, font)
        for number, row in enumerate(rows):
            sheet.paste(Image.fromarray(row[column]), (left, top + number * (cell_h + GAP_PX)))
    return np.asarray(sheet)


def _resized(images: Tensor, side: int) -> Tensor:
    return interpolate(images.float(), size=(side, side), mode="bicubic", antialias=True, align_corners=False)
