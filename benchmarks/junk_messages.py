"""Measure the cost of refusing nine kinds of junk messages on the server.

    python benchmarks/junk_messages.py [MIB]

The benchmark measures CPU time and additional peak memory for messages of MIB mebibytes (default 1), each in a new process. It uses the
limits of an answer about one client, and those of an answer about 4,096 clients, for which the limits of fields are decisive.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from pathlib import Path

from fedloom.deploy.limits import limits
from fedloom.deploy.messages import open_envelope
from fedloom.errors import WireError

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/unit"))
from test_messages import JUNK, envelope


def measure(kind: str, size: int, members: int) -> str:
    """Return the cost of one message in words."""
    data = envelope(JUNK[kind](size))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        open_envelope(data, limits(members))
        raise SystemExit(f"{kind}: accepted")
    except WireError:
        seconds = time.process_time() - started
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return f"{1000 * seconds:.0f} ms, {more / 1024:.0f} MiB"


def main() -> None:
    """Print one row per kind."""
    size = int(float(sys.argv[1] if len(sys.argv) > 1 else 1) * 2**20)
    for kind in JUNK:
        cells = []
        for members in (1, 4096):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                cells.append(pool.apply(measure, (kind, size, members)))
        print(f"| {kind} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
