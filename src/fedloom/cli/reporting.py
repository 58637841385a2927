"""The command `fedloom report`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.cli.tables import show
from fedloom.cli.words import Parser, new_file, output, plain_and_options, save_picture, save_text, with_suffix
from fedloom.errors import ConfigError
from fedloom.report import (
    RunRecord,
    Waiting,
    generalisation_table,
    paired_table,
    read,
    shared_primary,
    summary_table,
    waiting_table,
    write_page,
)
from fedloom.report.exports import FORMATS, clients_text, summary_text
from fedloom.report.link_speeds import networks
from fedloom.report.primary import Primary

EXAMPLES = """\
  fedloom report runs/digits                           one run, or a comparison's folder; writes report.html there
  fedloom report runs/a runs/b runs/c out=abc.html     write a new file; only report.html is overwritten
  fedloom report runs/digits out=table.tex             the tables as .tex, .md, .csv or .json instead of the page
  fedloom report runs/digits clients=clients.csv plot=curves.pdf
                                                       one row per client, in the same formats; the figures of the page as .svg,
                                                       .pdf or .png: curves.pdf, curves-uplink-and-downlink.pdf and so on
  fedloom report runs/digits baseline=local            differences from Local instead of FedAvg
  fedloom report runs/digits network=4g,lan target=90 slowdown=19
                                                       time to 90 % accuracy (or to rmse 90, in runs that are measured by it)
                                                       over networks, with devices 19 times slower;
                                                       gflops=2 instead of slowdown sets the speed of the device;
                                                       other networks are UP/DOWN/LATENCY: network=2/10/80
"""
if TYPE_CHECKING:
    from fedloom.report.style import Figure

PAGES = ("html", "htm")
PICTURES = ("svg", "pdf", "png")
OPTIONS = ("out", "clients", "plot", "baseline", "network", "target", "slowdown", "gflops")


def report_command(words: Sequence[str]) -> int:
    """Run `fedloom report` and return its exit code."""
    parser = Parser("report", "Write tables and one HTML page from run folders, finished or not.", EXAMPLES, OPTIONS)
    parser.add_argument("words", nargs="*", metavar="RUN", help="a run folder, or a folder of run folders")
    parser.add_argument("--quiet", action="store_true", help="print no tables, only write the page")
    given = parser.read(words)
    folders, options = plain_and_options(given.words, OPTIONS)
    if not folders:
        raise ConfigError("fedloom report: give the folder of a run, such as runs/digits")
    targets = _targets(options, Path(folders[0]) if len(folders) == 1 else Path())
    records = read(folders)
    waiting = _waiting(options, shared_primary(records))
    has_times = any(path.suffix[1:].lower() in (*PAGES, *PICTURES) for path in targets.values())
    if waiting and not has_times and given.quiet:
        raise ConfigError(
            f"network={options['network']}: only the page, the figures and the printed tables show times; remove it"
        )
    figures = _figures(targets["plot"], records, waiting) if "plot" in targets else {}
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
    for key, target in targets.items():
        if key != "plot":
            _write(key, target, records, waiting, options.get("baseline"))
    for target, figure in figures.items():
        save_picture(figure, target, "plot")
    if figures:
        print(f"plot    {', '.join(map(str, figures))}")
    return 0


def _figures(target: Path, records: Sequence[RunRecord], waiting: Waiting | None) -> dict[Path, Figure]:
    """Return all figures of the page by file: `target` for the first one, and files next to it, named by title, for the others.

    Raises:
        ConfigError: a file exists, or there are no figures.
    """
    from fedloom.report.page_figures import named_figures  # matplotlib is an extra

    named = named_figures(records, waiting)
    if not named:
        raise ConfigError(f"plot={target}: the runs have no figures yet")
    first, *others = named
    files = {target: named[first]}
    return files | {new_file(str(target.with_stem(f"{target.stem}-{n}")), "plot"): named[n] for n in others}


def _targets(options: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """Return the files to write, by key. The default is `report.html` in the folder.

    Raises:
        ConfigError: a file exists, has an unsuitable suffix, or is named twice.
    """
    kinds = {"out": (*PAGES, *FORMATS), "clients": tuple(FORMATS), "plot": PICTURES}
    targets = {
        key: with_suffix(new_file(options[key], key, made=key == "out"), key, known)
        for key, known in kinds.items()
        if key in options
    }
    if len({path.resolve() for path in targets.values()}) < len(targets):
        raise ConfigError(f"clients={options['clients']}: is the same file as out; choose another name")
    return targets or {"out": folder / "report.html"}


def _write(key: str, target: Path, records: Sequence[RunRecord], waiting: Waiting | None, baseline: str | None) -> None:
    """Write one file, and print its name."""
    kind = target.suffix[1:].lower()
    if kind in PAGES:
        write_page(records, target, waiting, baseline)
    else:
        text = clients_text(records, kind) if key == "clients" else summary_text(records, kind, baseline)
        target.parent.mkdir(parents=True, exist_ok=True)
        save_text(text, target, key)
    name = "report" if kind in PAGES else "table" if key == "out" else key
    print(f"{name:<7} {target}")


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
    """Return the value of the primary metric that `target=` sets. It is in percent if the metric is shown in percent."""
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
