"""Held-out crops as report.html shows them: zoomed by bicubic and by a network, by both protocols."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

from pipelines.loader import Inputs, model_inputs
from pipelines.reporting.contents import TARGET, Crop
from pipelines.scoring.held_out import HeldOut
from pipelines.scoring.pictures import to_uint8
from pipelines.scoring.scores import PROTOCOLS, deployed
from sdan.baselines import Network
from sdan.ops.precision import ComputePlan, compute_plan
from sdan.resample import bicubic

TARGET_COLUMNS = {"raw": "hr_rgb", "true": "true_rgb"}


def zoomed_crops(
    model: Network, held: HeldOut, chosen: Iterable[tuple[int, str]], *, target: str, labels: Mapping[str, str]
) -> list[Crop]:
    """The crops `chosen`, as (number, why), in that order.

    Args:
        model: on the device where it is to run.
        target: raw, aligned or true: the last picture of each crop.
        labels: camera, rendering, self and oracle -> its label in the report; those without one are left out.
    """
    model.eval()
    plan = compute_plan(next(model.parameters()).device)
    return [_crop(model, held.select(range(number, number + 1)), plan, why, target, labels) for number, why in chosen]


def _crop(model: Network, part: HeldOut, plan: ComputePlan, why: str, target: str, labels: Mapping[str, str]) -> Crop:
    inputs = model_inputs(part.batch, model.config, plan.device)
    pictures = {"camera": bicubic(inputs.camera, model.config.scale)}
    if "lr_render" in part.batch:
        rendering = part.batch["lr_render"].to(plan.device).float() / 255
        pictures["rendering"] = bicubic(rendering, model.config.scale)
    offset = None
    for protocol in PROTOCOLS:
        if protocol in labels:
            pictures[protocol], found = _zoomed(model, inputs, plan, protocol)
            offset = found if protocol == "oracle" else offset
    return Crop(
        name=part.names[0],
        why=why,
        pictures={labels[name]: to_uint8(picture[0]) for name, picture in pictures.items() if name in labels}
        | {TARGET: to_uint8(_target(part, target))},
        offset_px=offset,
    )


def _zoomed(model: Network, inputs: Inputs, plan: ComputePlan, protocol: str) -> tuple[Tensor, np.ndarray | None]:
    """The picture [1, 3, sH, sW] by a protocol, and by the oracle's also its offsets [2, h, w] in mosaic pixels."""
    with plan.inference():
        if protocol == "self":
            return deployed(model, inputs), None
        output = model(inputs.x, inputs.oracle_reference, inputs.rendering)
    px_per_offset = inputs.rendering.shape[-1] / output.offset.shape[-1]
    offset = px_per_offset * output.offset[0].float().nan_to_num().cpu().numpy()
    return output.zoomed, offset if offset.any() else None  # a network that aligns nothing gives zeros


def _target(part: HeldOut, target: str) -> Tensor:
    """[3, sH, sW] in [0, 1]"""
    if target == "aligned" and part.aligned is not None:
        return part.aligned[0].float() / 255
    return part.batch[TARGET_COLUMNS[target]][0].float() / 255
