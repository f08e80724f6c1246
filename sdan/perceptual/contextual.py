"""The contextual loss (CX) and its bilateral form (CoBi): how well each target point is matched somewhere in an image.

CX (Mechrez et al. 2018), between N image points x_i and M target points y_j, both centred by the targets' mean:

    d_ij  = 1 - cos(x_i, y_j)
    A_ij  = softmax over j of -d_ij / (h (min_k d_ik + 1e-5))
    CX    = mean over j of max over i of A_ij,          loss = -log CX

CoBi (Zhang et al. 2019) adds w_s |p_i - p_j| to d_ij, so that distant matches cost more; p are the points' positions
as fractions of the picture. A is never stored whole: its rows are computed block by block, and again for the gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

BANDWIDTH = 0.5
"""h, as in both papers' code."""
EPSILON = 1e-5
"""Added to the row's smallest distance to avoid division by zero."""
BLOCK_ELEMENTS = 1 << 20
"""Entries of A in memory at a time."""
GRID = 64
"""Maximum number of points along each side of a picture, so that A has at most 4096 x 4096 entries."""


class Points(NamedTuple):
    """The features of a picture on a regular grid."""

    features: Tensor
    """[B,N,C]"""
    positions: Tensor
    """[N,2] row and column as fractions of the picture, 0 to 1."""
    weight: Tensor
    """[B,N] mean of the mask over each point's area, 0 to 1."""


def patch_points(image: Tensor, mask: Tensor, patch_px: int) -> Points:
    """Use RGB patches as features, on a grid of at most GRID x GRID points.

    Args:
        image: [B,3,H,W].
        mask: [B,1,H,W], 1 where a pixel counts.
        patch_px: side of a patch, pixels.
    """
    height, width = image.shape[-2:]
    step = _stride(max(height, width) - patch_px + 1)
    rows, cols = _centred(height - patch_px + 1, step), _centred(width - patch_px + 1, step)
    window = (..., slice(rows[0], None), slice(cols[0], None))
    features = F.unfold(image[window], patch_px, stride=step).transpose(1, 2)
    weight = F.avg_pool2d(mask[window], patch_px, stride=step).flatten(1)
    return Points(features, _grid(rows, cols, height, width, image), weight)


def map_points(features: Tensor, mask: Tensor) -> Points:
    """Subsample a network's feature map to a grid of at most GRID x GRID points.

    Args:
        features: [B,C,h,w].
        mask: [B,1,H,W] on the picture's grid.
    """
    height, width = features.shape[-2:]
    step = _stride(max(height, width))
    rows, cols = _centred(height, step), _centred(width, step)
    chosen = (..., slice(rows[0], None, step), slice(cols[0], None, step))
    weight = F.interpolate(mask, size=(height, width), mode="area")[chosen].flatten(1)
    return Points(features[chosen].flatten(2).transpose(1, 2), _grid(rows, cols, height, width, features), weight)


def contextual_loss(points: Points, target: Points, *, spatial_weight: float = 0.0) -> Tensor:
    """Compute -log CX of each picture, averaged over the batch; CoBi if `spatial_weight` > 0.

    The mean over target points is weighted. A picture whose target weights are all 0 adds 0.

    Args:
        points: of the output; its weight is ignored, since any of its points may be a match.
        target: of the target, on the same grid.
        spatial_weight: w_s, 0.1 in the CoBi paper.

    Returns:
        scalar, at least 0, in float32 (float64 for float64 features), even under autocast.

    Raises:
        ValueError: point sets of different sizes.
    """
    if points.features.shape != target.features.shape:
        raise ValueError(
            f"contextual loss: expected {tuple(target.features.shape)} points, the target's, "
            f"got {tuple(points.features.shape)}"
        )
    with torch.autocast(points.features.device.type, enabled=False):
        dtype = torch.promote_types(points.features.dtype, torch.float32)
        y = target.features.to(dtype)
        centre = y.mean(1, keepdim=True)
        x = F.normalize(points.features.to(dtype) - centre, dim=2)
        y = F.normalize(y - centre, dim=2)
        positions, weight = spatial_weight * target.positions.to(dtype), target.weight.to(dtype)
        losses = []
        for image in range(x.shape[0]):
            best = _BestMatch.apply(x[image], y[image], positions)
            share = weight[image] / weight[image].sum().clamp(min=1e-6)
            missed = (share * (1 - best)).sum()  # 1 - CX; 0 if all weights are 0
            losses.append(-torch.log1p(-missed))
        return torch.stack(losses).mean()


