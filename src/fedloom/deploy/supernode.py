"""Flower's SuperNode, which looks for messages twice a second.

Flower's own waits three seconds after every look that found nothing (a constant in its loop), which would be most of a round: every
round has two messages, one for training and one for scoring. Where a later Flower has another loop, this does nothing, and rounds
take longer.

Run by its path, so that neither torch nor the rest of fedloom is imported.
"""

import time
from types import SimpleNamespace

from flwr.supernode import start_client_internal as loop
from flwr.supernode.cli.flower_supernode import flower_supernode

POLL_S = 0.5


def quick_sleep(seconds: float) -> None:
    """Sleep for so long, but not longer than a look is worth waiting for."""
    time.sleep(min(seconds, POLL_S))


if __name__ == "__main__":
    loop.time = SimpleNamespace(sleep=quick_sleep)  # type: ignore
    flower_supernode()
