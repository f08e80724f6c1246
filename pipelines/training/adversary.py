"""The second network of adversarial training (loss.adversarial_weight): the discriminator with its own optimizer.

Each step trains the generator against the discriminator as it is, and then the discriminator on the same pictures.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.config import ExperimentConfig
from pipelines.training.optimizer_state import restore_state, step_if, stored_state
from sdan.adversarial import Discriminator, discriminator_loss, generator_loss


class Adversary:
    """The discriminator of one worker; all workers hold the same weights.

    Args:
        config: gives the pictures' size, the border, the kind of loss, and Adam's betas.
        rate: the generator's learning rate, a scalar on the device, which the discriminator shares.
    """

    def __init__(self, config: ExperimentConfig, device: torch.device, rate: Tensor) -> None:
        self.kind, self.border_px, self.rate = config.loss.adversarial_kind, config.loss.border_px, rate
        self.network = Discriminator(config.discriminator_px).to(device)
        betas = config.train.betas
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=rate, betas=betas, fused=True)
        self.pictures: tuple[Tensor, Tensor] | None = None
        """(enlarged, real) of the step at hand, without gradients."""

    def term(self, zoomed: Tensor, target: Tensor) -> Tensor:
        """The generator's term; the discriminator gets no gradient from it.

        Args:
            zoomed, target: [N,3,H,W]; the loss's border is cropped from both.
        """
        enlarged, real = self._inside(zoomed).float(), self._inside(target).float()
        self.pictures = enlarged.detach(), real.detach()
        self.network.requires_grad_(False)
        with torch.no_grad():
            of_real = self.network(real)
        loss = generator_loss(self.network(enlarged), of_real, self.kind)
        self.network.requires_grad_(True)
        return loss

    def step(self, good: Tensor) -> dict[str, Tensor]:
        """Train the discriminator on the pictures of the last `term`, if `good` (bool scalar on the device).

        A step whose gradient is not finite is skipped, on all workers alike.

        Returns:
            {"discriminator": its loss}
        """
        assert self.pictures is not None
        enlarged, real = self.pictures
        loss = discriminator_loss(self.network(enlarged), self.network(real), self.kind)
        loss.backward()
        gradients = [each.grad for each in self.network.parameters() if each.grad is not None]
        if dist.is_initialized() and dist.get_world_size() > 1:
            _average(gradients)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), math.inf)
        step_if(self.optimizer, good & norm.isfinite())
        self.optimizer.zero_grad(set_to_none=True)
        self.pictures = None
        return {"discriminator": loss.detach()}

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for `restore`."""
        return {"network": self.network.state_dict(), "optimizer": stored_state(self.optimizer, self.rate)}

    def restore(self, stored: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.network.load_state_dict(stored["network"])
        restore_state(self.optimizer, stored["optimizer"], self.rate)

    def _inside(self, picture: Tensor) -> Tensor:
        border = self.border_px
        return picture[..., border : picture.shape[-2] - border, border : picture.shape[-1] - border]


def _average(gradients: list[Tensor]) -> None:
    """Replace each gradient by its mean over the workers."""
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for gradient, mean in zip(gradients, together.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
