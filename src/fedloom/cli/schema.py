"""The command `fedloom schema`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fedloom.cli.words import Parser, new_file

EXAMPLES = """\
  fedloom schema out=fedloom.schema.json               then, as the first line of a config file:
                                                       #:schema ./fedloom.schema.json
"""


def schema_command(words: Sequence[str]) -> int:
    """Run `fedloom schema` and return its exit code."""
    parser = Parser(
        "schema", "Print the JSON schema of config files, so that editors check and complete them.", EXAMPLES
    )
    parser.add_argument("out", nargs="?", metavar="out=FILE.json", help="write it to a new file")
    given = parser.read(words)
    if given.out is not None and not given.out.startswith("out="):
        parser.error(f"'{given.out}': expected out=FILE.json")
    target = new_file(given.out.removeprefix("out="), "out") if given.out else None
    from fedloom.config.schema import config_schema
    from fedloom.engines import ENGINES, WRAPPERS

    text = json.dumps(config_schema(["auto", *ENGINES, *WRAPPERS]), indent=2)
    if target is None:
        print(text)
    else:
        target.write_text(text + "\n", encoding="utf-8")
        print(target)
    return 0
