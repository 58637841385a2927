"""Settings of a run: their keys, types, defaults and error messages, and the parsing of TOML files and `key=value` arguments.

This package does not depend on engines or experiments. To add a setting, declare it in `settings.py` with a string below it that explains
it; `fedloom run --help` prints this string.
"""
