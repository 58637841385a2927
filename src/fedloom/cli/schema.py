"""The command `fedloom schema`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fedloom.cli.words import Parser, new_file, plain_and_options, save_text

EXAMPLES = """\
  fedloom schema out=fedloom.schema.json               then, as the first line of a config file:
                                                       #:schema ./fedloom.schema.json
"""
OPTIONS = ("out",)


def schema_command(words: Sequence[str]) -> int:
    """Run `fedloom schema` and return its exit code."""
    parser = Parser(
        "schema", "Print the JSON schema of config files, so that editors check and complete them.", EXAMPLES, OPTIONS
    )
    parser.add_argument("words", nargs="*", metavar="out=FILE.json", help="write it to a new file")
    plain, options = plain_and_options(parser.read(words).words, OPTIONS)
    if plain:
        parser.error(f"'{plain[0]}': expected out=FILE.json")
    target = new_file(options["out"], "out") if options else None
    from fedloom.config.schema import config_schema
    from fedloom.engines import ENGINES, WRAPPERS

    text = json.dumps(config_schema(["auto", *ENGINES, *WRAPPERS]), indent=2)
    if target is None:
        print(text)
    else:
        save_text(text + "\n", target, "out")
        print(target)
    return 0
