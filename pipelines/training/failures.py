"""Which failures of a worker end the run at once, and which are retried.

Ray Train (2.60) restarts its workers after any failure, up to `FailureConfig.max_failures` times. That is right for a
lost process or machine, and for the RuntimeError (a broken connection) that the other workers then see. An error that
would occur again after a restart, such as a loss that stays NaN or an unreadable shard, ends the run.
"""

from __future__ import annotations

from typing import Any

import torch
from ray.exceptions import RayTaskError
from ray.train import UserCallback

from pipelines.training.step import NotFiniteError

PERMANENT: tuple[type[Exception], ...] = (
    *(ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError),
    *(NotFiniteError, torch.OutOfMemoryError),
)
"""A restart would meet these errors again."""


class StopOnPermanentError(UserCallback):
    """Re-raises a worker's permanent error in Ray Train's controller, which does not retry errors of its callbacks."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(cause, PERMANENT):
                raise cause
