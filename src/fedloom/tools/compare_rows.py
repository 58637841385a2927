"""The rows of a comparison: methods, variants, and lists of values of hyper-parameters, from a config file and `key=value` arguments."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from fedloom.config.hints import near_keys
from fedloom.config.parsing import parse_value
from fedloom.config.settings import Named, Section, Settings, Values, comma_separated, make_method
from fedloom.errors import ConfigError, suggest
from fedloom.experiment.manifest import flat
from fedloom.methods.registry import METHODS, installed_methods, method_class, no_such_method
from fedloom.ranges import type_words

log = logging.getLogger(__name__)

OWN_KEYS = ("method", "seed", "variant", "out", "title", "reading")  # keys that are not shared settings of the runs
VARIED = ("uplink", "downlink")  # settings of the run that may differ between rows


class Row(NamedTuple):
    """One row of the comparison's table. Before the row is expanded (`expanded`), a hyper-parameter may be a list of values."""

    label: str
    method: Values  # `name` and all hyper-parameters of the method
    run: Values = {}  # settings of the run that only this row has; they must be in VARIED


class Draft(NamedTuple):
    """The rows of a comparison before lists of values are expanded, and the settings that all runs share."""

    base: Values
    rows: tuple[Row, ...]


def draft(values: Mapping[str, Any], own_keys: Sequence[str] = ()) -> Draft:
    """Return the rows that the values describe. `own_keys` contains further keys of the command. See `fedloom.tools.compare.plan`.

    Raises:
        ConfigError: a key or value is invalid; the message names it and states the allowed values.
    """
    values = {key: value for key, value in values.items() if key not in own_keys}
    table = values.get("method", {})
    table = table if isinstance(table, Mapping) else {"name": table}
    variants = _tables(values.get("variant", {}), "variant")
    names = _listed(table.get("name", list(variants)), "method")
    if not names:
        _split(values, set(METHODS))  # raises for an unknown key, such as `methods`, which is a likelier mistake
        raise ConfigError(
            "method: must name the methods to compare, such as method=fedavg,fedrir; [variant.NAME] tables add variants"
        )
    base, own = _split(
        values, {*METHODS, *map(_label, names), *(_label(str(v.get("method"))) for v in variants.values())}
    )
    common = {key: value for key, value in table.items() if key != "name"}
    rows = tuple(_row(name, common, own, variants) for name in names)
    _check_common(common, rows)
    check_labels([row.label for row in rows])
    _refuse_lists(base)
    return Draft(base, rows)


def expanded(row: Row) -> list[Row]:
    """Return one row for each combination of the listed values. Its name contains the values, as in `fedprox-lr0.1-mu0.01`.

    Each row has all hyper-parameters, so that a resumed comparison does not depend on later changes of default values.
    """
    grid = grid_of(row)
    found = []
    for chosen in itertools.product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        several = {key: value for key, value in values.items() if len(grid[key]) > 1}
        found.append(spelt_out(row._replace(label=label_of(row.label, several), method={**row.method, **values})))
    return found


def label_of(label: str, values: Values) -> str:
    """Return the name of a row that differs from other rows in these values of hyper-parameters."""
    parts = [f"-{key}{'' if type(value) in (int, float) else '-'}{_word(value)}" for key, value in values.items()]
    return label + "".join(parts)


def grid_of(row: Row) -> dict[str, list[Any]]:
    """Return the values of each hyper-parameter that is a list (`[0.1, 0.01]`), or text for a list (`0.1,0.01`).

    Raises:
        ConfigError: a list is empty or has a value twice.
    """
    hints = get_type_hints(method_class(row.method["name"]))
    found = {}
    for key, value in row.method.items():
        values = several(value, hints.get(key)) if key != "name" else None
        if values is None:
            continue
        words = list(map(_word, values))
        if not values or len(set(words)) < len(words):
            problem = "has a value twice" if values else "must not be empty"
            raise ConfigError(f"{row.label}.{key}={','.join(words)}: {problem}; give different values")
        found[key] = values
    return found


def several(value: Any, hint: Any = None) -> list[Any] | None:
    """Return the values in the list of a hyper-parameter, or None if it is a single value. `hint` is the type of the hyper-parameter."""
    kinds = {get_origin(part) or part for part in (hint, *get_args(hint))}
    if kinds & {tuple, list}:
        return None
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str) and "," in value and str not in kinds:
        return [parse_value(part) for part in comma_separated(value)]
    return None


def spelt_out(row: Row) -> Row:
    """Return the row with all hyper-parameters. Raise ConfigError if a value is invalid."""
    method = make_method(Named(**row.method))
    return row._replace(method={"name": row.method["name"], **dataclasses.asdict(method)})


def variant_table(row: Row) -> Values:
    """Return a row as a table `[variant.NAME]`. Values that are None are omitted, because they are defaults and TOML has no None."""
    own = {key: value for key, value in {**row.method, **row.run}.items() if key != "name" and value is not None}
    return {"method": row.method["name"], **own}


