"""Reads the weight files of feature networks; whatever is wrong with one is a single line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


class PerceptualError(ValueError):
    """The weights of a feature network cannot be used; the message is one line that says what to do."""


def read_state_dict(path: Path, origin: str, remedy: str) -> Mapping[str, Tensor]:
    """Read a state dict (.safetensors, else a PyTorch file) onto the CPU; pickled code is never run.

    Args:
        origin: what the message calls the file.
        remedy: what the message advises.

    Raises:
        PerceptualError: no such file, another kind of file, or no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise PerceptualError(f"{origin}: expected weights, got {error.strerror or error}; {remedy}") from error
    except Exception as error:  # the unpickler fails on other files in many ways
        raise PerceptualError(f"{origin}: expected weights, got {first_line(error)}; {remedy}") from error
    if not isinstance(stored, Mapping):
        raise PerceptualError(f"{origin}: expected a state dict, got {type(stored).__name__}; {remedy}")
    return stored


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], network: str) -> None:
    """Check that a state dict holds finite tensors of the expected names and shapes; it may hold more.

    Args:
        network: whose state dict it should be, for the message.

    Raises:
        PerceptualError: names the first tensor that is missing or wrong.
    """
    for name, like in expected.items():
        value = weights.get(name)
        if not isinstance(value, Tensor) or value.shape != like.shape or not value.isfinite().all():
            got = f"{tuple(value.shape)}, or values that are not finite" if isinstance(value, Tensor) else "none"
            raise PerceptualError(f"expected {network} state dict with {name} {tuple(like.shape)}, got {got}")


def first_line(error: Exception) -> str:
    """The error's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]
