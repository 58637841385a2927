"""Flower's SuperNode with three corrections to its loop.

It checks for messages twice a second. Flower's own loop waits a constant three seconds after each check that found nothing. Such waits
would take up most of a round, because each round has two messages, one for training and one for scoring.

If the run of a message ends while the parts of the message are being fetched, the message is dropped together with its task. Flower does
this after all other errors. However, the end of a run raises a `BaseException`, which skips this clean-up. The task then remains without a
message, and blocks the node for ten minutes.

The process exits when the loop ends, for example because the server no longer accepts the node's key. Flower's own process stays alive
without a connection, because a thread of its local server does not end, so the agent would never restart it.

If a later version of Flower has a different loop, the first correction has no effect (rounds take longer), and the test of the second one
fails.

This file is run by its path, so that neither torch nor the rest of fedloom is imported.
"""

import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from flwr.supercore.run import RunNotRunningException
from flwr.supernode import start_client_internal as loop
from flwr.supernode.cli.flower_supernode import flower_supernode

POLL_S = 0.5


def quick_sleep(seconds: float) -> None:
    """Sleep for `seconds`, but at most `POLL_S`."""
    time.sleep(min(seconds, POLL_S))


def cleaning(store: Callable[..., int | None]) -> Callable[..., int | None]:
    """Wrap Flower's `_pull_and_store_message` such that the end of a run during a fetch is an ordinary error."""

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
            raise RuntimeError("the run of this message is over") from over

    return called


if __name__ == "__main__":
    loop.time = SimpleNamespace(sleep=quick_sleep)  # type: ignore
    loop._pull_and_store_message = cleaning(loop._pull_and_store_message)
    flower_supernode()
    sys.stdout.flush()
    os._exit(1)
