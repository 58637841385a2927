"""Entry point: finds the command, and ends every error in one clear line."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import fedloom
from fedloom.cli.analysing import analyse
from fedloom.cli.benching import bench
from fedloom.cli.checking import check
from fedloom.cli.costing import cost
from fedloom.cli.deploying import deploy
from fedloom.cli.exporting import export
from fedloom.cli.listing import listing
from fedloom.cli.partitioning import partition
from fedloom.cli.reporting import report
from fedloom.cli.running import compare, run
from fedloom.cli.words import Command, Interrupted
from fedloom.errors import ConfigError, UsageError, suggest
from fedloom.tools.error_report import blame, notes

INTERRUPTED, MISUSED, FAILED = 130, 2, 1  # exit codes


class Entry(NamedTuple):
    """A command, and the one line that says what it is for."""

    call: Command
    purpose: str


COMMANDS: Mapping[str, Entry] = MappingProxyType(
    {
        "run": Entry(run, "one experiment: train, score, write a folder"),
        "compare": Entry(compare, "several methods on the same clients, with paired differences"),
        "report": Entry(report, "tables and one HTML page from the folders of runs"),
        "analyse": Entry(analyse, "what generators make, what features hold, how sharp the minimum is"),
        "list": Entry(listing, "methods, datasets, models or engines, and what can be set"),
        "cost": Entry(cost, "what a client's turn takes, and whether a small device can"),
        "export": Entry(export, "a client's model as an ONNX file for a device"),
        "partition": Entry(partition, "deal a data set to clients, look at it, keep it in a file"),
        "deploy": Entry(deploy, "the same on real devices, through Flower"),
        "check": Entry(check, "whether a method of your own keeps the rules"),
        "bench": Entry(bench, "how fast the engines are on this machine"),
    }
)

OVERVIEW = """\
fedloom {version}: personalised and heterogeneous federated learning in PyTorch

usage: fedloom COMMAND ...

{commands}

start with:
  fedloom run method=fedavg rounds=5
  fedloom compare method=local,fedavg,fedrir seed=0,1,2 rounds=20
  fedloom list methods

fedloom COMMAND --help shows examples and every key; --debug shows tracebacks; --version the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 misused, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except SystemExit as leaving:  # argparse ends --help this way
        return leaving.code if isinstance(leaving.code, int) else MISUSED
    except KeyboardInterrupt as interrupt:
        # where it came while a string was executed (as named tuples do), Python would end by the signal after all; this makes it forget
        exec("")
        hint = f"; continue with: {interrupt}" if isinstance(interrupt, Interrupted) else ""
        return _tell(f"interrupted{hint}", INTERRUPTED)
    except UsageError as error:
        if debug:
            traceback.print_exc()
        return _tell(f"error: {error}{_at(error)}", MISUSED)
    except Exception as error:
        if isinstance(error, BrokenPipeError):  # nobody reads our output any more (`fedloom list | head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        if debug:
            traceback.print_exc()
        hint = "" if debug else " [--debug shows the traceback]"
        return _tell(f"error: {blame(error)}{hint}", FAILED)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        commands = "\n".join(f"  {name:<{width}}  {entry.purpose}" for name, entry in COMMANDS.items())
        print(OVERVIEW.format(version=fedloom.__version__, commands=commands))
        return 0
    if words[0] == "--version":
        print(f"fedloom {fedloom.__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise ConfigError(f"'{words[0]}' is not a command{suggest(words[0], COMMANDS)}")
    return COMMANDS[words[0]].call(words[1:])


def _tell(line: str, code: int) -> int:
    print(f"fedloom: {' '.join(line.split())}", file=sys.stderr)
    return code


def _at(error: BaseException) -> str:
    """Which client and round, where the work had begun."""
    found = notes(error)
    return f" ({found[-1]})" if found else ""