def _row(name: str, common: Values, own: Mapping[str, Values], variants: Mapping[str, Values]) -> Row:
    variant = dict(variants.get(name, {}))
    method = variant.pop("method", name)
    run = {key: variant.pop(key) for key in VARIED if key in variant}
    if name in variants:
        _check_variant(name, method)
    elif ":" not in name and "+" not in name and name not in METHODS and name not in installed_methods():
        raise ConfigError(no_such_method(name, variants))
    shared = {key: value for key, value in common.items() if key in _fields(method)}
    table = own.get(_label(method), {})
    _check_keys(_label(method), method, table)
    _check_keys(f"variant.{name}", method, variant)
    return Row(_label(name), {"name": method, **shared, **table, **variant}, run)


def _check_variant(name: str, method: Any) -> None:
    if not isinstance(method, str):
        raise ConfigError(f"variant.{name}.method={method}: must be the name of a method")
    if method == name and name not in METHODS:
        raise ConfigError(f'variant.{name}: has no method; set method = "...", the method that it varies')
    try:
        method_class(method)
    except ConfigError as error:
        raise ConfigError(f"variant.{name}.{error}") from None


def _check_keys(where: str, method: str, table: Values) -> None:
    fields = _fields(method)
    for key in table.keys() - fields:
        hint = (
            "; it is a setting of the run, and the same for all rows"
            if key in Settings.model_fields
            else suggest(key, fields)
        )
        raise ConfigError(f"{where}.{key}: {method} has no such hyper-parameter{hint}")


def _label(name: str) -> str:
    return name.rpartition(":")[2]


def _fields(method: str) -> set[str]:
    return {field.name for field in dataclasses.fields(method_class(method))}


def _split(values: Mapping[str, Any], methods: set[str]) -> tuple[Values, dict[str, Values]]:
    """Return the settings of the runs, and the tables of methods by name. The name of the table for `my.py:Mine` is `Mine`."""
    if "label" in values:
        raise ConfigError(
            f"label={values['label']}: cannot be set, because each row is named after its method; use [variant.NAME] for another name"
        )
    rest = {key: value for key, value in values.items() if key not in OWN_KEYS}
    base = {key: value for key, value in rest.items() if key in Settings.model_fields}
    own = {key: value for key, value in rest.items() if key not in base and key in methods}
    for key in rest.keys() - base.keys() - own.keys():
        raise ConfigError(f"unknown key '{key}'{near_keys(key, {*Settings.model_fields, *OWN_KEYS, *methods})}")
    return base, _tables(own, "")


def _tables(tables: Any, where: str) -> dict[str, Values]:
    prefix = f"{where}." if where else ""
    if not isinstance(tables, Mapping):
        raise ConfigError(f"{where}={tables}: must consist of tables, such as [{prefix}NAME]")
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise ConfigError(f"{prefix}{name}={table}: is a table; set {prefix}{name}.KEY=VALUE")
    return {name: dict(table) for name, table in tables.items()}


def _listed(value: Any, key: str) -> list[Any]:
    """Return `a,b`, `[a, b]` or `a` as a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    found = list(value) if isinstance(value, Sequence) else [value]
    if key == "method" and not all(isinstance(name, str) for name in found):
        raise ConfigError(f"method={value}: must be names of methods")
    return found


def seeds_of(value: Any) -> tuple[int, ...]:
    """Return the seeds given by `0,1`, `[0, 1]` or `0`."""
    given = _listed(value, "seed")
    seeds = [int(seed) if isinstance(seed, str) and seed.isdecimal() else seed for seed in given]
    if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        shown = ",".join(map(str, given))
        raise ConfigError(f"seed={shown}: must be distinct integers of at least 0, such as seed=0,1,2")
    return tuple(seeds)


def _check_common(common: Values, rows: Sequence[Row]) -> None:
    for key in common:
        if not any(key in row.method for row in rows):
            fields = sorted(set[str]().union(*(_fields(row.method["name"]) for row in rows)))
            names = ", ".join(dict.fromkeys(row.method["name"] for row in rows))
            raise ConfigError(f"method.{key}: none of {names} has this hyper-parameter{suggest(key, fields)}")
        lacking = [row.label for row in rows if key not in _fields(row.method["name"])]
        if lacking:
            log.warning("method.%s: not for %s, which has no such hyper-parameter", key, ", ".join(lacking))


def check_labels(labels: Sequence[str]) -> None:
    """Raise ConfigError if two rows have the same name, or if a name cannot be the name of a folder."""
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"method: '{label}' is given twice; name the second one with [variant.NAME]")
        if not re.fullmatch(r"\w[\w.+-]*", label):
            raise ConfigError(f"variant.{label}: a name may contain only letters, digits and _ . + -")


def _refuse_lists(base: Values) -> None:
    """Raise ConfigError if there are several values for a setting that all rows share and that is one number."""
    for name, value in flat(base).items():
        values = several(value) if _is_number(name) else None
        if values and len(values) > 1:
            shown = ",".join(map(_word, values))
            raise ConfigError(f"{name}={shown}: all rows share this setting; run one comparison for each value")


def _is_number(name: str) -> bool:
    """Return whether a setting, given by its dotted name, is one number."""
    section: Any = Settings
    *tables, last = name.split(".")
    for table in tables:
        section = type(section.model_fields[table].default) if table in section.model_fields else Section
    field = getattr(section, "model_fields", {}).get(last)
    return field is not None and type_words(field.annotation, field).split(" ")[0] in ("integer", "number")


def _word(value: Any) -> str:
    """Return a value in the form used in the name of a row."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^\w.+-]", "_", text)
