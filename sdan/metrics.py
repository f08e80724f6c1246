"""Metrics of pictures (PSNR, SSIM, LPIPS, ST-LPIPS) and of offsets (end-point error, statistics), one value per image.

Pictures are [N,3,H,W] in [0, 1]; masks [N,1,H,W] (or [N,3,H,W]), 1 where a pixel counts. Scores are means over the
pixels that count; an image without any scores NaN. Arrays that are not floating point tensors, and pictures of another
range such as [0, 255], are refused (ValueError).

To add a metric: write a function here that returns [N], call it in pipelines/scoring/scores.py, and name it in METRICS
of pipelines/evaluate.py, which prints what it names. A metric that needs weights also joins PERCEPTUAL.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdan.ops import offset_mask
from sdan.perceptual.st_lpips import st_lpips_on
from sdan.perceptual.weights import PerceptualError
from sdan.resample import bicubic, enlarge_offset, sample

BACKBONE = "alexnet-owt-7be5be79.pth"
"""The backbone of LPIPS v0.1 (alex): torchvision's AlexNet (IMAGENET1K_V1). The name ends with the first digits of the
file's SHA-256."""


OVERSHOOT = 0.5
"""How far a picture's values may lie outside [0, 1]: networks and bicubic interpolation overshoot at edges, but by less
than a picture of range [-1, 1] or [0, 255] does."""


def check_floating(what: str, values: object) -> None:
    """Refuse everything but a floating point tensor.

    Raises:
        ValueError: names `what` and how to convert it.
    """
    if not isinstance(values, Tensor):
        kind = f"{type(values).__module__}.{type(values).__name__}".removeprefix("builtins.")
        raise ValueError(f"{what}: expected a torch.Tensor, got {kind}; convert it with torch.as_tensor")
    if not values.is_floating_point():
        raise ValueError(
            f"{what}: expected floating point values, got {values.dtype}; convert counts with .float() and divide "
            "pictures of 8 bits by 255"
        )


def _range(values: Tensor) -> tuple[float, float]:
    """(least, largest) value; NaN if there is one among them."""
    lowest, highest = values.aminmax()
    return float(lowest), float(highest)


def check_pixels(what: str, image: object, *, mask: Tensor | None = None, finite: bool = False) -> None:
    """Refuse everything but a floating point picture in [0, 1], give or take OVERSHOOT.

    Args:
        mask: where not 0, pixels count; None: all.
        finite: also refuse NaN. Infinite values are always refused.

    Raises:
        ValueError: names `what` and how to convert it.
    """
    check_floating(what, image)
    assert isinstance(image, Tensor)
    counted = image if mask is None else image[mask.expand_as(image) > 0]
    if counted.numel() == 0:
        return
    lowest, highest = _range(counted.detach())
    if not finite and math.isnan(lowest):  # only then a copy, because losses check every target
        lowest, highest = _range(counted.detach().nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf))
    if not (lowest >= -OVERSHOOT and highest <= 1 + OVERSHOOT):
        raise ValueError(f"{what}: expected values in [0, 1], got {lowest:.4g} to {highest:.4g}; rescale it")


def psnr(image: Tensor, target: Tensor, *, mask: Tensor | None = None, border_px: int = 0) -> Tensor:
    """Peak signal-to-noise ratio, 10 log10(1 / MSE), over all channels.

    Args:
        image, target: [N,3,H,W] in [0, 1].
        mask: pixels that count; None: all.
        border_px: cropped from each side.

    Returns:
        [N] float64, dB; infinite for equal pictures.

    Raises:
        ValueError: sizes that differ, a border that leaves nothing, or values that are not in [0, 1].
    """
    image, target, mask = _pictures("psnr", image, target, mask, border_px)
    error = _mean((image - target).square(), mask)
    return -10 * torch.log10(error)


def ssim(image: Tensor, target: Tensor, *, mask: Tensor | None = None, border_px: int = 0) -> Tensor:
    """Structural similarity (Wang et al. 2004): 11-tap Gaussian, sigma 1.5, K1 = 0.01, K2 = 0.03, mean over channels.

    Only windows inside the picture whose pixels all count are averaged.

    Args, Raises: as psnr; pictures have at least 11x11 pixels inside the border.

    Returns:
        [N] float64, at most 1.
    """
    image, target, mask = _pictures("ssim", image, target, mask, border_px)
    if min(image.shape[-2:]) < 11:
        raise ValueError(f"ssim: expected at least 11x11 pixels inside the border, got {tuple(image.shape[-2:])}")
    mean_a, mean_b = _blurred(image), _blurred(target)
    var_a = _blurred(image.square()) - mean_a.square()
    var_b = _blurred(target.square()) - mean_b.square()
    covariance = _blurred(image * target) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2)
    whole = None if mask is None else -F.max_pool2d(-mask, 11, stride=1)  # minimum over the window
    return _mean(similarity, whole)


