"""Settings of a run: keys, types, defaults and error messages; parsing of TOML files and `key=value` arguments.

This package does not depend on engines or experiments. To add a setting, declare it in `settings.py` with a string that explains it;
`fedloom run --help` prints that string.
"""