class _BestMatch(torch.autograd.Function):
    """max over i of A_ij for every j, holding one block of A's rows at a time."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, y_MC: Tensor, positions_M2: Tensor) -> Tensor:
        best = torch.full_like(y_MC[:, 0], -1.0)
        chosen = torch.zeros(len(y_MC), dtype=torch.long, device=x_NC.device)
        for rows in torch.arange(len(x_NC), device=x_NC.device).split(_block_rows(y_MC)):
            value, row = _affinity(x_NC, y_MC, positions_M2, rows).similarity.max(0)
            chosen = torch.where(value > best, rows[row], chosen)
            best = torch.maximum(value, best)
        ctx.save_for_backward(x_NC, y_MC, positions_M2, chosen)
        return best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_best_M: Tensor) -> tuple[Tensor | None, ...]:
        x, y, positions, chosen = ctx.saved_tensors
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grad_y = torch.zeros_like(y) if ctx.needs_input_grad[1] else None
        with torch.autocast(x.device.type, enabled=False):
            for rows in chosen.unique().split(_block_rows(y)):  # sorted; other rows have no gradient
                grad_d = _distance_gradient(_affinity(x, y, positions, rows), rows, chosen, grad_best_M)
                if grad_x is not None:
                    grad_x[rows] = -grad_d @ y
                if grad_y is not None:
                    grad_y -= grad_d.T @ x[rows]
        return grad_x, grad_y, None


class _Block(NamedTuple):
    """Some rows of d and A."""

    distance: Tensor
    """[rows,M] d."""
    smallest: Tensor
    """[rows,1] min over j of d."""
    nearest: Tensor
    """[rows,1] argmin over j of d."""
    similarity: Tensor
    """[rows,M] A."""


def _affinity(x_NC: Tensor, y_MC: Tensor, positions_M2: Tensor, rows: Tensor) -> _Block:
    distance = (1 - x_NC[rows] @ y_MC.T).clamp_(min=0)  # rounding may give 1 - cos < 0
    # Use no matrix product, so that the distance of a position from itself is exactly 0.
    distance += torch.cdist(positions_M2[rows], positions_M2, compute_mode="donot_use_mm_for_euclid_dist")
    smallest, nearest = distance.min(1, keepdim=True)
    return _Block(distance, smallest, nearest, torch.softmax(distance / (-BANDWIDTH * (smallest + EPSILON)), dim=1))


def _distance_gradient(block: _Block, rows: Tensor, chosen_M: Tensor, grad_best_M: Tensor) -> Tensor:
    """d loss / d distance [rows,M], from the gradient of each column's maximum."""
    owner = torch.searchsorted(rows, chosen_M).clamp_(max=len(rows) - 1)
    grad = torch.where(rows[owner] == chosen_M, grad_best_M, 0.0)
    upstream = torch.zeros_like(block.distance).scatter_(0, owner[None], grad[None])
    grad_logit = block.similarity * (upstream - (upstream * block.similarity).sum(1, keepdim=True))
    scale = BANDWIDTH * (block.smallest + EPSILON)
    grad_smallest = (grad_logit * block.distance).sum(1, keepdim=True) * BANDWIDTH / scale.square()
    return (grad_logit / -scale).scatter_add_(1, block.nearest, grad_smallest)


def _block_rows(y_MC: Tensor) -> int:
    return max(1, BLOCK_ELEMENTS // len(y_MC))


def _stride(side: int) -> int:
    """The step that limits a side to GRID points. It is odd, so that the points sample every pixel-shuffle phase."""
    return -(-side // GRID) | 1


def _centred(side: int, step: int) -> list[int]:
    """Every step-th index of 0 ... side - 1, with equal margins at both ends."""
    return list(range((side - 1) % step // 2, side, step))


def _grid(rows: list[int], cols: list[int], height: int, width: int, like: Tensor) -> Tensor:
    """[N,2] positions of a grid's points as fractions of the picture, on the device of `like`."""
    positions = torch.cartesian_prod(torch.tensor(rows) / height, torch.tensor(cols) / width)
    return positions.to(like.device)
