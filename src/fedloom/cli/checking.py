"""The command `fedloom check`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fedloom.cli.words import Parser, output
from fedloom.errors import ConfigError
from fedloom.tools.check import Finding, check_method, methods_in

EXAMPLES = """\
  fedloom check my.py:Mine              one method of your own
  fedloom check my.py                   every method in the file
  fedloom check fedrir scaffold         registered methods
"""
MARKS = {True: "✓", False: "✗", None: "–"}


def check_command(words: Sequence[str]) -> int:
    """Run `fedloom check` and return its exit code, which is 1 if a method breaks a rule."""
    parser = Parser(
        "check", "Check that a method follows the contract, on a tiny federation (takes seconds).", EXAMPLES
    )
    parser.add_argument("words", nargs="*", metavar="METHOD", help="FILE.py, FILE.py:Class, or a registered name")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.read(words)
    if not given.words:
        raise ConfigError("fedloom check: give a method, such as my.py:Mine")
    names = [name for word in given.words for name in methods_in(word)]
    found = {name: check_method(name) for name in names}
    if given.json:
        print(json.dumps({name: [finding._asdict() for finding in every] for name, every in found.items()}, indent=2))
    else:
        for name, every in found.items():
            _show(name, every)
    return int(any(finding.kept is False for every in found.values() for finding in every))


def _show(name: str, findings: Sequence[Finding]) -> None:
    console = output()
    console.print(name)
    for finding in findings:
        console.print(f"  {MARKS[finding.kept]} {finding.rule}", soft_wrap=True)
        if finding.note:
            console.print(f"      {finding.note}", soft_wrap=True)
