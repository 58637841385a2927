"""What all commands share: a parser that raises instead of exiting, `[CONFIG.toml] [key=value ...]`, and consoles."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fedloom.errors import ConfigError, suggest
from fedloom.methods import CLASSES

if TYPE_CHECKING:
    from rich.console import Console

    from fedloom.config.settings import Values

Command = Callable[[Sequence[str]], int]
WIDE = 140  # columns of a table that goes into a file or a pipe


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after a run had its folder; the text is the command that continues it."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are ConfigErrors, and whose options and words may be mixed."""

    def __init__(self, command: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"fedloom {command}",
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The words as a namespace."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in words:
            option = word.partition("=")[0]
            if option.startswith("--") and option not in known:
                raise ConfigError(f"{self.prog} has no option {option}{suggest(option, [*known, '--debug'])}")
        given = self.parse_intermixed_args(words)
        for action in self._actions:
            if action.option_strings and getattr(given, action.dest, None) == "":  # a shell's variable that was not set
                raise ConfigError(f"{self.prog}: {action.option_strings[0]} must not be empty")
        return given

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def settings_words(parser: Parser) -> None:
    """Declare `[CONFIG.toml] [key=value ...]`."""
    parser.add_argument(
        "words", nargs="*", metavar="[CONFIG.toml] key=value", help="a config file, and settings over it"
    )


def read_values(words: Sequence[str]) -> Values:
    """The tables that a config file and `key=value` words describe."""
    from fedloom.config.parsing import from_words, read_toml

    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"'{files[1]}': only one config file can be given, and '{files[0]}' is there already")
    for file in files:
        if Path(file).suffix != ".toml" and not Path(file).is_file():
            hint = f"; did you mean method={file}?" if file in CLASSES else ""
            raise ConfigError(f"'{file}': expected key=value, such as rounds=20, or a config file{hint}")
    values = read_toml(files[0]) if files else {}
    return from_words([word for word in words if "=" in word], values)


def output() -> Console:
    """Where results go: standard output, with room for wide tables when it is no terminal."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    return console


def default_words(value: Any) -> str:
    """A default as one would type it; "" where there is none."""
    if value is None or value == ():
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def refuse_empty(options: Mapping[str, str]) -> None:
    """Raise ConfigError for a word such as `out=`, which is no wish for the default: its variable in a shell may be unset."""
    for key, text in options.items():
        if not text:
            raise ConfigError(f"{key}=: must not be empty")


def new_file(value: str, key: str, made: bool = False) -> Path:
    """The file that a word asks for, before there is any work: a new one, since nobody's file is overwritten.

    `made`: whether a missing folder will be made.

    Raises:
        ConfigError: no name, something that is there already, or no folder to put it in.
    """
    refuse_empty({key: value})
    path = Path(value)
    if path.exists():
        reason = "it is a folder" if path.is_dir() else "it is there already; choose another name"
        raise ConfigError(f"{key}={value}: cannot be written, {reason}")
    if not (made or path.parent.is_dir()):
        raise ConfigError(f"{key}={value}: cannot be written, there is no folder {path.parent}")
    return path


def new_picture(value: str, key: str) -> Path:
    """`new_file` for a picture, in a format that can be drawn."""
    from fedloom.report.style import Figure  # matplotlib is an extra

    path, known = new_file(value, key), Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ConfigError(f"{key}={value}: must end in one of {', '.join(f'.{kind}' for kind in known)}")
    return path


def save_picture(figure: Any, target: Path, key: str) -> None:
    """Write a matplotlib figure in one step; a target that cannot be written is a mistake in the word `key`."""
    draft = target.with_name(f".{target.stem}.tmp{target.suffix}")
    try:
        figure.savefig(draft)
        draft.replace(target)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={target}: {str(error).splitlines()[0]}") from None
    finally:
        draft.unlink(missing_ok=True)
