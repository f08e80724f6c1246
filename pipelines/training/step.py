"""One training step: learning rate, loss, gradients, optimizer, averaged weights; and the state a checkpoint keeps.

`train_step` is the step: it writes the learning rate to the device, and `device_step` does the rest there. `Training`
is everything that they change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.config import ExperimentConfig, TrainConfig
from pipelines.loader import Inputs
from pipelines.training.adversary import Adversary
from pipelines.training.graph import GraphedStep, check_graph
from pipelines.training.optimizer_state import restore_state, step_if, stored_state
from sdan import checkpoint
from sdan.baselines import Network
from sdan.losses import LossConfig, sdan_loss, self_reference_loss, transfer_loss
from sdan.network import SDAN, SDANOutput
from sdan.offsets.known_shift import known_shift_loss, moved_reference
from sdan.ops.precision import ComputePlan, compute_plan
from sdan.perceptual.features import FeatureNetwork, feature_network
from sdan.resample import low_pass


class NotFiniteError(RuntimeError):
    """Losses or gradients that stay NaN or infinite."""


def learning_rate(step: int, epoch: float, config: TrainConfig) -> float:
    """Cosine annealing with warm restarts (periods T0, 2 T0, 4 T0, ... epochs) after a linear warm-up.

    Args:
        step: optimizer steps so far; the warm-up is counted in steps.
        epoch: crops seen so far by all workers, in epochs.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    period = float(config.restart_epochs)
    while epoch >= period:
        epoch, period = epoch - period, 2 * period
    swing = 0.5 * (1 + math.cos(math.pi * epoch / period))
    return config.learning_rate_floor + (config.learning_rate - config.learning_rate_floor) * swing


def training_loss(
    model: nn.Module,
    inputs: Inputs,
    config: LossConfig,
    vgg: FeatureNetwork | None = None,
    adversary: Adversary | None = None,
) -> dict[str, Tensor]:
    """Eq. 6 with Y' as reference and, if self_reference_weight > 0, with the input's own rendering, as deployed.

    Both kinds of samples share one forward pass. Self-reference samples are compared with the camera JPG of the input's
    own frame and, through the offsets of the first kind, with the target (losses.transfer_loss). With
    loss.self_target=truth (simulated data) they are compared with the ideal picture by eq. 6. With known_shift_weight
    > 0 the offset learner also gets the input's own picture, moved by a known field that it must find. With an
    `adversary` the zoomed picture of the first pass must also pass for its target.

    Returns:
        scalar tensors: `loss`, the weighted sum, and its terms by name.
    """
    references = [inputs.oracle_reference] if config.reference_weight > 0 else []
    references += [inputs.self_reference] if config.self_reference_weight > 0 else []
    count = len(references)
    both = model(torch.cat([inputs.x] * count), torch.cat(references), torch.cat([inputs.rendering] * count))
    outputs = [SDANOutput(*parts) for parts in zip(*(part.chunk(count) for part in both), strict=True)]
    terms: dict[str, Tensor] = {}
    total: Tensor | float = 0.0
    if config.reference_weight > 0:
        oracle = sdan_loss(outputs[0], inputs.oracle_reference, inputs.target, config, vgg)
        terms |= {"align": oracle.align, "zoom": oracle.zoom, **oracle.parts}
        total = total + config.reference_weight * oracle.total
    if config.self_reference_weight > 0:
        own = _deployed_loss(outputs, inputs, config, vgg)
        terms |= own
        total = total + config.self_reference_weight * sum(own.values())
    if config.known_shift_weight > 0:
        terms["known_shift"] = _known_shift(model, inputs, config)
        total = total + config.known_shift_weight * terms["known_shift"]
    if adversary is not None:
        wanted = inputs.target if config.reference_weight > 0 else inputs.truth
        assert wanted is not None  # by LossConfig: without reference samples the target is the truth
        terms["adversarial"] = adversary.term(outputs[0].zoomed, wanted)
        total = total + config.adversarial_weight * terms["adversarial"]
    return {"loss": torch.as_tensor(total), **terms}


def _deployed_loss(
    outputs: list[SDANOutput], inputs: Inputs, config: LossConfig, vgg: FeatureNetwork | None
) -> dict[str, Tensor]:
    """The loss terms of the self-reference samples, the last of `outputs`."""
    alone = outputs[-1]
    if config.self_target == "truth":
        assert inputs.truth is not None  # CropStream(truth=True) provides it or raises
        shrink = inputs.truth.shape[-1] // alone.aligned.shape[-1]
        return {"self": sdan_loss(alone, low_pass(inputs.truth, shrink), inputs.truth, config, vgg).total}
    own = self_reference_loss(alone, inputs.camera, config).total
    return {"self": own, "transfer": transfer_loss(alone.zoomed, outputs[0].offset, inputs.target, config, vgg)}


