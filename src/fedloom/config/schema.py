"""The JSON schema of config files, with which editors check and complete TOML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from fedloom.config.parsing import SECTIONS
from fedloom.config.settings import Named, Section, Settings
from fedloom.config.tuning import TuneSettings
from fedloom.data.catalogue import SOURCES
from fedloom.methods import source_facts
from fedloom.methods.registry import METHODS
from fedloom.models.zoo import ZOO

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_ADAPTERS: Schema = {
    "weights": {"type": "string", "description": "File with pretrained weights of the body (.safetensors)."},
    "lora": {"type": "integer", "minimum": 1, "description": "Rank of low-rank adapters on a frozen body."},
    "lora_alpha": {"type": "number", "exclusiveMinimum": 0, "description": "Scale of the adapters. Default: 2 x rank."},
    "lora_freeze_a": {"type": "boolean", "description": "Train one of the two factors only."},
}
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
_TEXT: Schema = {"type": "string"}
SEVERAL = r"^[^,]+((,[^,]+)+|\.\.[^,]+)$"  # a list of values as text, or a range


def config_schema(engines: Sequence[str] = ()) -> Schema:
    """Return the JSON schema of the config files of `fedloom run`, `fedloom compare` and `fedloom tune`.

    Hyper-parameters of registered methods and options of registered models are checked by name. Users' own methods and models
    (`my.py:Mine`) and combinations (`fedmr+fedprox`) may have any keys.

    Args:
        engines: names that editors suggest for `engine`.
    """
    suggested = {"data": list(SOURCES), "engine": list(engines)}
    made = _plain(Settings.model_json_schema())
    shared, methods = made["properties"], {name: _hyper_parameters(name) for name in METHODS}
    tables = {
        key: type(f.default).__name__ for key, f in Settings.model_fields.items() if isinstance(f.default, Section)
    }
    inside = {key: made["$defs"][table]["properties"] for key, table in tables.items()}
    named = [key for key in SECTIONS if key not in ("method", "model", "common_model")]
    shared |= {key: _section(inside[key]["name"], suggested.get(key), shared[key]) for key in named}
    chosen = {name: _closed({"name": _TEXT, **options}) for name, options in methods.items()}
    shared["method"] = _several(_TEXT | {"examples": list(METHODS)}, _by_name("name", chosen), shared["method"])
    models = _by_name("name", _models())
    for key in ("model", "common_model"):
        shared[key] = _one(_TEXT | {"examples": list(ZOO)}, models, shared[key])
    shared["seed"] = {"anyOf": [shared["seed"], {"type": "array", "items": {"type": "integer", "minimum": 0}}]}
    texts = {key: shared[key] for key in ("uplink", "downlink")}
    variants = {name: _closed({"method": _TEXT, **texts, **options}) for name, options in methods.items()}
    compared = {
        "title": _TEXT | {"description": "Text above the table of a comparison."},
        "reading": _TEXT | {"description": "Text below the table of a comparison."},
        "variant": {
            "type": "object",
            "description": "Rows of a comparison, by label: a method and its hyper-parameters.",
            "additionalProperties": _by_name("method", variants) | {"required": ["method"]},
        },
        "tune": _plain(TuneSettings.model_json_schema()),
        **{name: _closed(options) for name, options in methods.items() if name not in shared},
    }
    return {
        "$schema": DIALECT,
        "title": "fedloom config file",
        "type": "object",
        "properties": {**shared, **compared, **_dotted(inside)},
        "patternProperties": {r"^(method|model|common_model)\.": {}},
        "additionalProperties": {"type": "object"},  # hyper-parameters of a variant, by its label
        "$defs": {key: value for key, value in made["$defs"].items() if key != Named.__name__},
    }


def _section(name: Schema, suggested: list[str] | None, table: Schema) -> Schema:
    """Return the schema of a table that may also be written as its name: `data = "digits"`."""
    return {"anyOf": [name | {"examples": suggested} if suggested else name, table]}


def _dotted(inside: dict[str, Schema]) -> Schema:
    """Return the schema of the keys of all tables as quoted dotted keys: `"data.rows" = 900`."""
    return {f"{table}.{key}": part for table, keys in inside.items() for key, part in keys.items()}


def _one(name: Schema, table: Schema, described: Schema) -> Schema:
    return {"anyOf": [name, table], "description": described["description"]}


def _several(name: Schema, table: Schema, described: Schema) -> Schema:
    """Return the schema of a table that may also be written as one name, or as several names, which are compared."""
    return {"anyOf": [name, {"type": "array", "items": name}, table], "description": described["description"]}


def _or_several(value: Schema) -> Schema:
    """Return the schema of a hyper-parameter that may also have several values, which are compared."""
    return {"anyOf": [value, {"type": "array", "items": value}, {"type": "string", "pattern": SEVERAL}]}


def _by_name(key: str, tables: dict[str, Schema]) -> Schema:
    """Return the schema of an object whose other keys depend on the name in `key`. With unknown names, any keys are valid."""
    chosen = [
        {"if": {"properties": {key: {"const": name}}, "required": [key]}, "then": table}
        for name, table in tables.items()
    ]
    return {"type": "object", "allOf": chosen}


def _closed(properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _hyper_parameters(name: str) -> Schema:
    """Return the schemas of a method's hyper-parameters, by name."""
    facts = source_facts.class_facts(METHODS.origins[name])
    return {
        key: _or_several(_plain(TypeAdapter(kind).json_schema()))
        | {"default": facts.values[key], "description": facts.docs.get(key, "")}
        for key, kind in facts.types.items()
    }


def _models() -> dict[str, Schema]:
    """Return the options of every architecture. Each option has the type of its default."""
    found = {}
    for name, origin in ZOO.origins.items():
        options = source_facts.function_facts(origin)[1]
        typed = {key: {"type": _TYPES[type(value)], "default": value} for key, value in options.items()}
        found[name] = _closed({"name": _TEXT, **typed, **_ADAPTERS})
    return found


def _plain(schema: Any) -> Any:
    """Return pydantic's schema without titles and null (TOML has no null), in which lists may also be comma-separated text."""
    if isinstance(schema, list):
        return [_plain(part) for part in schema if part != {"type": "null"}]
    if not isinstance(schema, dict):
        return schema
    found = {
        key: {name: _plain(part) for name, part in value.items()} if key in ("properties", "$defs") else _plain(value)
        for key, value in schema.items()
        if not (key == "title" or (key == "default" and not isinstance(value, bool | int | float | str)))
    }
    description = found.get("description")
    if isinstance(description, str):
        found["description"] = " ".join(description.split())
    if found.get("type") == "array":
        kept = {key: found.pop(key) for key in ("type", "items") if key in found}
        found["anyOf"] = [kept, _TEXT]
    return found
