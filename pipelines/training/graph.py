"""A step as one CUDA graph: recorded once, then replayed with a single launch (`train.cuda_graph`).

A small network's step starts thousands of kernels, and starting them takes longer than running them. A CUDA graph
starts all of them at once, on the memory that they had when they were recorded. So the recorded step reads its batch
from fixed tensors, and changes everything else (weights, moments, average, counter) in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.cluster import Workers
from pipelines.config import ConfigError, ExperimentConfig
from pipelines.loader import Inputs

WARM_UPS = 3
"""Steps before the recording. They choose cuDNN's algorithms, compile kernels and create the optimizer's state."""

CONTEXTUAL_WEIGHTS = ("contextual_weight", "cobi_rgb_weight", "cobi_vgg_weight")
"""The weights of LossConfig's contextual terms."""

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records a function; returns a function that replays it, and the tensor that receives the result of each replay."""


class GraphError(ValueError):
    """A step that cannot be recorded; the message says what to do."""


def check_graph(config: ExperimentConfig, *, device_type: str, workers: Workers, precision: str) -> None:
    """Check what a recorded step needs; does nothing unless train.cuda_graph is set.

    Args:
        device_type: cuda or cpu.
        workers: number of DDP ranks, or (least, most).
        precision: as in TrainConfig; the driver may not know yet what auto becomes.

    Raises:
        ConfigError: several workers, no GPU, fp16, a contextual loss or an adversarial one.
    """
    if not config.train.cuda_graph:
        return
    # The gradient of a contextual term waits for the device, to learn which points were matched.
    contextual = [name for name in CONTEXTUAL_WEIGHTS if getattr(config.loss, name) > 0]
    most = workers[1] if isinstance(workers, tuple) else workers
    needs = {
        "one worker": (most == 1, f"up to {most} workers"),
        "a GPU": (device_type == "cuda", device_type),
        "bf16 or fp32": (precision != "fp16", precision),  # fp16's scaler was not tried inside a graph
        # The discriminator's step was not tried inside a graph.
        "no adversarial loss": (config.loss.adversarial_weight == 0, "loss.adversarial_weight above 0"),
        "no contextual loss": (not contextual, f"loss.{', loss.'.join(contextual)} above 0"),
    }
    for expected, (met, got) in needs.items():
        if not met:
            raise ConfigError(f"train.cuda_graph: expected {expected}, got {got}; --set train.cuda_graph=false")


def record_on_cuda(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Run `run` a few times, then record it as a CUDA graph (`Record`).

    Raises:
        GraphError: something in `run` cannot be recorded, e.g. because it waits for the device.
    """
    stream = torch.cuda.Stream()  # PyTorch can't record its default stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: the thread that fetches batches pins memory meanwhile, which must not end the recording.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        cause = error.__context__ or error  # the end of a failed recording raises a second, more general error
        reason = str(cause).split("\n", 1)[0]
        raise GraphError(
            f"train.cuda_graph: expected a step that can be recorded, got {reason}; --set train.cuda_graph=false"
        ) from error
    return graph.replay, result


class Recording(NamedTuple):
    """A recorded step."""

    inputs: Inputs
    """The tensors that it reads its batch from."""
    replay: Callable[[], None]
    names: tuple[str, ...]
    """The names of its terms."""
    terms: Tensor
    """[len(names)] the terms of the last replay."""


class GraphedStep:
    """Calls `device_step` through a recording of it, made at the first call."""

    def __init__(
        self, device_step: Callable[[Inputs], dict[str, Tensor]], skipped: Tensor, record: Record = record_on_cuda
    ) -> None:
        """Nothing is recorded yet.

        Args:
            device_step: takes a step (step.device_step). It skips batches whose loss is not finite.
            skipped: the one tensor that a skipped step changes.
            record: makes the recording.
        """
        self.device_step, self.skipped, self.record = device_step, skipped, record
        self.recording: Recording | None = None

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        """Take one step; returns what `device_step` returns. A batch of another size is not replayed."""
        self.recording = recording = self.recording or self._record(inputs)
        if _shapes(inputs) != _shapes(recording.inputs):
            return self.device_step(inputs)
        torch._foreach_copy_(_tensors(recording.inputs), _tensors(inputs))
        recording.replay()
        terms = recording.terms.clone()  # the next replay overwrites them
        return dict(zip(recording.names, terms.unbind(), strict=True))

    def forget(self) -> None:
        """Record again at the next call, because tensors that a step changes were replaced."""
        self.recording = None

    def _record(self, inputs: Inputs) -> Recording:
        """Record a step of batches of this size, on targets of NaN.

        Such a step is skipped, so the warm-up leaves the weights and the optimizer as they are.
        """
        copies = {name: tensor.clone() for name, tensor in inputs._asdict().items() if tensor is not None}
        fixed = inputs._replace(**copies)
        for target in (fixed.target, fixed.truth):
            if target is not None:
                target.fill_(math.nan)
        names: list[str] = []

        def run() -> Tensor:
            terms = self.device_step(fixed)
            names[:] = terms
            return torch.stack(list(terms.values()))

        before = self.skipped.clone()
        replay, terms = self.record(run)
        self.skipped.copy_(before)
        return Recording(fixed, replay, tuple(names), terms)


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [tensor for tensor in inputs if tensor is not None]


def _shapes(inputs: Inputs) -> list[torch.Size | None]:
    return [None if tensor is None else tensor.shape for tensor in inputs]