def _known_shift(model: nn.Module, inputs: Inputs, config: LossConfig) -> Tensor:
    """The error of the offsets to the input's own picture, moved by a known field; pixels of x."""
    assert inputs.motion is not None  # CropStream(max_shift_px=...) provides it
    # Around DDP's forward, which has run already in this step: its hooks are on the weights' gradients.
    network = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(network, SDAN)
    moved, known = moved_reference(inputs.camera, inputs.motion, inputs.camera.shape[-1] // inputs.x.shape[-1])
    border = -(-config.border_px * inputs.x.shape[-1] // inputs.target.shape[-1])
    return known_shift_loss(network.offset_to(inputs.x, moved), known, border)


@dataclass
class Training:
    """Everything that a step changes and that a checkpoint must hold."""

    model: Network
    wrapped: nn.Module
    """`model`, inside DDP if there are several workers; steps run through it."""
    averaged: Network
    """Exponential moving average of the weights: what is validated and saved."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    plan: ComputePlan
    """Precision, layout and TF32 of the step."""
    rate: Tensor
    """The optimizer's learning rate, a float32 scalar on the device."""
    new_share: Tensor
    """Share of the new weights in the average, 1 - decay: a float32 scalar on the device."""
    skipped_in_a_row: Tensor
    """Number of consecutive steps, up to the last, without a finite loss and gradient; counted on the device."""
    vgg: FeatureNetwork | None = None
    """The feature network of perceptual losses; not part of the checkpoint."""
    adversary: Adversary | None = None
    """The discriminator, with loss.adversarial_weight."""
    graph: GraphedStep | None = None
    """`device_step` as a CUDA graph, with train.cuda_graph."""
    step: int = 0
    """Optimizer steps so far, skipped ones included."""
    crops: int = 0
    """Position in the stream of crops: the number that all workers together have seen."""

    def set_schedule(self, rate: float, config: TrainConfig) -> None:
        """Write what changes with the step's number to the device, where `device_step` reads it."""
        # The decay starts small, so that the initial weights do not dominate the average of a short run.
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step)) if config.ema_decay else 0.0
        self.rate.fill_(rate)
        self.new_share.fill_(1 - decay)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for `restore`; the averaged weights are saved as the checkpoint's model."""
        return {
            "model": self.model.state_dict(),
            "optimizer": stored_state(self.optimizer, self.rate),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "crops": self.crops,
        } | ({"adversary": self.adversary.state()} if self.adversary is not None else {})

    def restore(self, folder: Path) -> None:
        """Restore the averaged weights, raw weights, optimizer, step and position from a checkpoint folder."""
        stored = checkpoint.load(folder)
        state = checkpoint.load_trainer_state(folder)
        self.averaged.load_state_dict(stored.model.state_dict())
        self.model.load_state_dict(state["model"])
        restore_state(self.optimizer, state["optimizer"], self.rate, capturable=self.graph is not None)
        if self.graph is not None:
            self.graph.forget()
        if self.adversary is not None:
            self.adversary.restore(state["adversary"])
        if state["scaler"]:  # empty if the run computed without fp16 so far
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.crops = int(state["step"]), int(state["crops"])

    def check_finite(self, config: TrainConfig) -> None:
        """Raise NotFiniteError after train.max_skipped consecutive skipped steps; checks every max_skipped steps."""
        if self.step % config.max_skipped != 0:
            return  # the check waits for the device
        overflows = self.scaler.is_enabled() and self.scaler.get_scale() < 1
        if int(self.skipped_in_a_row) >= config.max_skipped or overflows:
            raise NotFiniteError(not_finite(f"{config.max_skipped} steps in a row"))


def not_finite(what: str) -> str:
    """The message for `what`, e.g. "20 steps in a row"."""
    return (
        f"loss: expected a finite loss and gradient, got NaN or infinity in {what}; "
        "lower train.learning_rate, set train.grad_clip=1, or use train.precision=fp32"
    )


def start(
    config: ExperimentConfig,
    init_from: str | None,
    device: torch.device,
    wrap: Callable[[nn.Module], nn.Module],
    vgg: Mapping[str, Tensor] | None = None,
) -> Training:
    """A new model (or one with the weights of the checkpoint folder `init_from`) with its optimizer.

    Args:
        wrap: wraps the model for training (DDP if there are several workers).
        vgg: features.load_features' weights, for a loss that needs them.
    """
    train = config.train
    plan = plan_of(train, device)
    torch.manual_seed(train.seed)
    architecture = checkpoint.ARCHITECTURES[config.architecture]
    model = architecture(config.model)
    if init_from:
        model.load_state_dict(checkpoint.load(Path(init_from)).model.state_dict())
    model.to(device).to(memory_format=plan.memory_format)
    averaged = architecture(config.model).to(device).to(memory_format=plan.memory_format)
    averaged.load_state_dict(model.state_dict())
    rate = torch.tensor(train.learning_rate, device=device)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=rate, betas=train.betas, fused=True, capturable=train.cuda_graph
    )
    if train.compile:
        model.compile()  # before DDP wraps it, so that the network becomes one graph
    wrapped = wrap(model)
    training = Training(
        model=model,
        wrapped=wrapped,
        averaged=averaged.eval().requires_grad_(False),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=plan.precision == "fp16"),
        plan=plan,
        rate=rate,
        new_share=torch.tensor(1.0, device=device),
        skipped_in_a_row=torch.zeros((), dtype=torch.int32, device=device),
        vgg=feature_network(vgg).to(device) if vgg is not None else None,
        adversary=Adversary(config, device, rate) if config.loss.adversarial_weight > 0 else None,
    )
    if train.cuda_graph:
        workers = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        check_graph(config, device_type=device.type, workers=workers, precision=plan.precision)
        training.graph = GraphedStep(lambda inputs: device_step(training, inputs, config), training.skipped_in_a_row)
    return training


