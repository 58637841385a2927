"""The command `fedloom new`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedloom.cli.words import Parser, refuse_empty
from fedloom.errors import ConfigError

EXAMPLES = """\
  fedloom new method my_method              my_method.py, test_my_method.py and my_method.md in this folder
  fedloom new method my_method out=methods  in another folder
"""


def new_command(words: Sequence[str]) -> int:
    """Run `fedloom new` and return its exit code."""
    parser = Parser("new", "Write the files with which a method of your own begins; they run as they are.", EXAMPLES)
    parser.add_argument("what", nargs="?", metavar="method", help="what to write")
    parser.add_argument("name", nargs="?", metavar="NAME", help="its name, in lower case")
    parser.add_argument("out", nargs="?", metavar="out=FOLDER", help="folder of the files; default: this one")
    given = parser.read(words)
    if given.what != "method" or given.name is None:
        raise ConfigError("fedloom new: expected method NAME, such as fedloom new method my_method")
    key, equals, folder = (given.out or "out=.").partition("=")
    if key != "out" or not equals:
        raise ConfigError(f"'{given.out}': expected out=FOLDER")
    refuse_empty({"out": folder})
    from fedloom.tools.new_method import write_method

    for path in write_method(given.name, Path(folder)):
        print(path)
    return 0
