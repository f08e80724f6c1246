"""One sentence about a checkpoint, and its scores, for MLflow's pages."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import TypedDict

from preprocessing.shard_folder.small_json import read_json
from sdan.checkpoint import DESCRIPTION

SHOWN_SCORES = {"self_aligned_psnr": "aligned", "self_raw_psnr": "raw", "self_true_psnr": "true"}
"""Validation score without its prefix val_ -> the target's name, for descriptions."""


class _Train(TypedDict, total=False):
    epochs: int
    crops_per_epoch: int | None


class _Config(TypedDict, total=False):
    name: str
    train: _Train | None


class _Described(TypedDict, total=False):
    """What is shown of a checkpoint's config.json."""

    config: _Config | None
    scores: dict[str, float | None] | None


def described(folder: Path, shards: str | None) -> tuple[str, dict[str, float]]:
    """(one sentence about a checkpoint for MLflow's pages, its scores by target), from its config.json."""
    stored = read_json(folder / DESCRIPTION, _Described)
    config, scores = stored.get("config") or _Config(), stored.get("scores") or {}
    values = {name: scores.get(f"val_{name}") for name in SHOWN_SCORES}
    known = {name: value for name, value in values.items() if value is not None}
    train = config.get("train") or _Train()
    text = config.get("name", "a model")
    if "epochs" in train:
        crops = f"{train['crops_per_epoch']} crops" if train.get("crops_per_epoch") else "one crop a pair"
        text += f", trained for {train['epochs']} epochs of {crops}"
    if shards:
        text += f" on {shards}"
    if known:
        shown = ", ".join(f"{value:.2f} dB ({SHOWN_SCORES[name]})" for name, value in known.items())
        text += f"; PSNR of the held-out crops, self protocol: {shown}"
    return text, known
