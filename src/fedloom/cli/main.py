"""The entry point, which runs the command and reports every error in one line."""

from __future__ import annotations

import errno
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

LONG_WORD, LONG_LINE = 240, 1600  # in characters; longer ones are shortened in messages
INTERRUPTED, TERMINATED, MISUSED, FAILED = 130, 143, 2, 1  # exit codes


class Entry(NamedTuple):
    """The import path of a command's function, which is imported when the command runs, and the purpose of the command in one line."""

    origin: str
    purpose: str


COMMANDS: Mapping[str, Entry] = MappingProxyType(
    {
        "run": Entry("fedloom.cli.running:run_command", "train and evaluate one experiment, and write its folder"),
        "compare": Entry(
            "fedloom.cli.running:compare_command",
            "compare several methods on the same clients, with paired differences",
        ),
        "tune": Entry(
            "fedloom.cli.tuning:tune_command",
            "choose hyper-parameters of several methods on validation examples, at equal cost",
        ),
        "demo": Entry(
            "fedloom.cli.running:demo_command", "compare the three methods with simpler ones, on embedded data"
        ),
        "report": Entry("fedloom.cli.reporting:report_command", "write tables and one HTML page from run folders"),
        "analyse": Entry(
            "fedloom.cli.analysing:analyse_command",
            "analyse generated images, features and the sharpness of the minimum",
        ),
        "verify": Entry(
            "fedloom.cli.verifying:verify_command", "check that run folders hold exactly what their runs wrote"
        ),
        "list": Entry(
            "fedloom.cli.listing:list_command",
            "list methods, data sets, models, engines, transforms or rules, with their options",
        ),
        "schema": Entry("fedloom.cli.schema:schema_command", "print the JSON schema of config files, for editors"),
        "cost": Entry(
            "fedloom.cli.costing:cost_command", "measure a client's local update, and check if it fits a small device"
        ),
        "preprocess": Entry(
            "fedloom.cli.preprocessing:preprocess_command",
            "write how the values of your own file become model inputs, before any run",
        ),
        "predict": Entry("fedloom.cli.predicting:predict_command", "predict new files with a model of a run"),
        "export": Entry("fedloom.cli.exporting:export_command", "export a client's model as an ONNX file for a device"),
        "partition": Entry(
            "fedloom.cli.partitioning:partition_command",
            "split a data set across clients, show the partition, save it to a file",
        ),
        "deploy": Entry("fedloom.cli.deploying:deploy_command", "run a method on real devices with Flower"),
        "new": Entry("fedloom.cli.new:new_command", "write the files with which a method of your own begins"),
        "check": Entry("fedloom.cli.checking:check_command", "check that your own method follows the contract"),
        "bench": Entry("fedloom.cli.benching:bench_command", "compare the speed of the engines on this machine"),
    }
)

OVERVIEW = """\
fedloom {version}: personalised and heterogeneous federated learning in PyTorch

usage: fedloom COMMAND ...

{commands}

start with:
  fedloom demo
  fedloom run method=fedavg rounds=5
  fedloom compare method=local,fedavg,fedrir seed=0,1,2 rounds=20
  fedloom list methods

fedloom COMMAND --help shows examples and all keys; --debug shows tracebacks; --version shows the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    The exit codes are 0 for success, 1 for failure, 2 for a usage error, 4 if there were only invalid uplinks, 130 if interrupted, and 143
    if ended by SIGTERM. `fedloom verify` returns 3 if a folder was damaged or edited.
    """
    for stream in (sys.stdout, sys.stderr):  # an unprintable character must not abort a run
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
    except SystemExit as leaving:  # argparse exits in this way after --help
        return leaving.code if isinstance(leaving.code, int) else MISUSED
    except KeyboardInterrupt as interrupt:
        # If Ctrl-C arrives inside `exec` (as in named tuples), Python later exits with the signal although it was caught. The next line
        # prevents this.
        exec("")
        hint = f"; continue with: {interrupt}" if isinstance(interrupt, Interrupted) else ""
        if isinstance(interrupt, Interrupted) and interrupt.by_sigterm:
            return _tell(f"ended by SIGTERM{hint}", TERMINATED)
        return _tell(f"interrupted{hint}", INTERRUPTED)
    except UsageError as error:
        if debug:
            traceback.print_exc()
        return _tell(f"error: {error}{_at(error)}", error.exit_code)
    except Exception as error:
        if isinstance(error, BrokenPipeError):  # the reader closed the pipe (`fedloom list | head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return _tell(f"error: {error.filename}: the name of a file or folder is too long", MISUSED)
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
        from fedloom.cli.mistakes import command_instead

        right = command_instead(words)
        hint = f"; write {right}" if right else suggest(words[0], COMMANDS)
        raise ConfigError(f"'{words[0]}' is not a command{hint}")
    call: Command = resolve(COMMANDS[words[0]].origin)
    return call(words[1:])


def _tell(line: str, code: int) -> int:
    words = [word if len(word) <= LONG_WORD else f"{word[:60]}…{word[-30:]}" for word in line.split()]
    text = " ".join(words)
    text = text if len(text) <= LONG_LINE else f"{text[:300]} … {text[-LONG_LINE // 2 :]}"  # the remedy is at the end
    print(f"fedloom: {text}", file=sys.stderr)
    return code


def _at(error: BaseException) -> str:
    """Return the client and round of the error, if they are known."""
    found = notes(error)
    return f" ({found[-1]})" if found else ""