def plan_of(config: TrainConfig, device: torch.device) -> ComputePlan:
    """How a training by this config computes on `device`."""
    return compute_plan(device, config.precision, config.layout, tf32=config.use_tf32)


def train_step(training: Training, inputs: Inputs, config: ExperimentConfig, rate: float) -> dict[str, Tensor]:
    """One optimizer step; all ranks skip it if any rank's loss or gradient is not finite.

    Nothing here waits for the device.

    Returns:
        tensors on the device: the loss terms, `grad_norm` (before clipping) and `skipped`. `skipped` is 1 for a step
        whose loss or gradient was not finite, and 0 when fp16's GradScaler skipped a step to adjust its scale. The
        terms of a skipped step may be NaN.
    """
    training.set_schedule(rate, config.train)
    with training.plan.tf32_flags():
        terms = training.graph(inputs) if training.graph else device_step(training, inputs, config)
    training.step += 1
    return terms


def device_step(training: Training, inputs: Inputs, config: ExperimentConfig) -> dict[str, Tensor]:
    """The part of `train_step` that runs on the device, with the schedule that it finds there.

    It decides there, too, whether to skip the step, and changes tensors of `training` only in place. So a CUDA graph
    can replay it.
    """
    terms = _gradients(training, inputs.parts(config.train.accumulate), config)
    training.scaler.unscale_(training.optimizer)
    limit = config.train.grad_clip or math.inf
    norm = torch.nn.utils.clip_grad_norm_(training.model.parameters(), limit).detach()
    good = norm.isfinite()
    _optimizer_step(training, good)
    training.optimizer.zero_grad(set_to_none=True)
    _average(training, good)
    fault = ~terms["loss"].isfinite() if training.scaler.is_enabled() else ~good
    training.skipped_in_a_row.add_(1).mul_(fault)
    if training.adversary is not None:
        terms |= training.adversary.step(good)
    return {**terms, "grad_norm": norm, "skipped": fault.float()}


def _gradients(training: Training, parts: list[Inputs], config: ExperimentConfig) -> dict[str, Tensor]:
    """Forward and backward of each part; DDP synchronises the gradients once, with the last part.

    Returns:
        loss terms, averaged over the parts.
    """
    means: dict[str, Tensor] = {}
    with training.plan.autocast():  # around all parts, because it casts each weight once until it ends
        for number, part in enumerate(parts, 1):
            with nullcontext() if number == len(parts) else _apart(training.wrapped):
                terms = training_loss(training.wrapped, part, config.loss, training.vgg, training.adversary)
                # DDP exchanges gradients, not losses: a NaN gradient tells the other ranks about an infinite loss.
                poison = torch.where(terms["loss"].detach().isfinite(), 1.0, math.nan)
                with torch.autocast(training.plan.device.type, enabled=False):
                    training.scaler.scale(terms["loss"] * poison / len(parts)).backward()
            for name, term in terms.items():
                means[name] = means.get(name, 0.0) + term.detach() / len(parts)
    return means


def bucket_options(config: TrainConfig) -> dict[str, bool]:
    """DistributedDataParallel's options: gradients are views of its buckets, and the graph is static.

    no_sync (used by train.accumulate > 1) and a static graph exclude each other.
    """
    return {"gradient_as_bucket_view": True, "static_graph": config.accumulate == 1}


def _apart(wrapped: nn.Module) -> AbstractContextManager[Any]:
    """A context without gradient synchronisation; a plain module (one worker) needs none."""
    no_sync: Callable[[], AbstractContextManager[Any]] = getattr(wrapped, "no_sync", nullcontext)  # DDP's
    return no_sync()


def _optimizer_step(training: Training, good: Tensor) -> None:
    """Step the optimizer if `good` (bool scalar on the device) is True."""
    if training.scaler.is_enabled():
        training.scaler.step(training.optimizer)  # skips gradients that unscale_ found not finite
        training.scaler.update()
        return
    step_if(training.optimizer, good)


def _average(training: Training, good: Tensor) -> None:
    """Update the moving average of the weights if `good`."""
    with torch.no_grad():
        ahead = torch._foreach_sub(list(training.model.parameters()), list(training.averaged.parameters()))
        torch._foreach_mul_(ahead, training.new_share * good)
        torch._foreach_add_(list(training.averaged.parameters()), ahead)