def end_point_error(offset: Tensor, true_flow: Tensor, *, mask: Tensor | None = None, border_px: int = 0) -> Tensor:
    """Mean distance between learnt and true displacement, in pixels of their common grid.

    Args:
        offset, true_flow: [N,2,H,W], (dy, dx) with output(p) = input(p + offset(p)).
        mask: [N,1,H,W]; None: all.
        border_px: cropped from each side.

    Returns:
        [N] float64.
    """
    offset, true_flow, mask = _crop("end_point_error", offset, true_flow, mask, border_px)
    return _mean((offset - true_flow).square().sum(1, keepdim=True).sqrt(), mask)


def resized_end_point_error(offset: Tensor, true_flow: Tensor, *, inside: bool = False) -> Tensor:
    """End-point error between offsets and a true flow on grids of different density.

    Args:
        offset: [N,2,h,w], (dy, dx) in pixels of its own grid.
        true_flow: [N,2,H,W] over the same area, (dy, dx) in pixels of its own grid; resized bilinearly to [h,w].
        inside: only where the true flow points inside the image, so that it can be found; NaN if nowhere.

    Returns:
        [N] float64, pixels of `true_flow`'s grid.
    """
    for what, values in (("offset", offset), ("true_flow", true_flow)):
        check_floating(f"resized_end_point_error, {what}", values)
    per_pixel = true_flow.shape[-1] / offset.shape[-1]
    flow = F.interpolate(true_flow.float(), size=offset.shape[-2:], mode="bilinear", align_corners=False)
    mask = offset_mask(flow / per_pixel) if inside else None
    return end_point_error(offset.float() * per_pixel, flow, mask=mask)


