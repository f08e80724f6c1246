"""Scores of held-out crops by protocol (self, oracle) and target (raw, aligned, true), crop by crop.

Keys read `<protocol>_<target>_<metric>`, e.g. self_true_psnr; baselines need no reference and have their own names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipelines.loader import HeldOut, Inputs, model_inputs
from sdan import metrics
from sdan.baselines import Network, bicubic
from sdan.network import SDANOutput
from sdan.ops.precision import autocast

BORDER_PX = 8
"""Target pixels left out at each side of a crop when it is scored."""
BATCH = 4
PROTOCOLS = ("self", "oracle")
TARGETS = ("raw", "aligned", "true")

PerCrop = dict[str, list[float]]
"""Metric name -> one value a crop; NaN where a crop has no such target."""


def score_model(
    model: Network,
    held: HeldOut,
    device: torch.device,
    protocols: Sequence[str] = PROTOCOLS,
    *,
    lpips: bool = False,
    precision: str = "auto",
) -> PerCrop:
    """Scores of a model's outputs; with simulated truth also the end-point error of its offsets, in mosaic pixels."""
    collected: PerCrop = {}
    model.eval()
    for inputs, part in _batches(model, held, device):
        for protocol in protocols:
            reference = inputs.self_reference if protocol == "self" else inputs.oracle_reference
            with torch.inference_mode(), autocast(precision, device):
                output = model(inputs.x, reference, inputs.rendering)
            scores = score_images(output.zoomed, part, lpips=lpips) | offset_statistics(output, inputs)
            if protocol == "oracle" and "true_flow" in part.batch:
                scores["epe_px"] = _offset_error(output.offset, part.batch["true_flow"])
            _extend(collected, {f"{protocol}_{name}": values for name, values in scores.items()})
    return collected


def score_bicubic(model: Network, held: HeldOut, device: torch.device, source: str, *, lpips: bool = False) -> PerCrop:
    """Scores of the bicubic enlargement of the `source`: "camera" (the JPG) or "rendering" (LibRaw's)."""
    collected: PerCrop = {}
    for inputs, part in _batches(model, held, device):
        picture = inputs.camera if source == "camera" else part.batch["lr_render"].to(device).float() / 255
        enlarged = bicubic(picture, model.config.scale)
        _extend(collected, score_images(enlarged, part, lpips=lpips))
    return collected


def score_images(images: Tensor, part: HeldOut, *, lpips: bool = False) -> PerCrop:
    """PSNR and SSIM (and LPIPS, where its weights are at hand) against every target that the crops have.

    Args:
        images: [N,3,sH,sW] in [0, 1] (clipped here).
    """
    images = images.float().cpu().clamp(0, 1)
    scores: PerCrop = {}
    for target in TARGETS:
        wanted, mask = _target(part, target)
        if wanted is None:
            continue
        scores[f"{target}_psnr"] = metrics.psnr(images, wanted, mask=mask, border_px=BORDER_PX).tolist()
        scores[f"{target}_ssim"] = metrics.ssim(images, wanted, mask=mask, border_px=BORDER_PX).tolist()
        if lpips and mask is None and metrics.lpips_unavailable() is None:
            distance = metrics.lpips_distance(images, wanted)
            scores[f"{target}_lpips"] = [] if distance is None else distance.tolist()
    return scores


def mean_scores(per_crop: PerCrop) -> dict[str, float]:
    """Means over the crops that have a value; NaN where none has."""
    means = {}
    for name, values in per_crop.items():
        finite = [value for value in values if not math.isnan(value)]
        means[name] = sum(finite) / len(finite) if finite else math.nan
    return means


def _target(part: HeldOut, name: str) -> tuple[Tensor | None, Tensor | None]:
    if name == "raw":
        return part.batch["hr_rgb"].float() / 255, None
    if name == "true":
        return (part.batch["true_rgb"].float() / 255, None) if "true_rgb" in part.batch else (None, None)
    if part.aligned is None or part.aligned_mask is None:
        return None, None
    return part.aligned.float() / 255, part.aligned_mask.float()


def _batches(model: Network, held: HeldOut, device: torch.device) -> Iterator[tuple[Inputs, HeldOut]]:
    for first in range(0, len(held), BATCH):
        part = held.select(range(first, min(first + BATCH, len(held))))
        yield model_inputs(part.batch, model.config, device), part


def offset_statistics(output: SDANOutput, inputs: Inputs) -> PerCrop:
    """How far the offsets reach (mean and 95th percentile of their length, mosaic pixels), the share of them that
    leaves the image, and how rough they are: mean length of their differences between neighbours, pixels a pixel."""
    per_px = inputs.rendering.shape[-1] / output.offset.shape[-1]
    offset = output.offset.float()
    length = per_px * offset.norm(dim=1).flatten(1)
    rough = [offset.diff(dim=axis).norm(dim=1).flatten(1).mean(1) for axis in (2, 3)]
    return {
        "offset_px": length.mean(1).tolist(),
        "offset_p95_px": length.quantile(0.95, dim=1).tolist(),
        "offset_outside": (1 - output.mask.float()).flatten(1).mean(1).tolist(),
        "offset_roughness": (sum(rough) / 2).tolist(),
    }


def _offset_error(offset: Tensor, true_flow: Tensor) -> list[float]:
    """Mean end-point error in mosaic pixels, whatever grid the offsets live on (true_flow is in packed pixels)."""
    per_packed = true_flow.shape[-1] / offset.shape[-1]
    flow = torch.nn.functional.interpolate(
        true_flow.float(), size=offset.shape[-2:], mode="bilinear", align_corners=False
    )
    return (2 * metrics.end_point_error(offset.float().cpu() * per_packed, flow)).tolist()


def _extend(collected: PerCrop, scores: PerCrop) -> None:
    for name, values in scores.items():
        collected.setdefault(name, []).extend(values)
