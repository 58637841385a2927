"""`python -P leash.py COMMAND ...`: becomes COMMAND, and ends when the process that started it ends, however that ends.

Run by its path, so that nothing heavy is imported on the way.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def hold() -> None:
    """End this process when its parent ends (Linux; elsewhere nothing happens)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended in between
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    hold()
    os.execvp(sys.argv[1], sys.argv[1:])
