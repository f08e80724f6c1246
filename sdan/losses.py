"""The paper's loss (eq. 6) and the two terms that train the deployed network, which has no target to look at.

Where the zoomed picture meets its target, the pixel term can be joined or replaced by terms that compare features
(Table 1's "Perceptual" and "SRResNet+CX"). Every term crops `border_px` target pixels from each side: there
convolutions saw zero padding and offsets reach out.
All terms are computed in float32, whatever autocast is on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from sdan.contextual import contextual_loss, map_points, patch_points
from sdan.network import SDANOutput
from sdan.ops import offset_mask
from sdan.perceptual import LEAST_PX, VGG19Features
from sdan.resample import enlarge_offset, low_pass, sample

__all__ = ["LossConfig", "LossTerms", "low_pass", "sdan_loss", "self_reference_loss", "transfer_loss"]

Kind = Literal["l1", "charbonnier"]
SelfTarget = Literal["pair", "truth"]
PERCEPTUAL_LAYERS = {"relu2_2": 1.0}
"""Johnson et al.'s layer for super-resolution (in their VGG-16)."""
CONTEXTUAL_LAYERS = {"relu1_2": 1.0, "relu2_2": 1.0, "relu3_2": 0.5}
"""The CoBi paper's layers, weighted as in its code."""


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
    pixel_weight: float = 1.0
    """Weight of the pixel term between the zoomed picture and its target; 0: feature terms alone, as in Table 1's
    "Perceptual" and "SRResNet+CX". Terms at the input's size stay pixel terms of weight 1."""
    perceptual_weight: float = 0.0
    """Weight of the mean squared difference of VGG-19 features (Johnson et al. 2016)."""
    contextual_weight: float = 0.0
    """Weight of the contextual loss (CX) between VGG-19 features."""
    cobi_rgb_weight: float = 0.0
    """Weight of the contextual bilateral loss (CoBi) between RGB patches."""
    cobi_vgg_weight: float = 0.0
    """Weight of CoBi between VGG-19 features."""
    cobi_spatial_weight: float = 0.1
    """w_s: what a match a whole picture away costs in CoBi, in cosine distance."""
    cobi_patch_px: int = 10
    """Side of CoBi's RGB patches, target pixels."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: one of {', '.join(get_args(Kind))} expected, got {self.kind!r}")
        if self.self_target not in get_args(SelfTarget):
            raise ValueError(
                f"self_target: one of {', '.join(get_args(SelfTarget))} expected, got {self.self_target!r}"
            )
        terms = ("pixel_weight", "perceptual_weight", "contextual_weight", "cobi_rgb_weight", "cobi_vgg_weight")
        samples = ("align_weight", "reference_weight", "self_reference_weight")
        for name in (*terms, *samples, "cobi_spatial_weight", "border_px"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: 0 or more expected, got {getattr(self, name)!r}")
        if not any(getattr(self, name) > 0 for name in terms):
            raise ValueError(f"one of {', '.join(terms)} above 0 expected, got 0 for each")
        if self.cobi_patch_px < 1:
            raise ValueError(f"cobi_patch_px: at least 1 expected, got {self.cobi_patch_px!r}")
        if self.reference_weight == 0 and not (self.self_target == "truth" and self.self_reference_weight > 0):
            raise ValueError(
                "reference_weight: more than 0 expected, got 0; "
                "only self_target=truth with a self_reference_weight above 0 can do without those samples"
            )
        if not self.epsilon > 0:
            raise ValueError(f"epsilon: more than 0 expected, got {self.epsilon!r}")

    @property
    def needs_vgg(self) -> bool:
        """Whether a term compares VGG-19 features."""
        return max(self.perceptual_weight, self.contextual_weight, self.cobi_vgg_weight) > 0

    @property
    def least_px(self) -> int:
        """The smallest side of the target inside the border that every term can work on."""
        return max(1, LEAST_PX if self.needs_vgg else 1, self.cobi_patch_px if self.cobi_rgb_weight > 0 else 1)


class LossTerms(NamedTuple):
    """Scalars; total = align_weight * align + zoom."""

    total: Tensor
    align: Tensor
    zoom: Tensor
    parts: dict[str, Tensor]
    """zoom's terms, before their weights; empty where the pixel term is the only one."""


