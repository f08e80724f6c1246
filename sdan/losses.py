"""The paper's loss (eq. 6) and the two terms that train the deployed network, which has no target to look at.

Every term crops `border_px` target pixels from each side: there convolutions saw zero padding and offsets reach out.
All terms are computed in float32, whatever autocast is on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from sdan.network import SDANOutput
from sdan.ops import offset_mask
from sdan.resample import enlarge_offset, low_pass, sample

__all__ = ["LossConfig", "LossTerms", "low_pass", "sdan_loss", "self_reference_loss", "transfer_loss"]

Kind = Literal["l1", "charbonnier"]
SelfTarget = Literal["pair", "truth"]


@dataclass(frozen=True)
class LossConfig:
    """Which loss; checked when constructed (ValueError)."""

    kind: Kind = "l1"
    """l1 as printed; charbonnier sqrt(d^2 + epsilon^2) as released (there with an epsilon of 1e-6: all but L1)."""
    align_weight: float = 1.0
    """Weight of |X' - Y'| M."""
    reference_weight: float = 1.0
    """Weight of the samples that see Y' as reference, as in the paper; 0: none are run (needs self_target=truth)."""
    self_reference_weight: float = 0.0
    """Weight of the samples that are trained as deployed, {X, X}; 0: none, as in the paper."""
    self_target: SelfTarget = "pair"
    """What those are held to. pair: the camera JPG of their own frame, and the pair's target through the offsets that
    the other samples learn; truth: the ideal picture, which simulated shards alone hold."""
    border_px: int = 32
    """Cropped from each side of the target, target pixels (32 as released); rounded up on coarser grids."""
    epsilon: float = 1e-3
    """Charbonnier's rounding of the corner at 0."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: one of {', '.join(get_args(Kind))} expected, got {self.kind!r}")
        if self.self_target not in get_args(SelfTarget):
            raise ValueError(
                f"self_target: one of {', '.join(get_args(SelfTarget))} expected, got {self.self_target!r}"
            )
        for name in ("align_weight", "reference_weight", "self_reference_weight", "border_px"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: 0 or more expected, got {getattr(self, name)!r}")
        if self.reference_weight == 0 and not (self.self_target == "truth" and self.self_reference_weight > 0):
            raise ValueError(
                "reference_weight: more than 0 expected, got 0; "
                "only self_target=truth with a self_reference_weight above 0 can do without those samples"
            )
        if not self.epsilon > 0:
            raise ValueError(f"epsilon: more than 0 expected, got {self.epsilon!r}")


class LossTerms(NamedTuple):
    """Scalars; total = align_weight * align + zoom."""

    total: Tensor
    align: Tensor
    zoom: Tensor


def sdan_loss(output: SDANOutput, reference: Tensor, target: Tensor, config: LossConfig) -> LossTerms:
    """Eq. 6: mean(|X' - Y'| M') * align_weight + mean(|zoomed - Y| M).

    M' is the mask at X's size and M the same, enlarged (nearest) to Y's; neither carries a gradient. As released, the
    means run over the whole cropped area, not over the valid part of it.

    Args:
        output: of SDAN.forward(x, reference, ...).
        reference: Y' [N,3,H,W], the target low-passed to x's size.
        target: Y [N,3,upscale H,upscale W].
        config: weights, kind, border.

    Raises:
        ValueError: sizes that do not fit, or a border that leaves nothing.
    """
    factor = _factor(target, output.aligned)
    mask = output.mask.detach()
    align = _masked_mean(output.aligned, reference, mask, -(-config.border_px // factor), config)
    zoom = _masked_mean(output.zoomed, target, _enlarge_mask(mask, factor), config.border_px, config)
    return LossTerms(config.align_weight * align + zoom, align, zoom)


def self_reference_loss(output: SDANOutput, low: Tensor, config: LossConfig) -> LossTerms:
    """The deployed pass {X, X} against its own low-resolution picture; no target (ours).

    X' must be the input's picture, and the zoomed output, low-passed, must be it too: this holds colour, brightness and
    position, and asks nothing of detail above the input's resolution.

    Args:
        output: of SDAN.forward(x, self reference, ...).
        low: [N,3,mosaic H,mosaic W], the camera's picture of the input's frame.
        config: weights, kind, border (in pixels of the zoomed grid).
    """
    scale, shrink = _factor(output.zoomed, low), _factor(low, output.aligned)
    mask, border = output.mask.detach(), -(-config.border_px // scale)
    align = _masked_mean(output.aligned, low_pass(low.float(), shrink), mask, -(-border // shrink), config)
    shrunk = low_pass(output.zoomed.float(), scale)
    zoom = _masked_mean(shrunk, low, _enlarge_mask(mask, shrink), border, config)
    return LossTerms(config.align_weight * align + zoom, align, zoom)


def transfer_loss(zoomed: Tensor, offset: Tensor, target: Tensor, config: LossConfig) -> Tensor:
    """The deployed output, moved by what the other pass learnt about the misalignment, against the target (ours).

    Eq. 6 rewards detail only when the reference comes from the target. Here the output of the {X, X} pass, which stays
    in the input's own view, is sampled at p + offset(p) - the offset of the {X, Y'} pass, without gradient, enlarged to
    the target's grid in size and value - and compared with Y where that lies inside: so the deployed path learns detail
    from real targets although the pair is misaligned.

    Args:
        zoomed: [N,3,upscale H,upscale W], of the {X, X} pass.
        offset: [N,2,H,W] in pixels of x, of the {X, Y'} pass on the same crops.
        target: Y, zoomed's size.
        config: kind and border.

    Returns:
        scalar: mean over the cropped area of the masked distance.
    """
    field = enlarge_offset(offset.detach().float(), _factor(target, offset))
    # Bicubic, since bilinear sampling between pixels would blur the output and so teach it to sharpen too much.
    moved = sample(zoomed, field, mode="bicubic")
    return _masked_mean(moved, target, offset_mask(field, 1), config.border_px, config)


def _masked_mean(image: Tensor, target: Tensor, mask: Tensor, border: int, config: LossConfig) -> Tensor:
    if image.shape != target.shape:
        raise ValueError(f"the loss compares images of one size, got {tuple(image.shape)} and {tuple(target.shape)}")
    height, width = image.shape[-2:]
    if 2 * border >= min(height, width):
        raise ValueError(
            f"border_px={config.border_px} crops {border} of each side of {height}x{width} and leaves nothing; "
            "set a smaller loss.border_px or a larger crop"
        )
    inside = (..., slice(border, height - border), slice(border, width - border))
    difference = image[inside].float() - target[inside].float()
    distance = difference.abs() if config.kind == "l1" else torch.sqrt(difference.square() + config.epsilon**2)
    return (distance * mask[inside]).mean()


def _enlarge_mask(mask: Tensor, factor: int) -> Tensor:
    return mask if factor == 1 else F.interpolate(mask, scale_factor=factor, mode="nearest")


def _factor(fine: Tensor, coarse: Tensor) -> int:
    """How many times finer one grid is than another."""
    factor = fine.shape[-1] // max(coarse.shape[-1], 1)
    if factor < 1 or tuple(factor * side for side in coarse.shape[-2:]) != tuple(fine.shape[-2:]):
        raise ValueError(f"a whole multiple of size {tuple(coarse.shape[-2:])} expected, got {tuple(fine.shape[-2:])}")
    return factor
