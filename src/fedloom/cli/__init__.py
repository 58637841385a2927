"""The command line: `fedloom COMMAND ...`.

One module per command reads its arguments and prints its results; the work is done in `tools`, `experiment` and `report`. Keep imports
inside functions, so that help and completion start without torch.
"""

from fedloom.cli.main import main

__all__ = ["main"]
