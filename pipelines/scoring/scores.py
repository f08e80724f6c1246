"""Scores of held-out crops by protocol (self, oracle) and target (raw, aligned, true), one value per crop.

A model's keys are `<protocol>_<target>_<metric>`, e.g. self_true_psnr. Baselines use no reference, so their keys are
`<target>_<metric>`. A new metric is a function in sdan/metrics.py that `score_images` calls and that
METRICS in pipelines/evaluate.py names, so that it is printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from pipelines.loader import Inputs, model_inputs
from pipelines.scoring.held_out import HeldOut
from sdan import metrics
from sdan.baselines import Network
from sdan.ops.precision import ComputePlan, compute_plan
from sdan.resample import bicubic

BORDER_PX = 8
"""Target pixels excluded from the scores along each side of a crop."""
EDGE_PX = 2
"""Packed pixels on each side of a boundary between the near and the far plane that count as a depth edge."""
PLANES = ("far", "near", "edges")
"""The parts of a simulated picture of which `<target>_psnr_<plane>` is the PSNR."""
BATCH = 4
PROTOCOLS = ("self", "oracle")
TARGETS = ("raw", "aligned", "true")

_VIEWS = {"true": 0, "raw": 1}
"""Target -> the entry of true_near for its view."""

PerCrop = dict[str, list[float]]
"""Metric name -> one value per crop; NaN if a crop has no such target."""


def score_model(
    model: Network,
    held: HeldOut,
    plan: ComputePlan,
    protocols: Sequence[str] = PROTOCOLS,
    *,
    perceptual: bool = False,
    by_plane: bool = False,
) -> PerCrop:
    """Score a model's outputs, and its offsets: their statistics, their alignment gain and, for simulated data, their
    end-point error.

    The outputs of the self protocol are those of a deployed model, which may skip its offsets (`find_offset`). The
    statistics of offsets are those of `forward`.

    Args:
        model: on the plan's device, in its layout.
        protocols: self (the reference is the input's rendering) and oracle (the reference is made from the target).
        perceptual: also compute the metrics of metrics.PERCEPTUAL whose weights are there.
        by_plane: also PSNR by PLANES, where the crops have true_near.

    Returns:
        scores by name; those of offsets are in mosaic pixels, and of the oracle protocol also `alignment_gain`.
    """
    collected: PerCrop = {}
    model.eval()
    for inputs, part in _batches(model, held, plan.device):
        for protocol in protocols:
            reference = inputs.self_reference if protocol == "self" else inputs.oracle_reference
            with plan.inference():
                output = model(inputs.x, reference, inputs.rendering)
            px_per_offset = inputs.rendering.shape[-1] / output.offset.shape[-1]
            zoomed = output.zoomed
            if protocol == "self" and not model.offset_channels:
                with plan.inference():
                    zoomed = deployed(model, inputs)
            scores = score_images(zoomed, part, perceptual=perceptual, by_plane=by_plane)
            scores |= metrics.offset_statistics(output.offset, output.mask, px_per_offset)
            if protocol == "oracle":
                scores |= _offset_scores(output.offset.float(), part)
            _extend(collected, {f"{protocol}_{name}": values for name, values in scores.items()})
    return collected


def of_protocol(scores: PerCrop, protocol: str) -> PerCrop:
    """One protocol's part of what `score_model` returns, without its name in front."""
    start = f"{protocol}_"
    return {name.removeprefix(start): values for name, values in scores.items() if name.startswith(start)}


def deployed(model: Network, inputs: Inputs) -> Tensor:
    """The zoomed picture as `sdan zoom` makes it, {X, X}: [N,3,sH,sW]."""
    return model.zoom_at(inputs.x, model.find_offset(inputs.x, inputs.self_reference), inputs.rendering)


def _offset_scores(offset: Tensor, part: HeldOut) -> PerCrop:
    """What the oracle's offsets are worth; for simulated data, beside the true ones. Lengths in mosaic pixels."""
    camera, target = (part.batch[name].to(offset.device).float() / 255 for name in ("lr_rgb", "hr_rgb"))

    def gain(field: Tensor) -> list[float]:
        return metrics.alignment_gain(camera, field, target, border_px=BORDER_PX).tolist()

    scores = {"alignment_gain": gain(offset)}
    if "true_flow" in part.batch:
        flow = part.batch["true_flow"].to(offset.device).float()  # in packed pixels, two mosaic pixels each
        scores["true_alignment_gain"] = gain(flow)
        scores["epe_px"] = (2 * metrics.resized_end_point_error(offset, flow)).tolist()
        scores["epe_inside_px"] = (2 * metrics.resized_end_point_error(offset, flow, inside=True)).tolist()
    return scores


def score_bicubic(
    model: Network,
    held: HeldOut,
    device: torch.device,
    source: str,
    *,
    perceptual: bool = False,
    by_plane: bool = False,
) -> PerCrop:
    """Score the bicubic enlargement of `source`: "camera" (the camera JPG) or "rendering" (LibRaw's)."""
    collected: PerCrop = {}
    for inputs, part in _batches(model, held, device):
        picture = inputs.camera if source == "camera" else part.batch["lr_render"].to(device).float() / 255
        enlarged = bicubic(picture, model.config.scale)
        _extend(collected, score_images(enlarged, part, perceptual=perceptual, by_plane=by_plane))
    return collected


def score_images(images: Tensor, part: HeldOut, *, perceptual: bool = False, by_plane: bool = False) -> PerCrop:
    """PSNR, SSIM and, with `perceptual`, LPIPS and ST-LPIPS against every target that the crops have.

    Args:
        images: [N,3,sH,sW] in [0, 1] (clipped here); the metrics are computed on their device.
        perceptual: for whole pictures only, without mask and border.
        by_plane: also PSNR by PLANES against raw and true, where the crops have true_near.
    """
    images = images.float().clamp(0, 1)
    scores: PerCrop = {}
    for target in TARGETS:
        wanted, mask = _target(part, target, images.device)
        if wanted is None:
            continue
        scores[f"{target}_psnr"] = metrics.psnr(images, wanted, mask=mask, border_px=BORDER_PX).tolist()
        scores[f"{target}_ssim"] = metrics.ssim(images, wanted, mask=mask, border_px=BORDER_PX).tolist()
        if by_plane and target in _VIEWS and "true_near" in part.batch:
            for plane, shown in plane_masks(part.batch["true_near"][:, _VIEWS[target]], images.shape[-1]).items():
                values = metrics.psnr(images, wanted, mask=shown.to(images.device), border_px=BORDER_PX)
                scores[f"{target}_psnr_{plane}"] = values.tolist()
        if perceptual and mask is None:
            for name, (metric, _) in metrics.PERCEPTUAL.items():
                with compute_plan(images.device).tf32_flags():  # no TF32
                    distance = metric(images, wanted)
                if distance is not None:
                    scores[f"{target}_{name}"] = distance.tolist()
    return scores


def plane_masks(near: Tensor, size: int) -> dict[str, Tensor]:
    """Which pixels of a target show which of PLANES; one at least EDGE_PX from the other plane is far or near.

    Args:
        near: [N, t, t], 1 where a packed pixel shows the near plane.
        size: side of the target, pixels.

    Returns:
        plane -> float [N, 1, size, size], 1 where a pixel counts.
    """
    shown = near[:, None].float()
    side = 2 * EDGE_PX + 1
    some, none = max_pool2d(shown, side, 1, EDGE_PX), max_pool2d(1 - shown, side, 1, EDGE_PX)
    masks = {"far": 1 - some, "near": 1 - none, "edges": some * none}
    return {plane: interpolate(mask, size=(size, size), mode="nearest") for plane, mask in masks.items()}


def mean_scores(per_crop: PerCrop) -> dict[str, float]:
    """Mean over the crops that have a value; NaN if none has."""
    means = {}
    for name, values in per_crop.items():
        finite = [value for value in values if not math.isnan(value)]
        means[name] = sum(finite) / len(finite) if finite else math.nan
    return means


def _target(part: HeldOut, name: str, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    if name == "raw":
        return part.batch["hr_rgb"].to(device).float() / 255, None
    if name == "true":
        return (part.batch["true_rgb"].to(device).float() / 255, None) if "true_rgb" in part.batch else (None, None)
    if part.aligned is None or part.aligned_mask is None:
        return None, None
    return part.aligned.to(device).float() / 255, part.aligned_mask.to(device).float()


def _batches(model: Network, held: HeldOut, device: torch.device) -> Iterator[tuple[Inputs, HeldOut]]:
    for first in range(0, len(held), BATCH):
        part = held.select(range(first, min(first + BATCH, len(held))))
        yield model_inputs(part.batch, model.config, device), part


def _extend(collected: PerCrop, scores: PerCrop) -> None:
    for name, values in scores.items():
        collected.setdefault(name, []).extend(values)
