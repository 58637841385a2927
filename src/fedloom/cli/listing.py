"""The command `fedloom list`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rich import box
from rich.table import Table

from fedloom.cli.mistakes import list_instead
from fedloom.cli.tables import show
from fedloom.cli.words import Parser, default_words, output
from fedloom.combining.rules import RULES
from fedloom.data.catalogue import SOURCES, Source
from fedloom.data.hub import cache_root, local_folder
from fedloom.engines import ENGINES, WRAPPERS
from fedloom.errors import ConfigError, DataError, suggest
from fedloom.methods import registry, source_facts
from fedloom.models.zoo import KINDS as INPUTS
from fedloom.models.zoo import ZOO
from fedloom.wire.transforms import TRANSFORMS

Facts = dict[str, Any]
EXAMPLES = """\
  fedloom list methods                  all methods with their papers, and what they send
  fedloom list methods fedrir           one method with its hyper-parameters
  fedloom list methods my.py:Mine       a method of your own
  fedloom list datasets                 data sets, and where they are on this machine
  fedloom list models --json
"""


def list_command(words: Sequence[str]) -> int:
    """Run `fedloom list` and return its exit code."""
    parser = Parser(
        "list", "List methods, data sets, models, engines, transforms or rules, with their options.", EXAMPLES
    )
    parser.add_argument("what", nargs="?", metavar="|".join(KINDS), help="what to list")
    parser.add_argument("name", nargs="?", help="show one of them in full")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.read(words)
    given.what = {"data": "datasets"}.get(given.what, given.what)
    if given.what not in KINDS:
        raise ConfigError(f"fedloom list: {_wrong(given.what)}")
    facts = KINDS[given.what]()
    if given.name is not None:
        facts = [_one(given.what, given.name, facts)]
    else:
        for fact in facts:
            fact.pop("description", None)
    if given.json:
        print(json.dumps(facts[0] if given.name else facts, indent=2, default=str))
    elif given.name:
        _show_one(facts[0])
    else:
        _show_all(facts)
    return 0


def _wrong(what: str | None) -> str:
    """Return a message that there is no such kind of things to list, with the words to write instead."""
    if not what:
        return f"choose one of {', '.join(KINDS)}"
    right = list_instead(what)
    return f"'{what}' cannot be listed" + (f"; write fedloom list {right}" if right else suggest(what, KINDS))


def methods() -> list[Facts]:
    """Return the facts about every registered method, and about the methods that installed packages provide."""
    found = [registry.describe_registered(name) for name in registry.METHODS]
    others = sorted(registry.installed_methods().keys() - registry.METHODS.keys())
    return found + [registry.describe_method(name, registry.method_class(name)) for name in others]


def datasets() -> list[Facts]:
    """Return the facts about every known data set, and the folder in which it was found."""
    return [
        {
            "name": name,
            "title": source.title,
            "size": _input_size(source),
            "task": source.task,
            "classes": source.n_classes or "–",
            "owners": source.natural or "–",
            "terms": source.terms or "see its page",
            "found": _found(name),
        }
        for name, source in SOURCES.items()
    ]


def _input_size(source: Source) -> str:
    if source.image_size == 0:
        return source.inputs
    return f"{source.channels}x{source.image_size}x{source.image_size}" if source.image_size else "varies"


def models() -> list[Facts]:
    """Return the facts about every architecture in the zoo."""
    found = []
    for name, origin in ZOO.origins.items():
        text, options = source_facts.function_facts(origin)
        facts = {"inputs": sorted(INPUTS[name]), "summary": _first_line(text), "options": options}
        facts["description"] = f"{text}\n\n{EVERY_MODEL}"
        found.append({"name": name, **facts})
    return found


EVERY_MODEL = """\
Every model also has the options `weights=FILE.safetensors` (pretrained weights of the body), `lora=RANK` (low-rank adapters on a frozen
body), `lora_alpha` (default: 2 RANK) and `lora_freeze_a`."""


def engines() -> list[Facts]:
    """Return the facts about every engine and wrapper."""
    auto = {"name": "auto", "kind": "engine", "summary": "chooses one of the engines below (the default)"}
    plain = [{"name": name, "kind": "engine", "summary": text} for name, text in ENGINES.items()]
    wrappers = [
        {"name": name, "kind": "wrapper", "summary": _first_line(source_facts.docstring(origin))}
        for name, origin in WRAPPERS.origins.items()
    ]
    return [auto, *plain, *wrappers]


def transforms() -> list[Facts]:
    """Return the facts about every transform of messages."""
    return [
        {"name": name, "example": kind.example, "for": kind.ways, "summary": kind.summary}
        for name, kind in TRANSFORMS.items()
    ]


def rules() -> list[Facts]:
    """Return the facts about every robust rule."""
    return [{"name": name, "example": kind.example, "summary": kind.summary} for name, kind in RULES.items()]


KINDS: Mapping[str, Callable[[], list[Facts]]] = MappingProxyType(
    {
        "methods": methods,
        "datasets": datasets,
        "models": models,
        "engines": engines,
        "transforms": transforms,
        "rules": rules,
    }
)


def _one(what: str, name: str, facts: Sequence[Facts]) -> Facts:
    if what == "methods" and (":" in name or "+" in name):
        return registry.describe_method(name, registry.method_class(name))
    found = next((fact for fact in facts if fact["name"] == name), None)
    if found is None and what == "methods":
        raise ConfigError(registry.no_such_method(name))
    if found is None:
        raise ConfigError(f"there is no {what[:-1]} '{name}'{suggest(name, [fact['name'] for fact in facts])}")
    return found


def _found(name: str) -> str | None:
    if SOURCES[name].embedded:
        return "embedded"
    try:
        folder = local_folder(name, cache_root())
    except DataError as error:  # an incomplete folder
        return str(error)
    return str(folder) if folder else None


def _first_line(text: str) -> str:
    return text.split("\n\n")[0].replace("\n", " ")


def _show_all(facts: Sequence[Facts]) -> None:
    hidden = ("authors", "url", "hyper_parameters", *(["summary"] if "paper" in facts[0] else []))
    columns = [key for key in facts[0] if key not in hidden]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column == "name", overflow="fold")
    for fact in facts:
        table.add_row(*(_cell(column, fact[column]) for column in columns))
    show(output(), table)


def _cell(column: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={default_words(each)}" for key, each in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or ("nothing" if column == "sent" else "–")
    return "–" if value in (None, "") else str(value)


def _show_one(fact: Facts) -> None:
    console = output()
    plain = {key: value for key, value in fact.items() if key not in ("hyper_parameters", "description", "summary")}
    width = max(map(len, plain))
    for key, value in plain.items():
        console.print(f"{key:<{width}}  {_cell(key, value)}", soft_wrap=True)
    if text := fact.get("description") or fact.get("summary"):
        console.print(f"\n{text}")
    if "hyper_parameters" not in fact:
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("hyper-parameter", "default", "type", "meaning"):
        table.add_column(header, no_wrap=header == "hyper-parameter", overflow="fold")
    for name, each in fact["hyper_parameters"].items():
        table.add_row(f"method.{name}", default_words(each["default"]), each["type"].replace("|", " | "), each["doc"])
    console.print()
    show(console, table)
