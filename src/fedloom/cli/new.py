"""The command `fedloom new`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedloom.cli.words import Parser, plain_and_options
from fedloom.errors import ConfigError

EXAMPLES = """\
  fedloom new method my_method              my_method.py, test_my_method.py and my_method.md in this folder
  fedloom new method my_method out=methods  in another folder
"""
OPTIONS = ("out",)


def new_command(words: Sequence[str]) -> int:
    """Run `fedloom new` and return its exit code."""
    purpose = "Write the files with which a method of your own begins; they run as they are."
    parser = Parser("new", purpose, EXAMPLES, OPTIONS)
    parser.add_argument(
        "words", nargs="*", metavar="method NAME [out=FOLDER]", help="a name in lower case; default: into this folder"
    )
    plain, options = plain_and_options(parser.read(words).words, OPTIONS)
    if len(plain) < 2 or plain[0] != "method":
        raise ConfigError("fedloom new: expected method NAME, such as fedloom new method my_method")
    if len(plain) > 2:
        raise ConfigError(f"'{plain[2]}': expected out=FOLDER")
    from fedloom.tools.new_method import write_method

    for path in write_method(plain[1], Path(options.get("out", "."))):
        print(path)
    return 0
