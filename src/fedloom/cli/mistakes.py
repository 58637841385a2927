"""Frequent mistakes in the words of a command line, and the words to write instead."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from fedloom.errors import ConfigError, normal

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("train", "start", "fit", "simulate", "experiment"), "run"),
        **dict.fromkeys(("resume", "continue"), "run --resume FOLDER"),
        **dict.fromkeys(("plot", "show", "view", "results", "summary", "table", "html", "eval", "evaluate"), "report"),
        **dict.fromkeys(("test", "validate"), "check"),
        **dict.fromkeys(("optimise", "optimize", "search", "sweep", "hpo", "gridsearch", "tuning"), "tune"),
        **dict.fromkeys(("profile", "speed"), "bench"),
        **dict.fromkeys(("models", "model"), "list models"),
        **dict.fromkeys(("methods", "method", "algorithms"), "list methods"),
        **dict.fromkeys(("datasets", "data", "dataset"), "list datasets"),
        **dict.fromkeys(("engines", "engine"), "list engines"),
        **dict.fromkeys(("transforms", "transform"), "list transforms"),
        **dict.fromkeys(("version", "v"), "--version"),
        "h": "--help",
    }
)
"""Words that are not commands, in the form of `fedloom.errors.normal`, and the words to write instead after `fedloom`."""


def command_instead(words: Sequence[str]) -> str:
    """Return the words to write instead if a command line does not begin with a command, or ""."""
    word = words[0]
    if "=" in word and not word.startswith("-"):
        return f"fedloom run {word}"
    if word.endswith(".toml") or (key := _names().get(normal(word), "")):
        return f"fedloom run {word}" if word.endswith(".toml") else f"fedloom run {key}"
    if word.endswith(".py"):
        return f"fedloom check {word}"
    known = COMMANDS.get(normal(word), "")
    rest = words[1:] if known in ("run", "report", "check") else []
    return " ".join(["fedloom", known, *rest]) if known else ""


def list_instead(word: str) -> str:
    """Return the words after `fedloom list` that show `word`, such as `methods fedrir`, or ""."""
    kinds = {"method": "methods", "data": "datasets", "model": "models", "engine": "engines", "uplink": "transforms"}
    key, _, name = _names().get(normal(word), "").partition("=")
    return f"{kinds[key]} {name}" if name else ""


def refuse_mistakes(words: Sequence[str]) -> None:
    """Raise ConfigError for words that are neither settings nor a config file, and for values that users often confuse with others."""
    from fedloom.config.hints import instead

    _refuse_spaces(words)
    stray = [word for word in words if "=" not in word and not _is_config(word)]
    for word in stray:
        raise ConfigError(f"'{word}': expected key=value, such as rounds=20, or a config file{_stray(stray, words)}")
    for word in words:
        key, _, text = word.partition("=")
        if hint := instead(key, text):
            raise ConfigError(f"{word}: there is no such value; write {hint}")


def _refuse_spaces(words: Sequence[str]) -> None:
    """Raise ConfigError for `rounds = 5`, `rounds= 5`, `method=a, b`, `rounds: 5` and `rounds:5`."""
    for place, word in enumerate(words):
        before, after = words[max(place - 1, 0) : place], words[place + 1 : place + 2]
        after = [other for other in after if "=" not in other and not _is_config(other)]
        if word.startswith("=") and before:
            given = [*before, word, *(after if word == "=" else [])]
        elif (word.endswith(("=", ",")) and after and "=" in word) or (word.endswith(":") and after):
            given = [word, *after]
        else:
            given = [word]
        wanted = "".join(given).strip()
        if "=" not in wanted and (pair := re.fullmatch(r"([A-Za-z_.]+):\s*([^\s:]+)", wanted)) and _is_key(pair[1]):
            wanted = f"{pair[1]}={pair[2]}"
        if wanted != " ".join(given).strip():
            raise ConfigError(f"'{' '.join(given)}': write {wanted}, without spaces")


def _is_key(word: str) -> bool:
    from fedloom.config.hints import meant

    return bool(meant(word.rpartition(".")[2]))


def _is_config(word: str) -> bool:
    return word.endswith(".toml") or (not word.endswith(".py") and Path(word).is_file())


def _stray(stray: Sequence[str], words: Sequence[str]) -> str:
    """Return a hint that names the setting that stray words probably mean."""
    names = [name for word in stray for name in word.split(",") if name]
    found = [_names().get(normal(name), "") for name in names]
    if found and all(each.startswith("method=") for each in found):
        given = [word.removeprefix("method=") for word in words if word.startswith("method=")]
        several = ",".join([*given, *(each.removeprefix("method=") for each in found)])
        return f"; did you mean method={several}?"
    if len(names) == 1 and found[0]:
        return f"; did you mean {found[0]}?"
    if stray[0].endswith(".py"):
        from fedloom.lazy import classes_in

        name = next(iter(classes_in(Path(stray[0]))), "Mine")
        return f"; did you mean method={stray[0]}:{name}?"
    return f"; did you mean data=mine data.path={stray[0]}?" if Path(stray[0]).is_dir() else ""


def _names() -> dict[str, str]:
    """Return `key=name` for each known name of a method, data set, model, engine or transform, by the normal form of the name."""
    from fedloom.data.catalogue import SOURCES
    from fedloom.engines import ENGINES, WRAPPERS
    from fedloom.methods import CLASSES
    from fedloom.models.zoo import ZOO
    from fedloom.wire.transforms import TRANSFORMS

    kinds = {"uplink": TRANSFORMS, "engine": [*ENGINES, *WRAPPERS], "model": ZOO, "data": SOURCES, "method": CLASSES}
    return {normal(name): f"{key}={name}" for key, names in kinds.items() for name in names}
