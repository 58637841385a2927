"""`fedloom report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedloom.cli.words import Parser, output
from fedloom.errors import ConfigError, suggest
from fedloom.report import paired_table, read, summary_table, write_page

EXAMPLES = """\
  fedloom report runs/digits                           one run, or a comparison's folder; writes report.html into it
  fedloom report runs/a runs/b runs/c out=abc.html
  fedloom report runs/digits baseline=local            differences to another method than FedAvg
"""
OPTIONS = ("out", "baseline")


def report(words: Sequence[str]) -> int:
    """`fedloom report`."""
    parser = Parser("report", "Tables and one HTML page from the folders of runs, finished or not.", EXAMPLES)
    parser.add_argument("words", nargs="*", metavar="RUN", help="a run's folder, or a folder of such folders")
    parser.add_argument("--quiet", action="store_true", help="no tables; write the page alone")
    given = parser.read(words)
    folders = [word for word in given.words if not _is_option(word)]
    options = dict(word.split("=", 1) for word in given.words if _is_option(word))
    if not folders:
        raise ConfigError("fedloom report: name the folder of a run, such as runs/digits")
    records = read(folders)
    if not given.quiet:
        console = output()
        console.print(summary_table(records))
        paired = paired_table(records, options.get("baseline")) if len(records) > 1 else None
        if paired is not None:
            console.print("", paired, sep="\n")
        console.print()
    target = Path(options.get("out") or (Path(folders[0]) if len(folders) == 1 else Path()) / "report.html")
    write_page(records, target)
    print(f"report  {target}")
    return 0


def _is_option(word: str) -> bool:
    key, equals, _ = word.partition("=")
    if equals and key not in OPTIONS and not Path(word).exists():
        raise ConfigError(f"unknown key '{key}'{suggest(key, OPTIONS)}")
    return bool(equals) and key in OPTIONS
