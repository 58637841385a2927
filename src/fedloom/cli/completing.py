"""Shell completion with argcomplete: commands, options, settings and names. Methods, models and engines are not imported."""

from __future__ import annotations

import argparse
import functools
import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import argcomplete

from fedloom.combining.rules import RULES
from fedloom.data.catalogue import SOURCES
from fedloom.engines import ENGINES, WRAPPERS
from fedloom.methods import source_facts
from fedloom.methods.registry import METHODS
from fedloom.models.zoo import ZOO
from fedloom.wire.transforms import TRANSFORMS

Words = Callable[..., Iterable[str]]
NAMES: Mapping[str, Iterable[str]] = {
    "method": METHODS,
    "model": ZOO,
    "models": ZOO,
    "common_model": ZOO,
    "data": SOURCES,
    "engine": [*ENGINES, *WRAPPERS, "auto"],
    "uplink": TRANSFORMS,
    "downlink": TRANSFORMS,
    "aggregate": RULES,
}
"""Names that can follow `KEY=`."""
STEPS: Mapping[str, str] = {
    **dict.fromkeys(("init", "server", "node", "run", "up"), "fedloom.cli.deploying"),
    **dict.fromkeys(("join", "admit", "revoke", "rotate", "audit"), "fedloom.cli.admitting"),
}
"""The steps of `fedloom deploy`, with their modules."""


def complete(commands: Mapping[str, str]) -> None:
    """Print completions for the shell's current command line, and exit. `commands` contains the import path of each command's function."""
    given = os.environ.get("COMP_LINE", "").split()[1:3]
    argcomplete.autocomplete(parser(commands, *given), always_complete_options=False)


def parser(commands: Mapping[str, str], chosen: str = "", step: str = "") -> argparse.ArgumentParser:
    """Return a parser with all commands, and with the arguments of the command `chosen` (or of its step `step`)."""
    whole = argparse.ArgumentParser(prog="fedloom", add_help=False)
    parts = whole.add_subparsers(dest="command")
    for command, origin in commands.items():
        part = parts.add_parser(command)
        if command != chosen:
            continue
        if command == "deploy" and step in STEPS:
            origin = f"{STEPS[step]}:{step}_step"
        added = list(source_facts.calls(origin, "add_argument"))
        for words, about in added:
            if words and words[0].startswith("--"):
                part.add_argument(words[0], **{key: about[key] for key in ("action", "help") if key in about})
        given: Any = part.add_argument("given", nargs="*")
        if command == "list":
            given.completer = _listed
        elif command == "deploy" and step not in STEPS:
            given.completer = lambda **_: STEPS
        elif any(about.get("metavar") == "[CONFIG.toml] key=value" for _, about in added):
            given.completer = complete_settings
        elif command in KEYS:
            given.completer = functools.partial(_complete_keys, KEYS[command])
    return whole


def _listed(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> Iterable[str]:
    from fedloom.cli.listing import KINDS

    match parsed_args.given or []:
        case []:
            return KINDS
        case [kind] if kind in KINDS:
            return [fact["name"] for fact in KINDS[kind]()]
        case _:
            return ()


def _complete_keys(
    keys: Callable[[Namespace], Mapping[str, Iterable[str]]], prefix: str, parsed_args: Namespace, **_: Any
) -> list[str]:
    """Return completions of `prefix`: `KEY=` for keys that are not given yet, or values after the equals sign."""
    key, equals, _text = prefix.partition("=")
    known, given = keys(parsed_args), [word.partition("=")[0] for word in parsed_args.given or [] if "=" in word]
    if not equals:
        return [f"{name}=" for name in known if name not in given]
    return [f"{key}={value}" for value in known.get(key, ())]


def _predict_keys(parsed_args: Namespace) -> dict[str, Iterable[str]]:
    """Return the keys of `fedloom predict` with their values. The clients are those of the first argument, a run folder."""
    given = [word for word in parsed_args.given or [] if "=" not in word]
    return {"client": _clients(Path(given[0])), "out": (), "adapt": ("true", "false")} if given else {}


def _clients(folder: Path) -> Iterable[str]:
    """Return the names of the clients of a run, or their numbers, and `server`."""
    try:
        content = json.loads((folder / "partition.json").read_text(encoding="utf-8"))
        return [*(content.get("clients") or map(str, range(len(content["train"])))), "server"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ["server"]


def _preprocess_keys(parsed_args: Namespace) -> dict[str, Iterable[str]]:
    from fedloom.cli.preprocessing import preprocess_keys

    return {key: _values(key) for key in preprocess_keys()}


KEYS: Mapping[str, Callable[[Namespace], Mapping[str, Iterable[str]]]] = {
    "predict": _predict_keys,
    "preprocess": _preprocess_keys,
}
"""Functions that return the keys of a command and their values, for commands that do not accept all settings of a run."""


def complete_settings(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Return completions of `prefix`: settings as `KEY=`, or values after the equals sign."""
    key, equals, text = prefix.partition("=")
    given = dict(word.split("=", 1) for word in parsed_args.given or [] if "=" in word)
    if not equals:
        return [f"{name}=" for name in [*_keys(), *_hyper_parameters(given.get("method", "fedavg"))]]
    before = text[: text.rfind(",") + 1]  # earlier values of a list, such as method=local,fedavg
    return [f"{key}={before}{value}" for value in _values(key)]


def _keys() -> dict[str, str]:
    """Return the type of every setting, in words."""
    from fedloom.cli.keys import keys  # imports pydantic

    return {key.name: key.type for key in keys()}


def _hyper_parameters(methods: str) -> list[str]:
    facts = [source_facts.class_facts(METHODS.origins[name]) for name in methods.split(",") if name in METHODS]
    return [f"method.{name}" for name in dict.fromkeys(name for fact in facts for name in fact.types)]


def _values(key: str) -> Iterable[str]:
    if key in NAMES:
        return NAMES[key]
    words = _keys().get(key, "").removeprefix("list of ")
    return words.split("|") if "|" in words else ()
