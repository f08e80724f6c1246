"""The training losses: the paper's eq. 6, and two terms (ours) for the deployed pass, which has no target as reference.

    sdan_loss             {X, Y'}: eq. 6
    self_reference_loss   {X, X}: the output must agree with its own low-resolution picture
    transfer_loss         {X, X}: the output, moved by the offset of the {X, Y'} pass, must match the target

`_target_loss` compares the zoomed picture with its target: by pixels, by features (Table 1's "Perceptual" and
"SRResNet+CX"; ST-LPIPS), or both. CONTRIBUTING.md ("A loss") lists what a new term of it needs. A loss for another
forward pass is a new function here, called in pipelines/training/step.py.

Every term crops `border_px` target pixels from each side, where convolutions saw zero padding and offsets point outside
the crop. All terms are computed in float32, even under autocast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from sdan import adversarial
from sdan.adversarial import AdversarialKind
from sdan.metrics import check_floating, check_pixels
from sdan.network import SDANOutput
from sdan.ops import offset_mask
from sdan.perceptual import st_lpips, vgg19
from sdan.perceptual.contextual import contextual_loss, map_points, patch_points
from sdan.perceptual.features import FeatureNetwork
from sdan.resample import enlarge_offset, low_pass, sample

Kind = Literal["l1", "charbonnier"]
SelfTarget = Literal["pair", "truth"]
PERCEPTUAL_LAYERS = {"relu2_2": 1.0}
"""Layer -> weight: the layer that Johnson et al. use for super-resolution (in their VGG-16)."""
CONTEXTUAL_LAYERS = {"relu1_2": 1.0, "relu2_2": 1.0, "relu3_2": 0.5}
"""Layer -> weight, as in the CoBi paper's code."""


HALO_REACH_PX = 2
"""The halo term allows every value between the smallest and the largest of the target's (2 r + 1)^2 pixels around."""
VGG_WEIGHTS = ("perceptual_weight", "contextual_weight", "cobi_vgg_weight")
"""The weights of the terms that compare VGG-19 features."""


