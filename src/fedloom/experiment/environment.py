"""The versions and hardware of this process, for a run's records."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pydantic
import torch

from fedloom._version import __version__


def environment() -> dict[str, Any]:
    """Return versions and hardware, for the run's records."""
    return {
        "fedloom": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def software_versions() -> dict[str, Any]:
    """Return the versions on which the results of a run depend, for its manifest.

    `dirty` states whether the package has uncommitted changes.
    """
    commit = _commit()
    return {
        "fedloom": __version__,
        "commit": commit,
        "dirty": None if commit is None else bool(_git("status", "--porcelain", "--", "..")),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "pydantic": pydantic.VERSION,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str | None:
    """Return the commit of the working copy from which this package runs, or None if there is none."""
    # The package may be in a .venv inside another project's working copy.
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    return _git("rev-parse", "HEAD") if tracked else None


def _git(*words: str) -> str | None:
    """Return git's output in this package's folder, or None if git fails."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
