"""Code that all commands share: the argument parser, `[CONFIG.toml] [key=value ...]`, output files, and the console."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fedloom.errors import ConfigError, first_line, suggest

if TYPE_CHECKING:
    from rich.console import Console

    from fedloom.config.settings import Values

Command = Callable[[Sequence[str]], int]
WIDE = 140  # width of output to a file or a pipe, in characters


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM was received after the run folder was created. The message is the command that continues the run."""

    by_sigterm = False


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError instead of exiting. Options and other arguments may be mixed.

    `keys` contains the keys that the command accepts as `key=value`, or None if these are the settings of a run.
    """

    def __init__(
        self, command: str, description: str, examples: str, keys: Collection[str] | None = frozenset()
    ) -> None:
        self.keys = keys
        super().__init__(
            prog=f"fedloom {command}",
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse arguments into a namespace."""
        known = [option for action in self._actions for option in action.option_strings]
        for place, word in enumerate(words):
            option = word.partition("=")[0]
            if option.startswith("--") and option not in known:
                key = self._key(option)
                hint = suggest(option, [*known, "--debug"])
                if key and not (key != option[2:] and "did you mean" in hint):
                    hint = f"; write {self._setting(key, _value(words[place:]))}"
                raise ConfigError(f"{self.prog} has no option {option}{hint}")
        given = self.parse_intermixed_args(words)
        for action in self._actions:
            if action.option_strings and getattr(given, action.dest, None) == "":  # perhaps an unset shell variable
                raise ConfigError(f"{self.prog}: {action.option_strings[0]} must not be empty")
        return given

    def _key(self, option: str) -> str:
        """Return the key if it was written as an option, such as `rounds` for `--rounds`, or ""."""
        word = option.removeprefix("--")
        if self.keys is not None:
            return word if word in self.keys else ""
        from fedloom.config.hints import meant

        return next(iter(meant(word)), "").strip("-")

    def _setting(self, key: str, text: str) -> str:
        from fedloom.config.hints import instead

        return (self.keys is None and instead(key, text)) or f"{key}={text}"

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage and exiting."""
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def _value(words: Sequence[str]) -> str:
    """Return the value of an option: `5` for `--rounds 5` or `--rounds=5`, or `VALUE` if it has none."""
    _, equals, text = words[0].partition("=")
    after = [word for word in words[1:2] if not word.startswith("--") and "=" not in word]
    return text if equals else (after or ["VALUE"])[0]


def settings_words(parser: Parser) -> None:
    """Add `[CONFIG.toml] [key=value ...]` to a parser."""
    parser.keys = None
    parser.add_argument(
        "words", nargs="*", metavar="[CONFIG.toml] key=value", help="a config file, and settings that override it"
    )


def accept_option(parser: Parser) -> None:
    """Add `--accept-changes` to a parser."""
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume even though settings, code or versions of fedloom or torch changed; the run records this",
    )


def sign_option(parser: Parser) -> None:
    """Add `--sign` to a parser."""
    parser.add_argument(
        "--sign", metavar="KEY", help="sign each finished run with this private key (Ed25519 or P-384, OpenSSH or PEM)"
    )


def output_options(parser: Parser) -> None:
    """Add `--json` and `--quiet` to a parser."""
    parser.add_argument("--json", action="store_true", help="print only the summary, as JSON, to standard output")
    parser.add_argument("--quiet", action="store_true", help="print no progress and no tables, only the folder")


def read_values(words: Sequence[str]) -> Values:
    """Return the tables of values from a config file and `key=value` arguments."""
    from fedloom.cli.mistakes import refuse_mistakes
    from fedloom.config.parsing import from_words, read_toml

    refuse_mistakes(words)
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(
            f"'{files[1]}': only one config file can be given, and '{files[0]}' is one; remove one of them"
        )
    values = read_toml(files[0]) if files else {}
    return from_words([word for word in words if "=" in word], values)


def output() -> Console:
    """Return a console for standard output. If the output is not a terminal, the console is wide enough for tables."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    return console


def default_words(value: Any) -> str:
    """Return a default value as a user would type it, or "" if there is none."""
    if value is None or value == ():
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def refuse_empty(options: Mapping[str, str]) -> None:
    """Raise ConfigError for options without a value, such as `out=`. They usually come from an unset shell variable."""
    for key, text in options.items():
        if not text:
            raise ConfigError(f"{key}=: must not be empty")


def plain_and_options(
    words: Sequence[str], keys: Sequence[str], unknown: str = "unknown key"
) -> tuple[list[str], dict[str, str]]:
    """Divide arguments into plain words, such as folders, and `key=value` options by key. The name of an existing file may contain `=`.

    `unknown` is the beginning of the error about an unknown key.

    Raises:
        ConfigError: a key is unknown, is given twice or has no value.
    """
    plain, options = list[str](), dict[str, str]()
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or (key not in keys and Path(word).exists()):
            plain.append(word)
        elif key not in keys:
            raise ConfigError(f"{unknown} '{key}'{suggest(key, keys)}")
        elif key in options:
            raise ConfigError(f"{word}: {key} is given twice; remove one of them")
        else:
            options[key] = value
    refuse_empty(options)
    return plain, options


def new_file(value: str, key: str, made: bool = False) -> Path:
    """Return the path of a new output file, which is checked before any work starts. Existing files are never overwritten.

    `made` states whether a missing parent folder will be created.

    Raises:
        ConfigError: the name is empty, the path exists, or its folder does not exist.
    """
    refuse_empty({key: value})
    path = Path(value)
    if path.exists():
        reason = "it is a folder" if path.is_dir() else "the file exists; choose another name"
        raise ConfigError(f"{key}={value}: cannot be written: {reason}")
    if not (made or path.parent.is_dir()):
        raise ConfigError(f"{key}={value}: cannot be written: folder {path.parent} does not exist")
    return path


def new_picture(value: str, key: str) -> Path:
    """Return the path of a new image file, as `new_file` does. Raise ConfigError for formats that matplotlib cannot write."""
    from fedloom.report.style import Figure  # matplotlib is an extra

    return with_suffix(new_file(value, key), key, list(Figure().canvas.get_supported_filetypes()))


def with_suffix(path: Path, key: str, kinds: Sequence[str]) -> Path:
    """Return `path`. Raise ConfigError if its suffix is not one of `kinds`."""
    if path.suffix[1:].lower() not in kinds:
        raise ConfigError(f"{key}={path}: must end in one of {', '.join(f'.{kind}' for kind in kinds)}")
    return path


def save_text(text: str, target: Path, key: str) -> None:
    """Write a text file atomically. Raise ConfigError about `key` if the target cannot be written."""
    draft = target.with_name(f".{target.name}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise ConfigError(f"{key}={target}: cannot be written: {error.strerror}") from None
    finally:
        draft.unlink(missing_ok=True)


def save_picture(figure: Any, target: Path, key: str) -> None:
    """Write a matplotlib figure atomically. Raise ConfigError about `key` if the target cannot be written."""
    from fedloom.report.style import drawing

    draft = target.with_name(f".{target.stem}.tmp{target.suffix}")
    try:
        with drawing():
            figure.savefig(draft)
        draft.replace(target)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={target}: {first_line(error)}") from None
    finally:
        draft.unlink(missing_ok=True)
