"""The one-line reason that a failed trial or training run shows."""

import pytest

from tuning.trial import reason_of


class Wrapped(Exception):
    def __init__(self, **attributes):
        super().__init__("a wrapper")
        self.__dict__.update(attributes)


CAUSE = ValueError("crop too large\nsecond line")


@pytest.mark.parametrize(
    "error",
    [
        CAUSE,
        Wrapped(cause=CAUSE),
        Wrapped(controller_failure=CAUSE),
        Wrapped(worker_failures={2: OSError("disk full"), 1: CAUSE}),
        Wrapped(worker_failures={0: Wrapped(cause=CAUSE)}),
    ],
)
def test_the_reason_is_the_first_line_of_the_root_cause(error):
    assert reason_of(error) == "ValueError: crop too large"


def test_an_empty_message_still_names_the_error():
    assert reason_of(KeyboardInterrupt()) == "KeyboardInterrupt: no message"
    assert reason_of(Wrapped(worker_failures={}, cause=None)) == "Wrapped: a wrapper"