def sdan_loss(
    output: SDANOutput, reference: Tensor, target: Tensor, config: LossConfig, vgg: VGG19Features | None = None
) -> LossTerms:
    """Eq. 6: mean(|X' - Y'| M') * align_weight + mean(|zoomed - Y| M), the second term as `config` asks.

    M' is the mask at X's size and M the same, enlarged (nearest) to Y's; neither carries a gradient. As released, the
    means run over the whole cropped area, not over the valid part of it.

    Args:
        output: of SDAN.forward(x, reference, ...).
        reference: Y' [N,3,H,W], the target low-passed to x's size.
        target: Y [N,3,upscale H,upscale W].
        config: weights, kind, border.
        vgg: for the terms that compare its features.

    Raises:
        ValueError: sizes that do not fit, a border that leaves nothing, or no `vgg` where the config needs it.
    """
    factor = _factor(target, output.aligned)
    mask = output.mask.detach()
    align = _masked_mean(output.aligned, reference, mask, -(-config.border_px // factor), config)
    zoom, parts = _target_loss(output.zoomed, target, _enlarge_mask(mask, factor), config, vgg)
    return LossTerms(config.align_weight * align + zoom, align, zoom, parts)


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
    return LossTerms(config.align_weight * align + zoom, align, zoom, {})


def transfer_loss(
    zoomed: Tensor, offset: Tensor, target: Tensor, config: LossConfig, vgg: VGG19Features | None = None
) -> Tensor:
    """The deployed output, moved by what the other pass learnt about the misalignment, against the target (ours).

    Eq. 6 rewards detail only when the reference comes from the target. Here the output of the {X, X} pass, which stays
    in the input's own view, is sampled at p + offset(p) - the offset of the {X, Y'} pass, without gradient, enlarged to
    the target's grid in size and value - and compared with Y where that lies inside: so the deployed path learns detail
    from real targets although the pair is misaligned.

    Args:
        zoomed: [N,3,upscale H,upscale W], of the {X, X} pass.
        offset: [N,2,H,W] in pixels of x, of the {X, Y'} pass on the same crops.
        target: Y, zoomed's size.
        config: kind, weights and border.
        vgg: for the terms that compare its features.

    Returns:
        scalar: as eq. 6's second term.
    """
    field = enlarge_offset(offset.detach().float(), _factor(target, offset))
    # Bicubic, since bilinear sampling between pixels would blur the output and so teach it to sharpen too much.
    moved = sample(zoomed, field, mode="bicubic")
    return _target_loss(moved, target, offset_mask(field, 1), config, vgg)[0]


def _target_loss(
    image: Tensor, target: Tensor, mask: Tensor, config: LossConfig, vgg: VGG19Features | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the terms that the config asks for, and each by name where there are several kinds."""
    parts = {}
    if config.pixel_weight > 0:
        parts["pixel"] = _masked_mean(image, target, mask, config.border_px, config)
    if config.needs_vgg or config.cobi_rgb_weight > 0:
        inside = _inside(image, target, config.border_px, config)
        parts |= _feature_terms(image[inside].float(), target[inside].float(), mask[inside].float(), config, vgg)
    total = torch.stack([getattr(config, f"{name}_weight") * part for name, part in parts.items()]).sum()
    return total, parts if parts.keys() != {"pixel"} else {}


def _feature_terms(
    image: Tensor, target: Tensor, mask: Tensor, config: LossConfig, vgg: VGG19Features | None
) -> dict[str, Tensor]:
    """The terms other than pixels, of cropped pictures.

    M weighs the feature maps by its area mean over their pixels (a feature also sees what lies around those); in CX and
    CoBi it weighs the target's points, while any point of the image may be the match.
    """
    terms = {}
    with torch.autocast(image.device.type, enabled=False):
        if config.cobi_rgb_weight > 0:
            points, goal = (patch_points(picture, mask, config.cobi_patch_px) for picture in (image, target))
            terms["cobi_rgb"] = contextual_loss(points, goal, spatial_weight=config.cobi_spatial_weight)
        if not config.needs_vgg:
            return terms
        if vgg is None:
            raise ValueError("vgg: VGG-19 features expected by this loss, got None; pass VGG19Features(load_vgg19())")
        got = vgg(image)
        with torch.no_grad():
            wanted = vgg(target)
        if config.perceptual_weight > 0:
            terms["perceptual"] = _perceptual(got, wanted, mask)
        for name, spatial_weight in (("contextual", 0.0), ("cobi_vgg", config.cobi_spatial_weight)):
            if getattr(config, f"{name}_weight") > 0:
                terms[name] = torch.stack(
                    [
                        weight
                        * contextual_loss(
                            map_points(got[layer], mask), map_points(wanted[layer], mask), spatial_weight=spatial_weight
                        )
                        for layer, weight in CONTEXTUAL_LAYERS.items()
                    ]
                ).sum()
    return terms


def _perceptual(got: dict[str, Tensor], wanted: dict[str, Tensor], mask: Tensor) -> Tensor:
    """mean((Psi(image) - Psi(target))^2 M), over the whole map as in eq. 6."""
    terms = []
    for layer, weight in PERCEPTUAL_LAYERS.items():
        shrunk = F.interpolate(mask, size=got[layer].shape[-2:], mode="area")
        terms.append(weight * ((got[layer] - wanted[layer]).square() * shrunk).mean())
    return torch.stack(terms).sum()


def _masked_mean(image: Tensor, target: Tensor, mask: Tensor, border: int, config: LossConfig) -> Tensor:
    inside = _inside(image, target, border, config)
    difference = image[inside].float() - target[inside].float()
    distance = difference.abs() if config.kind == "l1" else torch.sqrt(difference.square() + config.epsilon**2)
    return (distance * mask[inside]).mean()


def _inside(image: Tensor, target: Tensor, border: int, config: LossConfig) -> tuple[Any, ...]:
    """The index that crops the border, of pictures of one size."""
    if image.shape != target.shape:
        raise ValueError(f"the loss compares images of one size, got {tuple(image.shape)} and {tuple(target.shape)}")
    height, width = image.shape[-2:]
    if 2 * border >= min(height, width):
        raise ValueError(
            f"border_px={config.border_px} crops {border} of each side of {height}x{width} and leaves nothing; "
            "set a smaller loss.border_px or a larger crop"
        )
    return (..., slice(border, height - border), slice(border, width - border))


def _enlarge_mask(mask: Tensor, factor: int) -> Tensor:
    return mask if factor == 1 else F.interpolate(mask, scale_factor=factor, mode="nearest")


def _factor(fine: Tensor, coarse: Tensor) -> int:
    """How many times finer one grid is than another."""
    factor = fine.shape[-1] // max(coarse.shape[-1], 1)
    if factor < 1 or tuple(factor * side for side in coarse.shape[-2:]) != tuple(fine.shape[-2:]):
        raise ValueError(f"a whole multiple of size {tuple(coarse.shape[-2:])} expected, got {tuple(fine.shape[-2:])}")
    return factor