@dataclass(frozen=True)
class LossConfig:
    """Terms of the loss and their weights; the values are checked when constructed (ValueError)."""

    kind: Kind = "l1"
    """Pixel distance. l1: as printed. charbonnier: sqrt(d^2 + epsilon^2), as released (there with an epsilon of 1e-6,
    nearly L1)."""
    align_weight: float = 1.0
    """Weight of |X' - Y'| M."""
    offset_smoothness_weight: float = 0.0
    """Weight of the offsets' mean slope (Charbonnier, pixels per pixel) in the {X, Y'} pass (ours)."""
    known_shift_weight: float = 0.0
    """Weight of the error, in pixels of x, of offsets to the input's own picture moved by a known random field of up to
    model.max_shift_px (sdan/offsets/known_shift.py, ours). 0: no such pass."""
    reference_weight: float = 1.0
    """Weight of the {X, Y'} pass, as in the paper. 0: the pass is not run (requires self_target=truth)."""
    self_reference_weight: float = 0.0
    """Weight of the {X, X} pass, as deployed. 0: the pass is not run, as in the paper."""
    self_target: SelfTarget = "pair"
    """Target of the {X, X} pass. pair: the camera JPG of its own frame (self_reference_loss), and the pair's target
    through the offsets of the {X, Y'} pass (transfer_loss). truth: the ideal picture; simulated shards only."""
    border_px: int = 32
    """Cropped from each side, target pixels (32 as released); rounded up on coarser grids."""
    epsilon: float = 1e-3
    """Charbonnier's epsilon: smooths the corner at 0."""
    pixel_weight: float = 1.0
    """Weight of the pixel term between the zoomed picture and its target. 0: feature terms only, as in Table 1's
    "Perceptual" and "SRResNet+CX". Terms at the input's size are always pixel terms of weight 1."""
    halo_weight: float = 0.0
    """Weight of the halo term (ours): how far the zoomed picture goes beyond the target's darkest and brightest values
    nearby, as halos beside edges do. Added to the terms above, which charge a halo no more than a blur of its size."""
    perceptual_weight: float = 0.0
    """Weight of the mean squared difference of VGG-19 features (Johnson et al. 2016). Where VGG-19's weights are not at
    hand, this and the next terms use VGG16 (sdan/perceptual/features.py)."""
    contextual_weight: float = 0.0
    """Weight of the contextual loss (CX) between VGG-19 features."""
    cobi_rgb_weight: float = 0.0
    """Weight of the contextual bilateral loss (CoBi) between RGB patches."""
    cobi_vgg_weight: float = 0.0
    """Weight of CoBi between VGG-19 features."""
    st_lpips_weight: float = 0.0
    """Weight of ST-LPIPS, a learnt distance that tolerates small shifts (sdan/perceptual/st_lpips.py). Costs 0.23
    million multiplications for each target pixel inside the border and each pass: 0.4 times the network's for srraw_4x,
    6 times for the starters. The extra `train` installs its weights (stlpips-pytorch)."""
    adversarial_weight: float = 0.0
    """Weight of the adversarial term, between the zoomed picture of the first pass and its target
    (sdan/adversarial.py). 0: there is no discriminator."""
    adversarial_kind: AdversarialKind = "standard"
    """standard: as in SRGAN. relativistic: as in ESRGAN."""
    cobi_spatial_weight: float = 0.1
    """CoBi's w_s: the cost, in cosine distance, of a match at a distance of one picture side."""
    cobi_patch_px: int = 10
    """Side of CoBi's RGB patches, target pixels."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if self.self_target not in get_args(SelfTarget):
            raise ValueError(
                f"self_target: expected one of {', '.join(get_args(SelfTarget))}, got {self.self_target!r}"
            )
        if self.adversarial_kind not in get_args(AdversarialKind):
            raise ValueError(
                f"adversarial_kind: expected one of {', '.join(get_args(AdversarialKind))}, "
                f"got {self.adversarial_kind!r}"
            )
        terms = ("pixel_weight", *VGG_WEIGHTS, "cobi_rgb_weight", "st_lpips_weight")
        passes = ("align_weight", "reference_weight", "self_reference_weight")
        offsets = ("offset_smoothness_weight", "known_shift_weight")
        others = ("halo_weight", "adversarial_weight", "cobi_spatial_weight", "border_px")
        for name in (*terms, *passes, *offsets, *others):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)!r}")
        if not any(getattr(self, name) > 0 for name in terms):
            raise ValueError(f"{', '.join(terms)}: expected at least one above 0, got 0 for each")
        if self.cobi_patch_px < 1:
            raise ValueError(f"cobi_patch_px: expected at least 1, got {self.cobi_patch_px!r}")
        if self.reference_weight == 0 and not (self.self_target == "truth" and self.self_reference_weight > 0):
            raise ValueError(
                "reference_weight: expected more than 0, got 0; "
                "raise it, or set self_target=truth and a self_reference_weight above 0"
            )
        if not self.epsilon > 0:
            raise ValueError(f"epsilon: expected more than 0, got {self.epsilon!r}")

    @property
    def needs_vgg(self) -> bool:
        """Whether any term compares features of a VGG network."""
        return any(getattr(self, name) > 0 for name in VGG_WEIGHTS)

    @property
    def needs_features(self) -> bool:
        """Whether there are terms besides the pixel term (`_feature_terms`)."""
        return self.needs_vgg or self.cobi_rgb_weight > 0 or self.st_lpips_weight > 0

    @property
    def min_px(self) -> int:
        """Every term accepts targets whose sides, after the border is cropped, have at least this many pixels."""
        sides = {"cobi_rgb_weight": self.cobi_patch_px, "st_lpips_weight": st_lpips.MIN_PX}
        sides["adversarial_weight"] = adversarial.MIN_PX
        sides |= dict.fromkeys(VGG_WEIGHTS, vgg19.MIN_PX)
        return max([1, *(side for name, side in sides.items() if getattr(self, name) > 0)])


class LossTerms(NamedTuple):
    """Scalars; total = align_weight * align + zoom."""

    total: Tensor
    align: Tensor
    zoom: Tensor
    parts: dict[str, Tensor]
    """Name -> unweighted term of `zoom`; empty if the pixel term is the only one."""


def sdan_loss(
    output: SDANOutput, reference: Tensor, target: Tensor, config: LossConfig, vgg: FeatureNetwork | None = None
) -> LossTerms:
    """Eq. 6: mean(|X' - Y'| M') * align_weight + mean(|zoomed - Y| M), the second term as configured.

    M' is the mask at X's size, and M is M' enlarged (nearest) to Y's size; neither carries a gradient. As released,
    the means are over the whole cropped area, not only where the mask is 1.

    Args:
        output: of SDAN.forward(x, reference, ...).
        reference: Y' [N,3,H,W], the target low-passed to x's size.
        target: Y [N,3,upscale H,upscale W].
        config: weights, kind, border.
        vgg: required if config.needs_vgg.

    Raises:
        ValueError: sizes that do not match, a border that leaves nothing, a missing `vgg`, or pictures that are not
            in [0, 1] (on a GPU only their type is checked: reading their range would stall it).
    """
    check_floating("sdan_loss, reference", reference)
    check_floating("sdan_loss, target", target)
    factor = _size_ratio(target, output.aligned)
    mask = output.mask.detach()
    align = _masked_mean(output.aligned, reference, mask, -(-config.border_px // factor), config)
    zoom, parts = _target_loss(output.zoomed, target, _enlarge_mask(mask, factor), config, vgg)
    total = config.align_weight * align + zoom
    if config.offset_smoothness_weight > 0:
        total = total + config.offset_smoothness_weight * _slope(output.offset, config.epsilon)
    return LossTerms(total, align, zoom, parts)


def _slope(offset: Tensor, epsilon: float) -> Tensor:
    """The mean Charbonnier distance between neighbouring offsets, along rows and along columns."""
    slopes = [(offset.float().diff(dim=axis).square() + epsilon**2).sqrt().mean() for axis in (2, 3)]
    return torch.stack(slopes).mean() - epsilon


def self_reference_loss(output: SDANOutput, low: Tensor, config: LossConfig) -> LossTerms:
    """Compare the deployed pass {X, X} with its own low-resolution picture; no target is used (ours).

    X' and the low-passed output must both equal the input's picture. This fixes colour, brightness and position, but
    does not constrain detail above the input's resolution.

    Args:
        output: of SDAN.forward(x, self reference, ...).
        low: [N,3,mosaic H,mosaic W], the camera JPG of the input's frame.
        config: weights, kind, border (in pixels of the zoomed output).

    Raises:
        ValueError: as sdan_loss.
    """
    check_floating("self_reference_loss, low", low)
    scale, shrink = _size_ratio(output.zoomed, low), _size_ratio(low, output.aligned)
    mask, border = output.mask.detach(), -(-config.border_px // scale)
    align = _masked_mean(output.aligned, low_pass(low.float(), shrink), mask, -(-border // shrink), config)
    shrunk = low_pass(output.zoomed.float(), scale)
    zoom = _masked_mean(shrunk, low, _enlarge_mask(mask, shrink), border, config)
    return LossTerms(config.align_weight * align + zoom, align, zoom, {})


def transfer_loss(
    zoomed: Tensor, offset: Tensor, target: Tensor, config: LossConfig, vgg: FeatureNetwork | None = None
) -> Tensor:
    """Compare the deployed output, moved by the offset of the {X, Y'} pass, with the target (ours).

    Eq. 6 rewards detail only if the reference comes from the target. Here the output of the {X, X} pass, which is in
    the input's own view, is sampled at p + offset(p) and compared with Y where that point is inside the image. So the
    deployed pass learns detail from real targets although the pair is misaligned. The offset carries no gradient and
    is enlarged to the target's grid, in size and value.

    Args:
        zoomed: [N,3,upscale H,upscale W], of the {X, X} pass.
        offset: [N,2,H,W] in pixels of x, of the {X, Y'} pass on the same crops.
        target: Y, the size of `zoomed`.
        config: kind, weights and border.
        vgg: required if config.needs_vgg.

    Returns:
        scalar, as eq. 6's second term.

    Raises:
        ValueError: as sdan_loss.
    """
    check_floating("transfer_loss, target", target)
    check_floating("transfer_loss, offset", offset)
    field = enlarge_offset(offset.detach().float(), _size_ratio(target, offset))
    # Bicubic: bilinear sampling between pixels would blur the output and so teach it to over-sharpen.
    moved = sample(zoomed, field, mode="bicubic")
    return _target_loss(moved, target, offset_mask(field), config, vgg)[0]


def _target_loss(
    image: Tensor, target: Tensor, mask: Tensor, config: LossConfig, vgg: FeatureNetwork | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(weighted sum of the configured terms, LossTerms.parts)."""
    parts = {}
    if config.pixel_weight > 0:
        parts["pixel"] = _masked_mean(image, target, mask, config.border_px, config)
    if config.halo_weight > 0:
        parts["halo"] = _halo(image, target, mask, config)
    if config.needs_features:
        inside = _inside(image, target, config.border_px, config)
        parts |= _feature_terms(image[inside].float(), target[inside].float(), mask[inside].float(), config, vgg)
    total = torch.stack([getattr(config, f"{name}_weight") * part for name, part in parts.items()]).sum()
    return total, parts if parts.keys() != {"pixel"} else {}


def _halo(image: Tensor, target: Tensor, mask: Tensor, config: LossConfig) -> Tensor:
    """The mean distance from the range of the target's values in the window around each pixel; 0 inside the range."""
    inside = _inside(image, target, config.border_px, config)
    side = 2 * HALO_REACH_PX + 1
    most = F.max_pool2d(target[inside].float(), side, stride=1, padding=HALO_REACH_PX)
    least = -F.max_pool2d(-target[inside].float(), side, stride=1, padding=HALO_REACH_PX)
    shown = image[inside].float()
    return ((F.relu(shown - most) + F.relu(least - shown)) * mask[inside]).mean()


def _feature_terms(
    image: Tensor, target: Tensor, mask: Tensor, config: LossConfig, vgg: FeatureNetwork | None
) -> dict[str, Tensor]:
    """Name -> unweighted feature term, of cropped pictures.

    The mask, area-averaged to each feature map's size, weights the points of the perceptual term and of ST-LPIPS and,
    in CX and CoBi, the target's points; any point of the image may be a match.
    """
    terms = {}
    with torch.autocast(image.device.type, enabled=False):
        if config.cobi_rgb_weight > 0:
            patches = [patch_points(picture, mask, config.cobi_patch_px) for picture in (image, target)]
            terms["cobi_rgb"] = contextual_loss(*patches, spatial_weight=config.cobi_spatial_weight)
        if config.st_lpips_weight > 0:
            terms["st_lpips"] = st_lpips.st_lpips_on(image.device)(image, target, mask).mean()
        if config.needs_vgg:
            terms |= _vgg_terms(image, target, mask, config, vgg)
    return terms


def _vgg_terms(
    image: Tensor, target: Tensor, mask: Tensor, config: LossConfig, vgg: FeatureNetwork | None
) -> dict[str, Tensor]:
    if vgg is None:
        raise ValueError(
            "vgg: expected a feature network for this loss, got None; pass feature_network(load_features())"
        )
    maps, terms = vgg(image), {}
    with torch.no_grad():
        target_maps = vgg(target)
    if config.perceptual_weight > 0:
        terms["perceptual"] = _perceptual(maps, target_maps, mask)
    for name, spatial_weight in (("contextual", 0.0), ("cobi_vgg", config.cobi_spatial_weight)):
        if getattr(config, f"{name}_weight") > 0:
            terms[name] = _contextual(maps, target_maps, mask, spatial_weight)
    return terms


def _perceptual(maps: dict[str, Tensor], target_maps: dict[str, Tensor], mask: Tensor) -> Tensor:
    """mean((Psi(image) - Psi(target))^2 M), over the whole map as in eq. 6."""
    terms = []
    for layer, weight in PERCEPTUAL_LAYERS.items():
        shrunk = F.interpolate(mask, size=maps[layer].shape[-2:], mode="area")
        terms.append(weight * ((maps[layer] - target_maps[layer]).square() * shrunk).mean())
    return torch.stack(terms).sum()


def _contextual(maps: dict[str, Tensor], target_maps: dict[str, Tensor], mask: Tensor, spatial_weight: float) -> Tensor:
    """CX (spatial_weight 0) or CoBi between feature maps, summed over the layers."""
    terms = []
    for layer, weight in CONTEXTUAL_LAYERS.items():
        points, target_points = map_points(maps[layer], mask), map_points(target_maps[layer], mask)
        terms.append(weight * contextual_loss(points, target_points, spatial_weight=spatial_weight))
    return torch.stack(terms).sum()


def _masked_mean(image: Tensor, target: Tensor, mask: Tensor, border: int, config: LossConfig) -> Tensor:
    inside = _inside(image, target, border, config)
    difference = image[inside].float() - target[inside].float()
    distance = difference.abs() if config.kind == "l1" else torch.sqrt(difference.square() + config.epsilon**2)
    return (distance * mask[inside]).mean()


def _inside(image: Tensor, target: Tensor, border: int, config: LossConfig) -> tuple[Any, ...]:
    """The index that crops the border; checks that both images have the same size, and what is left of the target."""
    if image.shape != target.shape:
        raise ValueError(f"loss: expected images of one size, got {tuple(image.shape)} and {tuple(target.shape)}")
    height, width = image.shape[-2:]
    if 2 * border >= min(height, width):
        raise ValueError(
            f"border_px={config.border_px}: expected to leave some of {height}x{width} pixels, "
            f"got {border} cropped from each side; set a smaller loss.border_px or a larger crop"
        )
    inside = (..., slice(border, height - border), slice(border, width - border))
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        check_pixels("loss, target", target[inside])
    return inside


def _enlarge_mask(mask: Tensor, factor: int) -> Tensor:
    return mask if factor == 1 else F.interpolate(mask, scale_factor=factor, mode="nearest")


def _size_ratio(fine: Tensor, coarse: Tensor) -> int:
    """Side of `fine` over side of `coarse`, a whole number."""
    factor = fine.shape[-1] // max(coarse.shape[-1], 1)
    if factor < 1 or tuple(factor * side for side in coarse.shape[-2:]) != tuple(fine.shape[-2:]):
        raise ValueError(f"size: expected a multiple of {tuple(coarse.shape[-2:])}, got {tuple(fine.shape[-2:])}")
    return factor
