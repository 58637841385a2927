"""The command line: `fedloom COMMAND ...`. It parses arguments and prints results; other packages do the work."""

from fedloom.cli.main import main

__all__ = ["main"]
