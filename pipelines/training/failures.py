"""Which failures of a worker are worth another attempt.

Ray Train (2.60) restarts its workers after any failure, `FailureConfig.max_failures` times. That is right for a process
or machine that was lost, and for what the survivors see of it: a broken connection is a RuntimeError. An error that the
next attempt would meet again, such as a loss that stays NaN or an unreadable shard, must end the run at once.
"""

from __future__ import annotations

from typing import Any

import torch
from ray.exceptions import RayTaskError
from ray.train import UserCallback

from pipelines.training.step import NotFiniteError

WOULD_COME_AGAIN = (
    *(ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError),
    *(NotFiniteError, torch.OutOfMemoryError),
)


class StopWhereRetryingIsVain(UserCallback):
    """Raises a worker's own error in Ray Train's controller, which retries no error of its callbacks."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(cause, WOULD_COME_AGAIN):
                raise cause
