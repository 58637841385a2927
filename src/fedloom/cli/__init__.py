"""The command line: `fedloom COMMAND ...`. It reads words and prints results; the work is done elsewhere."""

from fedloom.cli.main import main

__all__ = ["main"]
