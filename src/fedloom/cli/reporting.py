"""`fedloom report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedloom.cli.tables import show
from fedloom.cli.words import Parser, new_file, output, refuse_empty
from fedloom.errors import ConfigError, suggest
from fedloom.report import Waiting, paired_table, read, summary_table, waiting_table, write_page
from fedloom.report.link_speeds import networks

EXAMPLES = """\
  fedloom report runs/digits                           one run, or a comparison's folder; writes report.html into it
  fedloom report runs/a runs/b runs/c out=abc.html     a new file; only report.html is replaced
  fedloom report runs/digits baseline=local            differences to another method than FedAvg
  fedloom report runs/digits network=4g,lan target=90 slowdown=19
                                                       time to 90 % on networks, for devices that compute 19 times as long;
                                                       gflops=2 in place of slowdown divides the counted operations;
                                                       own networks are UP/DOWN/LATENCY: network=2/10/80
"""
OPTIONS = ("out", "baseline", "network", "target", "slowdown", "gflops")


def report_command(words: Sequence[str]) -> int:
    """`fedloom report`."""
    parser = Parser("report", "Tables and one HTML page from the folders of runs, finished or not.", EXAMPLES)
    parser.add_argument("words", nargs="*", metavar="RUN", help="a run's folder, or a folder of such folders")
    parser.add_argument("--quiet", action="store_true", help="no tables; write the page alone")
    given = parser.read(words)
    folders = [word for word in given.words if not _is_option(word)]
    options = dict(word.split("=", 1) for word in given.words if _is_option(word))
    if not folders:
        raise ConfigError("fedloom report: name the folder of a run, such as runs/digits")
    refuse_empty(options)
    beside = Path(folders[0]) if len(folders) == 1 else Path()
    target = _page(options["out"]) if "out" in options else beside / "report.html"
    waiting = _waiting(options)
    records = read(folders)
    if not given.quiet:
        console = output()
        show(console, summary_table(records))
        paired = paired_table(records, options.get("baseline")) if len(records) > 1 else None
        if paired is not None:
            console.print()
            show(console, paired)
        if waiting is not None:
            console.print()
            show(console, waiting_table(records, waiting))
        console.print()
    write_page(records, target, waiting, options.get("baseline"))
    print(f"report  {target}")
    return 0


def _page(name: str) -> Path:
    """The file that `out=` names. Raises ConfigError if it is no HTML page."""
    page = new_file(name, "out", made=True)
    if page.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"out={name}: the report is an HTML page; name it {page.stem}.html")
    return page


def _waiting(options: Mapping[str, str]) -> Waiting | None:
    if "network" not in options:
        alone = next((key for key in ("target", "slowdown", "gflops") if key in options), None)
        if alone:
            raise ConfigError(f"{alone}={options[alone]}: needs a network, such as network=4g")
        return None
    target = _number("target", options["target"], 100) / 100 if "target" in options else None
    if "slowdown" in options and "gflops" in options:
        raise ConfigError(
            f"gflops={options['gflops']}: slowdown={options['slowdown']} tells the device's speed already"
        )
    gflops = _number("gflops", options["gflops"]) if "gflops" in options else None
    return Waiting(networks(options["network"]), _number("slowdown", options.get("slowdown", "1")), gflops, target)


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
