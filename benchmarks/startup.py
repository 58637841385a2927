"""Measure the start-up of Python, torch, fedloom and its light commands, in CPU seconds and as ratios to `import torch`.

python benchmarks/startup.py [REPETITIONS]      default 7, alternating; the minimum of each is shown
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

CLI = (sys.executable, "-c", "import sys; from fedloom.cli import main; sys.exit(main())")
LINES = ("fedloom li", "fedloom run method=fedr", "fedloom run part")  # lines that the shell completes
BASE = "import torch"
STARTS: Mapping[str, Sequence[str]] = {
    "python": (sys.executable, "-c", "pass"),
    BASE: (sys.executable, "-c", BASE),
    "import fedloom": (sys.executable, "-c", "import fedloom"),
    "from fedloom import FedRIR, run": (sys.executable, "-c", "from fedloom import FedRIR, run"),
    **{f"fedloom {words}": (*CLI, *words.split()) for words in (
        "--help", "--version", "list methods", "list methods fedrir", "list datasets", "list models", "run --help",
    )},
    **{f"completion of '{line}'": CLI for line in LINES},
}  # fmt: skip


def environment(name: str) -> dict[str, str]:
    """Return the environment that the shell sets for a completion."""
    if not name.startswith("completion"):
        return dict(os.environ)
    line = name.split("'")[1]
    return {
        **os.environ, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\v", "_ARGCOMPLETE_STDOUT_FILENAME": os.devnull,
        "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9",
    }  # fmt: skip


def cpu_seconds(name: str) -> float:
    """Return the user and system time of one start."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        STARTS[name], check=True, env=environment(name), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def loads_torch(name: str) -> bool:
    """Return whether Python reports an import of torch."""
    command = [STARTS[name][0], "-X", "importtime", *STARTS[name][1:]]
    done = subprocess.run(command, check=True, env=environment(name), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return any(line.rpartition(b"|")[2].strip() == b"torch" for line in done.stderr.splitlines())


def main(words: Sequence[str]) -> None:
    """Print the table, followed by the same numbers as JSON."""
    repetitions = int(words[0]) if words else 7
    times: dict[str, list[float]] = {name: [] for name in STARTS}
    for _ in range(repetitions):
        for name, found in times.items():
            found.append(cpu_seconds(name))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("start", "CPU s", f"times {BASE}", "torch"):
        table.add_column(header, justify="left" if header == "start" else "right")
    rows = {}
    for name, found in times.items():
        least, ratio, torch = min(found), min(found) / min(times[BASE]), loads_torch(name)
        rows[name] = {"cpu_seconds": round(least, 3), "ratio": round(ratio, 3), "torch": torch}
        table.add_row(name, f"{least:.2f}", f"{ratio:.2f}", "loaded" if torch else "–")
    Console(highlight=False).print(table)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
