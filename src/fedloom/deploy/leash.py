"""`python -P leash.py COMMAND ...`: run COMMAND in this process, and send it SIGTERM when its parent process exits for any reason.

This file is run by its path, so that no heavy package is imported.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def hold() -> None:
    """Make the kernel send SIGTERM to this process when its parent exits (only on Linux; on other systems, this has no effect)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent exited before prctl
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    hold()
    os.execvp(sys.argv[1], sys.argv[1:])
