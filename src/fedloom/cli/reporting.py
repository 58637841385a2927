"""The command `fedloom report`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedloom.cli.tables import show
from fedloom.cli.words import Parser, new_file, output, refuse_empty
from fedloom.errors import ConfigError, suggest
from fedloom.report import (
    Waiting,
    generalisation_table,
    paired_table,
    read,
    shared_primary,
    summary_table,
    waiting_table,
    write_page,
)
from fedloom.report.link_speeds import networks
from fedloom.report.primary import Primary

EXAMPLES = """\
  fedloom report runs/digits                           one run, or a comparison's folder; writes report.html there
  fedloom report runs/a runs/b runs/c out=abc.html     write a new file; only report.html is overwritten
  fedloom report runs/digits baseline=local            differences from Local instead of FedAvg
  fedloom report runs/digits network=4g,lan target=90 slowdown=19
                                                       time to 90 % accuracy (or to rmse 90, in runs that are measured by it)
                                                       over networks, with devices 19 times slower;
                                                       gflops=2 instead of slowdown sets the speed of the device;
                                                       other networks are UP/DOWN/LATENCY: network=2/10/80
"""
OPTIONS = ("out", "baseline", "network", "target", "slowdown", "gflops")


def report_command(words: Sequence[str]) -> int:
    """Run `fedloom report` and return its exit code."""
    parser = Parser("report", "Write tables and one HTML page from run folders, finished or not.", EXAMPLES, OPTIONS)
    parser.add_argument("words", nargs="*", metavar="RUN", help="a run folder, or a folder of run folders")
    parser.add_argument("--quiet", action="store_true", help="print no tables, only write the page")
    given = parser.read(words)
    folders = [word for word in given.words if not _is_option(word)]
    options = dict(word.split("=", 1) for word in given.words if _is_option(word))
    if not folders:
        raise ConfigError("fedloom report: give the folder of a run, such as runs/digits")
    refuse_empty(options)
    folder = Path(folders[0]) if len(folders) == 1 else Path()
    target = _page(options["out"]) if "out" in options else folder / "report.html"
    records = read(folders)
    waiting = _waiting(options, shared_primary(records))
    if not given.quiet:
        console = output()
        show(console, summary_table(records))
        paired = paired_table(records, options.get("baseline")) if len(records) > 1 else None
        further = [paired, generalisation_table(records), waiting_table(records, waiting) if waiting else None]
        for table in further:
            if table is not None:
                console.print()
                show(console, table)
        console.print()
    write_page(records, target, waiting, options.get("baseline"))
    print(f"report  {target}")
    return 0


def _page(name: str) -> Path:
    """Return the file given by `out=`. Raise ConfigError if it is not an HTML page."""
    page = new_file(name, "out", made=True)
    if page.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"out={name}: must be an HTML page, such as {page.stem}.html")
    return page


def _waiting(options: Mapping[str, str], primary: Primary) -> Waiting | None:
    if "network" not in options:
        alone = next((key for key in ("target", "slowdown", "gflops") if key in options), None)
        if alone:
            raise ConfigError(f"{alone}={options[alone]}: needs a network, such as network=4g")
        return None
    target = _target(options["target"], primary) if "target" in options else None
    if "slowdown" in options and "gflops" in options:
        raise ConfigError(f"gflops={options['gflops']}: conflicts with slowdown={options['slowdown']}; use one of them")
    gflops = _number("gflops", options["gflops"]) if "gflops" in options else None
    return Waiting(networks(options["network"]), _number("slowdown", options.get("slowdown", "1")), gflops, target)


def _target(text: str, primary: Primary) -> float:
    """Return the value of the primary metric given by `target=`: in percent if the metric is shown in percent."""
    if primary.percent:
        return _number("target", text, 100) / 100
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"target={text}: must be a number (a value of {primary.name})")
    return value


def _number(key: str, text: str, most: float = float("inf")) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= most or value == float("inf"):
        raise ConfigError(f"{key}={text}: must be a number above 0" + (f" and at most {most:g}" if most < 1e9 else ""))
    return value


def _is_option(word: str) -> bool:
    key, equals, _ = word.partition("=")
    if equals and key not in OPTIONS and not Path(word).exists():
        raise ConfigError(f"unknown key '{key}'{suggest(key, OPTIONS)}")
    return bool(equals) and key in OPTIONS