def alignment_gain(picture: Tensor, offset: Tensor, target: Tensor, *, border_px: int = 0) -> Tensor:
    """What offsets are worth: PSNR of the bicubic picture moved by them minus PSNR of the same picture unmoved.

    Only alignment can raise it: nothing of the target reaches the moved picture but where its pixels come from. An
    oracle score, in contrast, also rises if the network passes the reference through to its output.

    Args:
        picture: [N,3,h,w] in [0, 1], a picture of the input, e.g. its camera JPG.
        offset: [N,2,H,W], (dy, dx) in pixels of its own grid, over the same area.
        target: [N,3,sh,sw] in [0, 1], as shot.
        border_px: cropped from each side, target pixels.

    Returns:
        [N] float64, dB; NaN for offsets of single points of the window ([N,18,H,W]), which move no picture.
    """
    if offset.shape[1] != 2:
        return torch.full((len(offset),), torch.nan, dtype=torch.float64)
    enlarged = bicubic(picture, target.shape[-1] // picture.shape[-1]).clamp(0, 1)
    moved = sample(enlarged, enlarge_offset(offset.float(), target.shape[-1] // offset.shape[-1]))
    return psnr(moved, target, border_px=border_px) - psnr(enlarged, target, border_px=border_px)


def offset_statistics(offset: Tensor, mask: Tensor, px_per_offset: float) -> dict[str, list[float]]:
    """Statistics of offsets that need no true flow, one value per image.

    Args:
        offset: [N,2,H,W], (dy, dx) in pixels of its own grid.
        mask: [N,1,H,W], 1 where the offset points inside the image.
        px_per_offset: side of an offset pixel in the pixels of the result.

    Returns:
        offset_px, offset_p95_px: mean and 95th percentile of the offsets' length.
        offset_outside: share of offsets that point outside the image.
        offset_roughness: mean length of the difference between neighbouring offsets, pixels per pixel.
    """
    check_floating("offset_statistics, offset", offset)
    offset = offset.float()
    length = px_per_offset * offset.norm(dim=1).flatten(1)
    rough = [offset.diff(dim=axis).norm(dim=1).flatten(1).mean(1) for axis in (2, 3)]
    return {
        "offset_px": length.mean(1).tolist(),
        "offset_p95_px": length.quantile(0.95, dim=1).tolist(),
        "offset_outside": (1 - mask.float()).flatten(1).mean(1).tolist(),
        "offset_roughness": (sum(rough) / 2).tolist(),
    }


def lpips_distance(image: Tensor, target: Tensor) -> Tensor | None:
    """LPIPS v0.1 with AlexNet (Zhang et al. 2018), without mask.

    Nothing is downloaded, and random weights are never used.

    Returns:
        [N] float32, 0 for equal pictures; None if the backbone's weights are missing (see `lpips_unavailable`).
    """
    image, target, _ = _pictures("lpips_distance", image, target, None, 0)
    if lpips_unavailable() is not None:
        return None
    model = _lpips(_backbone_path()).to(image.device)
    with torch.no_grad():
        return model(image.float(), target.float(), normalize=True).flatten()


def lpips_unavailable() -> str | None:
    """None if LPIPS can be computed, else one line that says how to provide its backbone."""
    path = _backbone_path()
    remedy = f"download https://download.pytorch.org/models/{BACKBONE} there, or set SDAN_LPIPS_BACKBONE to its path"
    if not path.is_file():
        return f"LPIPS n/a: {path}: expected AlexNet weights, got none; {remedy}"
    if not _sha256(path, path.stat().st_mtime_ns).startswith(_expected_hash()):
        return (
            f"LPIPS n/a: {path}: expected torchvision's AlexNet, SHA-256 {_expected_hash()}..., got another; {remedy}"
        )
    return None


def st_lpips_distance(image: Tensor, target: Tensor) -> Tensor | None:
    """ST-LPIPS with AlexNet (Ghildyal and Liu 2022), which tolerates small shifts, without mask.

    Args:
        image, target: [N,3,H,W] in [0, 1], at least 21x21 pixels.

    Returns:
        [N] float32, 0 for equal pictures; None if the weights are missing (see `st_lpips_unavailable`).
    """
    image, target, _ = _pictures("st_lpips_distance", image, target, None, 0)
    if st_lpips_unavailable() is not None:
        return None
    with torch.no_grad():
        return st_lpips_on(image.device)(image, target)


def st_lpips_unavailable() -> str | None:
    """None if ST-LPIPS can be computed, else one line that says how to provide its weights."""
    try:
        st_lpips_on(torch.device("cpu"))
    except PerceptualError as error:
        return str(error).replace("ST-LPIPS", "ST-LPIPS n/a", 1)
    return None


PERCEPTUAL: dict[str, tuple[Callable[[Tensor, Tensor], Tensor | None], Callable[[], str | None]]] = {
    "lpips": (lpips_distance, lpips_unavailable),
    "st_lpips": (st_lpips_distance, st_lpips_unavailable),
}
"""The metrics that need weights: name -> the metric, and the reason why it can't be computed."""


def _backbone_path() -> Path:
    given = os.environ.get("SDAN_LPIPS_BACKBONE")
    return Path(given) if given else Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE


def _expected_hash() -> str:
    return BACKBONE.removesuffix(".pth").rsplit("-", 1)[1]


@lru_cache(maxsize=4)
def _sha256(path: Path, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1)
def _lpips(path: Path) -> nn.Module:
    import lpips  # `import sdan` must not need lpips and torchvision

    # pnet_rand=True prevents a download; all backbone weights are replaced below (strict).
    with warnings.catch_warnings(action="ignore"):  # torchvision's, about deprecated arguments in lpips
        model = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    stored = torch.load(path, map_location="cpu", weights_only=True)
    names = model.net.state_dict()  # e.g. slice2.3.weight for torchvision's features.3.weight
    model.net.load_state_dict({name: stored["features." + name.split(".", 1)[1]] for name in names})
    return model.eval().requires_grad_(False)


def _pictures(
    metric: str, image: Tensor, target: Tensor, mask: Tensor | None, border: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `_crop`; also checks the range of the pixels that count."""
    image, target, mask = _crop(metric, image, target, mask, border)
    for what, picture in (("image", image), ("target", target)):
        check_pixels(f"{metric}, {what}", picture, mask=mask)
    return image, target, mask


def _crop(
    metric: str, image: Tensor, target: Tensor, mask: Tensor | None, border: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three without the border, as float64; checks their types and sizes."""
    for what, values in (("image", image), ("target", target)):
        check_floating(f"{metric}, {what}", values)
    if mask is not None and not isinstance(mask, Tensor):
        check_floating(f"{metric}, mask", mask)
    if image.dim() != 4 or image.shape != target.shape:
        raise ValueError(
            f"metric: expected two images [N,C,H,W] of one size, got {tuple(image.shape)} and {tuple(target.shape)}"
        )
    n, _, height, width = image.shape
    if mask is not None and (mask.shape[0], *mask.shape[2:]) != (n, height, width):
        raise ValueError(f"mask: expected [{n},1,{height},{width}], got {tuple(mask.shape)}")
    if border < 0 or 2 * border >= min(height, width):
        raise ValueError(f"border_px: expected 0 to {(min(height, width) - 1) // 2} for {height}x{width}, got {border}")
    inside = (..., slice(border, height - border), slice(border, width - border))
    cropped = None if mask is None else mask[inside].double()
    return image[inside].double(), target[inside].double(), cropped


def _mean(value: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over channels and the pixels that count; NaN if none does."""
    if mask is None:
        return value.mean(dim=(1, 2, 3))
    weight = mask.expand_as(value)
    return torch.where(weight > 0, value * weight, 0).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))


def _blurred(image: Tensor) -> Tensor:
    """The 11-tap Gaussian mean of every window inside the picture: [N,C,H-10,W-10].

    Sums of shifted pictures, which are several times faster on a CPU than depthwise float64 convolutions.
    """
    height, width = image.shape[-2:]
    weights = [math.exp(-((tap - 5) ** 2) / (2 * 1.5**2)) for tap in range(11)]
    rows = torch.zeros_like(image[..., 10:, :])
    for tap, weight in enumerate(weights):
        rows.add_(image[..., tap : height - 10 + tap, :], alpha=weight / sum(weights))
    blurred = torch.zeros_like(rows[..., 10:])
    for tap, weight in enumerate(weights):
        blurred.add_(rows[..., tap : width - 10 + tap], alpha=weight / sum(weights))
    return blurred
