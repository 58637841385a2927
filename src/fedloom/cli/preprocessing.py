"""The command `fedloom preprocess`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.cli.words import Parser, new_file, output, plain_and_options, save_text
from fedloom.errors import ConfigError

if TYPE_CHECKING:
    from fedloom.config.settings import Values
    from fedloom.data.preprocess import Part, Preprocess

EXAMPLES = """\
  fedloom preprocess people.csv data.label=income                  written to preprocess.json in this folder
  fedloom preprocess people.csv data.label=income data.missing=fill data.drop=name out=people.json
  fedloom preprocess reviews.csv data.text=review data.label=stars
  fedloom preprocess images data.image_size=32
  fedloom run data=mine data.path=people.csv data.preprocess=people.json

keys: those of data.* that say how files are read (fedloom run --help), and
  partition.column, partition.by   columns that name owners or groups, which are no inputs
  out=FILE.json                    the file to write (default: preprocess.json); files are never overwritten
"""
COLUMNS = ("partition.column", "partition.by")
WITHOUT_EFFECT = ("path", "preprocess", "revision", "augment", "factor", "factor_clients", "features")
SHOWN = 5  # maximum number of levels or words in a line


def preprocess_command(words: Sequence[str]) -> int:
    """Run `fedloom preprocess` and return its exit code."""
    parser = Parser(
        "preprocess",
        "Write how the values of a file or folder become model inputs, before any run.",
        EXAMPLES,
        ("out",),
    )
    parser.add_argument(
        "words", nargs="*", metavar="FILE key=value", help="your own file or folder, and how to read it"
    )
    plain, options = plain_and_options(parser.read(words).words, preprocess_keys(), "fedloom preprocess has no key")
    if len(plain) != 1:
        raise ConfigError(
            "fedloom preprocess: give one file or folder, such as people.csv"
            + (f", not {len(plain)}: {', '.join(plain)}" if plain else "")
        )
    target = new_file(options.pop("out", "preprocess.json"), "out")
    from fedloom.config.settings import make_settings
    from fedloom.experiment.build import make_preprocess

    made = make_preprocess(make_settings(_values(plain[0], options)))
    save_text(made.text(), target, "out")
    console = output()
    for line in _lines(made):
        console.print(line, soft_wrap=True)
    console.print(f"file        {target}", soft_wrap=True)
    return 0


def preprocess_keys() -> list[str]:
    """Return the keys of the command."""
    from fedloom.config.settings import DataSettings

    named = [f"data.{key}" for key in DataSettings.model_fields if key != "name" and key not in WITHOUT_EFFECT]
    return ["data", *named, *COLUMNS, "out"]


def _values(file: str, options: dict[str, str]) -> Values:
    """Return the tables of settings from the file and the options of the command."""
    from fedloom.config.parsing import from_words

    if not Path(file).expanduser().exists():
        raise ConfigError(f"{file}: no such file or folder")
    name = [] if "data" in options else ["data=mine"]
    natural = ["partition=natural"] if "partition.column" in options else []
    values = from_words([*name, *natural, *(f"{key}={value}" for key, value in options.items())], {})
    values["data"]["path"] = file
    return values


def _lines(made: Preprocess) -> Iterator[str]:
    """Yield lines that describe the task and the inputs."""
    labels = made.table.labels if made.table else ()
    named = f" of {', '.join(labels)}" if labels else ""
    names, content = made.objective.names, made.objective.content()
    yield f"task        {made.objective.task}{named}" + (f": {_few(names)}" if names and names != labels else "")
    if "mean" in content:
        for name, mean, std in zip(names, content["mean"], content["std"], strict=True):
            yield f"            {name}: mean {mean:.5g}, standard deviation {std:.5g}"
    for part in made.inputs:
        yield from _part_lines(part)
    if made.table and (unused := [name for name in made.table.others if name not in labels]):
        yield f"not used    {', '.join(unused)}"


def _part_lines(part: Part) -> Iterator[str]:
    match part.kind:
        case "number" if part.columns:
            yield from _number_lines(part)
        case "category" if part.columns:
            for place, category in enumerate(part.columns):
                levels = [level or "(missing)" for level in category.levels]
                yield f"{'categories' if not place else '':<12}{category.name}: {len(levels)} levels ({_few(levels)})"
        case "token" if part.text is not None:
            of = f" of {' and '.join(part.text.columns)}" if part.text.columns else ""
            words = f", such as {_few(part.text.words)}" if part.text.words else ""
            cut = f"the first {part.text.length} {part.text.tokens}{of}"
            case = "in lower case" if part.text.case == "lower" else "in their own case"
            yield f"text        {cut}, {case}; {part.text.size:,} different{words}"
        case _:
            below = f", values below {max(part.field.bounds)}" if part.field.is_integer else ""
            size = " x ".join(map(str, part.shape))
            kind = "images" if part.kind == "picture" else f"{part.kind}s"
            yield f"{kind:<12}{part.name + ': ' if part.name else ''}{size}{below}{_scale(part)}"


def _number_lines(part: Any) -> Iterator[str]:
    place = 0
    for k, column in enumerate(part.columns):
        scale, shift = (values[place if len(values) > 1 else 0] for values in (part.scale, part.shift))
        words = f" ({column.words[0]} is 0, {column.words[1]} is 1)" if column.words else ""
        line = f"{'numbers' if not k else '':<12}{column.name}{words}: "
        line += (
            "unchanged"
            if (scale, shift) == (1, 0)
            else f"mean {-shift / scale:.5g}, standard deviation {1 / scale:.5g}"
        )
        if column.fill is not None:
            line += f"; missing values become {column.fill:.5g}" + (
                ", and a further column marks them" if column.marked else ""
            )
        yield line
        place += 1 + column.marked


def _scale(part: Any) -> str:
    """Return the scaling of values in words."""
    if part.kind not in ("picture", "number"):
        return ""
    unit = 255.0 if part.kind == "picture" else 1.0
    scale, shift = [value * unit for value in part.scale], list(part.shift)
    if len(scale) > 1 or len(shift) > 1:
        return f", standardised ({len(scale)} means and standard deviations)"
    if (round(scale[0], 6), shift[0]) == (1, 0):
        return ", from 0 to 1" if part.kind == "picture" else ", unchanged"
    if (round(scale[0], 6), shift[0]) == (2, -1):
        return ", from -1 to 1" if part.kind == "picture" else ", as 2 v - 1"
    return f", mean {-shift[0] / scale[0]:.5g}, standard deviation {1 / scale[0]:.5g}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
