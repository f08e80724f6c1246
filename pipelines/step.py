"""One training step: the loss, the optimizer, the averaged weights, the learning rate, and what a checkpoint keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.config import RunConfig, TrainConfig
from pipelines.loader import Inputs
from sdan import checkpoint
from sdan.losses import LossConfig, sdan_loss, self_reference_loss, transfer_loss
from sdan.network import SDAN, SDANOutput


def learning_rate(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Cosine annealing with warm restarts (periods T0, 2 T0, 4 T0, ... epochs) after a linear warm-up."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    epoch, period = step / steps_per_epoch, float(config.restart_epochs)
    while epoch >= period:
        epoch, period = epoch - period, 2 * period
    swing = 0.5 * (1 + math.cos(math.pi * epoch / period))
    return config.learning_rate_floor + (config.learning_rate - config.learning_rate_floor) * swing


def training_loss(model: nn.Module, inputs: Inputs, config: LossConfig) -> dict[str, Tensor]:
    """Eq. 6 with Y' as reference and, when self_reference_weight > 0, the same crops as a user has them: {X, X}.

    The second half runs in the same forward pass. It has two terms: X' and the low-passed output against the camera
    JPG of the input's own frame (no target), and the output, moved by the offsets that the first half learnt, against
    the target (losses.transfer_loss).
    """
    if config.self_reference_weight == 0:
        output = model(inputs.x, inputs.oracle_reference, inputs.rendering)
        terms = sdan_loss(output, inputs.oracle_reference, inputs.target, config)
        return {"loss": terms.total, "align": terms.align, "zoom": terms.zoom}
    both = model(
        torch.cat((inputs.x, inputs.x)),
        torch.cat((inputs.oracle_reference, inputs.self_reference)),
        torch.cat((inputs.rendering, inputs.rendering)),
    )
    count = len(inputs.x)
    oracle, alone = SDANOutput(*(part[:count] for part in both)), SDANOutput(*(part[count:] for part in both))
    terms = sdan_loss(oracle, inputs.oracle_reference, inputs.target, config)
    own = self_reference_loss(alone, inputs.camera, config)
    moved = transfer_loss(alone.zoomed, oracle.offset, inputs.target, config)
    total = terms.total + config.self_reference_weight * (own.total + moved)
    return {"loss": total, "align": terms.align, "zoom": terms.zoom, "self": own.total, "transfer": moved}


@dataclass
class Training:
    """Everything that a step changes, and that a checkpoint must hold."""

    model: SDAN
    wrapped: nn.Module
    averaged: SDAN
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
        }

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint: averaged weights, raw weights, optimizer, step."""
        stored = checkpoint.load(folder)
        state = checkpoint.load_trainer_state(folder)
        self.averaged.load_state_dict(stored.model.state_dict())
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = int(state["step"])


def start(
    config: RunConfig, init_from: str | None, device: torch.device, wrap: Callable[[nn.Module], nn.Module]
) -> Training:
    """A fresh model (or a copy of `init_from`'s weights) with its optimizer.

    Args:
        wrap: makes the model that steps run through (DDP with several workers).
    """
    torch.manual_seed(config.train.seed)
    model = SDAN(config.model)
    if init_from:
        model.load_state_dict(checkpoint.load(Path(init_from)).model.state_dict())
    averaged = SDAN(config.model)
    averaged.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(
        model.to(device).parameters(), lr=config.train.learning_rate, betas=config.train.betas, fused=True
    )
    wrapped = wrap(model)
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16" and device.type == "cuda")
    return Training(model, wrapped, averaged.to(device).eval().requires_grad_(False), optimizer, scaler)


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The precision asked for: bf16 anywhere, fp16 on CUDA (on a CPU it would only lose)."""
    if config.precision == "bf16" or (config.precision == "fp16" and device.type == "cuda"):
        return torch.autocast(device.type, torch.bfloat16 if config.precision == "bf16" else torch.float16)
    return nullcontext()


def train_step(training: Training, inputs: Inputs, config: RunConfig, rate: float) -> dict[str, Tensor]:
    """One optimizer step; returns the loss terms and the gradient norm, on the device."""
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    with autocast(config.train, inputs.x.device):
        terms = training_loss(training.wrapped, inputs, config.loss)
    training.scaler.scale(terms["loss"]).backward()
    training.scaler.unscale_(training.optimizer)
    limit = config.train.grad_clip or math.inf
    norm = torch.nn.utils.clip_grad_norm_(training.model.parameters(), limit)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.optimizer.zero_grad(set_to_none=True)
    # The average starts as a plain mean, so that short runs are not held back by the initial weights.
    decay = min(config.train.ema_decay, (1 + training.step) / (10 + training.step)) if config.train.ema_decay else 0.0
    with torch.no_grad():
        torch._foreach_lerp_(list(training.averaged.parameters()), list(training.model.parameters()), 1 - decay)
    training.step += 1
    return {**{name: term.detach() for name, term in terms.items()}, "grad_norm": norm.detach()}
