"""Training steps on random pictures, as this repository and as SDAN's authors compute them; any config and device."""

from collections.abc import Callable
from dataclasses import replace

import torch
from authors_operators import authors_way
from on_gpu.bare_machine import provide_missing
from torch import nn

provide_missing()

from pipelines.config import ExperimentConfig  # noqa: E402
from pipelines.loader import Inputs, model_inputs  # noqa: E402
from pipelines.training import step  # noqa: E402

RATE = 1e-4
"""Learning rate of the steps."""


def synthetic_inputs(config: ExperimentConfig, batch: int, device: torch.device, seed: int = 0) -> Inputs:
    """Smooth random pictures with the sizes of the config's crops."""
    random = torch.Generator().manual_seed(seed)
    packed, mosaic = config.train.crop_px, 2 * config.train.crop_px

    def enlarged(side: int) -> torch.Tensor:
        return nn.functional.interpolate(coarse, size=side, mode="bicubic").clamp(0, 1)

    coarse = torch.rand(batch, 3, max(mosaic // 2, 1), max(mosaic // 2, 1), generator=random)
    low, high = (255 * enlarged(mosaic)).byte(), (255 * enlarged(mosaic * config.model.scale)).byte()
    red, green, blue = enlarged(packed).unbind(1)
    crops = {"lr_raw": torch.stack((red, green, green, blue), 1), "lr_render": low, "lr_rgb": low, "hr_rgb": high}
    if config.loss.self_target == "truth":
        crops["true_rgb"] = high
    return model_inputs(crops, config.model, device)


def our_step(config: ExperimentConfig, batch: int, device: torch.device) -> Callable[[], object]:
    """A training step that can be called repeatedly."""
    config = replace(config, train=replace(config.train, batch_per_worker=batch))
    training, inputs = step.start(config, None, device, lambda model: model), synthetic_inputs(config, batch, device)
    return lambda: step.train_step(training, inputs, config, RATE)


def authors_step(config: ExperimentConfig, batch: int, device: torch.device) -> Callable[[], object]:
    """The same step with torchvision's operator and explicit attention, in float32 and contiguous."""
    plain = replace(config, train=replace(config.train, layout="contiguous", precision="fp32"))
    ours = our_step(plain, batch, device)

    def run() -> None:
        with authors_way():
            ours()

    return run
