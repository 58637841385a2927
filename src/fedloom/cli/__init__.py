"""The command line: `fedloom COMMAND ...`.

Each command has one module, which reads arguments and prints results. The commands are implemented in `tools`, `experiment` and `report`.
Keep imports inside functions, so that help and completion start without torch.
"""

from fedloom.cli.main import main

__all__ = ["main"]
