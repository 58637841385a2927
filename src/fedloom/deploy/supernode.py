"""Flower's SuperNode, with two things mended in its loop.

It looks for messages twice a second. Flower's own waits three seconds after every look that found nothing (a constant), which would be most
of a round: every round has two messages, one for training and one for scoring.

A message whose run ends while its parts are being fetched is dropped with its task. Flower's own does so after every other error, yet says
that a run is over by a `BaseException`, which passes its cleaning up: the task stayed, without a message, and kept the node for
ten minutes.

Where a later Flower has another loop, the first does nothing (rounds take longer), and the second shows in its test.

Run by its path, so that neither torch nor the rest of fedloom is imported.
"""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from flwr.supercore.run import RunNotRunningException
from flwr.supernode import start_client_internal as loop
from flwr.supernode.cli.flower_supernode import flower_supernode

POLL_S = 0.5


def quick_sleep(seconds: float) -> None:
    """Sleep for so long, but not longer than a look is worth waiting for."""
    time.sleep(min(seconds, POLL_S))


def cleaning(store: Callable[..., int | None]) -> Callable[..., int | None]:
    """Flower's `_pull_and_store_message`, to which the end of a run while it fetches is an error as any other."""

    def stored(*, pull_object: Callable[..., Any], confirm_message_received: Callable[..., Any], **rest: Any) -> Any:
        return store(
            pull_object=_failing(pull_object), confirm_message_received=_failing(confirm_message_received), **rest
        )

    return stored


def _failing(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any) -> Any:
        try:
            return call(*args)
        except RunNotRunningException as over:
            raise RuntimeError("its run is over") from over

    return called


if __name__ == "__main__":
    loop.time = SimpleNamespace(sleep=quick_sleep)  # type: ignore
    loop._pull_and_store_message = cleaning(loop._pull_and_store_message)
    flower_supernode()
