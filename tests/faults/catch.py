"""Apply the faults of `seeded.py` one at a time to a copy of the repository, and report which test catches each fault.

    python tests/faults/catch.py caught.json                  # all that are not in caught.json yet
    python tests/faults/catch.py caught.json "momentum"       # those whose names contain a word, again
    python tests/faults/catch.py --nearest caught.json        # without the whole suite if the nearest tests pass
    python tests/faults/catch.py --table before.json after.json

The nearest tests run first. The whole suite runs only if these pass. The exit code is 1 if a fault was not caught.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from seeded import AREAS, ROOT, Area, Fault, found, sources

LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs")
LIMIT_S = {"nearest": 600, "suite": 3600}
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?::[^\s]+)", re.MULTILINE)


class Caught(NamedTuple):
    """The test that caught a fault ("" for none), the tests among which it was found, and the time in seconds."""

    test: str
    among: str
    seconds: float


def run(copy: Path, among: str, words: list[str]) -> str:
    """Return the first test that fails in the copy, or "" if all tests pass."""
    environment = os.environ | {
        "PYTHONPATH": str(copy / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",  # two faults of one length within a second would share a .pyc
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *words]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT_S[among], check=False
        )
    except subprocess.TimeoutExpired:
        return f"(none ended within {LIMIT_S[among]} s)"
    if done.returncode == 0:
        return ""
    failed = FAILED.search(done.stdout)
    if done.returncode != 1 or not failed:
        raise SystemExit(f"pytest {' '.join(words)} could not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[1]


def catch(copy: Path, area: Area, fault: Fault, only_nearest: bool) -> Caught:
    """Apply one fault to the copy, run tests until one fails, and undo the fault."""
    (file,) = found(fault, sources(copy))
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    started, chosen = time.monotonic(), ["-m", "not slow and not deploy"]
    tries = {"nearest": [*area.tests, "-k", fault.only], "suite": ["tests"]}
    if only_nearest:
        del tries["suite"]
    try:
        found_by = ((run(copy, among, [*chosen, *words]), among) for among, words in tries.items())
        test, among = next((pair for pair in found_by if pair[0]), ("", "all"))
        return Caught(test, among, round(time.monotonic() - started, 1))
    finally:
        file.write_text(text, encoding="utf-8")


def every() -> Iterator[tuple[Area, Fault]]:
    """Yield all faults."""
    return ((area, fault) for area in AREAS for fault in area.faults)


def table(files: list[Path]) -> str:
    """Return the results of some runs side by side, as Markdown."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    lines = ["| fault | " + " | ".join(f"{file.stem}: caught by | s" for file in files) + " |"]
    lines.append("|---" * (1 + 2 * len(files)) + "|")
    for _, fault in every():
        cells = [fault.name]
        for result in results:
            test, _, seconds = result.get(fault.name, ("not run", "", ""))
            cells += [f"`{test.rpartition('/')[2]}`" if test else "**nothing**", str(seconds)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run the requested command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the results that lie in FILES")
    parser.add_argument("--nearest", action="store_true", help="run the nearest tests alone")
    parser.add_argument("results", type=Path, help="where results are kept")
    parser.add_argument("words", nargs="*", help="words in the names of the faults to run again")
    options = parser.parse_args()
    if options.table:
        print(table([options.results, *map(Path, options.words)]))
        return 0
    known = json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        for area, fault in every():
            if any(word in fault.name for word in options.words) or not (options.words or fault.name in known):
                known[fault.name] = caught = catch(copy, area, fault, options.nearest)
                options.results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
                print(f"{caught.seconds:7.1f} s  {fault.name}: {caught.test or 'NOT CAUGHT'}", flush=True)
    return int(any(not test for test, *_ in known.values()))


if __name__ == "__main__":
    sys.exit(main())
