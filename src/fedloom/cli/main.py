"""Entry point: finds the command, and ends every error in one clear line."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from fedloom._version import __version__
from fedloom.cli.words import Command, Interrupted
from fedloom.errors import ConfigError, UsageError, suggest
from fedloom.lazy import resolve
from fedloom.tools.error_report import notes, one_line

INTERRUPTED, MISUSED, FAILED = 130, 2, 1  # exit codes


class Entry(NamedTuple):
    """Where a command's function is (it is imported when the command is called), and one line on what it is for."""

    origin: str
    purpose: str


COMMANDS: Mapping[str, Entry] = MappingProxyType(
    {
        "run": Entry("fedloom.cli.running:run_command", "one experiment: train, score, write a folder"),
        "compare": Entry(
            "fedloom.cli.running:compare_command", "several methods on the same clients, with paired differences"
        ),
        "report": Entry("fedloom.cli.reporting:report_command", "tables and one HTML page from the folders of runs"),
        "analyse": Entry(
            "fedloom.cli.analysing:analyse_command",
            "what generators make, what features hold, how sharp the minimum is",
        ),
        "list": Entry("fedloom.cli.listing:list_command", "methods, datasets, models or engines, and what can be set"),
        "cost": Entry("fedloom.cli.costing:cost_command", "what a client's turn takes, and whether a small device can"),
        "export": Entry("fedloom.cli.exporting:export_command", "a client's model as an ONNX file for a device"),
        "partition": Entry(
            "fedloom.cli.partitioning:partition_command", "deal a data set to clients, look at it, keep it in a file"
        ),
        "deploy": Entry("fedloom.cli.deploying:deploy_command", "the same on real devices, through Flower"),
        "check": Entry("fedloom.cli.checking:check_command", "whether a method of your own keeps the rules"),
        "bench": Entry("fedloom.cli.benching:bench_command", "how fast the engines are on this machine"),
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
    for stream in (sys.stdout, sys.stderr):  # a character that a stream cannot show must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if "_ARGCOMPLETE" in os.environ:
        from fedloom.cli.completing import complete

        complete({name: entry.origin for name, entry in COMMANDS.items()})
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
        return _tell(f"error: {one_line(error)}{hint}", FAILED)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        commands = "\n".join(f"  {name:<{width}}  {entry.purpose}" for name, entry in COMMANDS.items())
        print(OVERVIEW.format(version=__version__, commands=commands))
        return 0
    if words[0] == "--version":
        print(f"fedloom {__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise ConfigError(f"'{words[0]}' is not a command{suggest(words[0], COMMANDS)}")
    call: Command = resolve(COMMANDS[words[0]].origin)
    return call(words[1:])


def _tell(line: str, code: int) -> int:
    print(f"fedloom: {' '.join(line.split())}", file=sys.stderr)
    return code


def _at(error: BaseException) -> str:
    """Which client and round, where the work had begun."""
    found = notes(error)
    return f" ({found[-1]})" if found else ""
