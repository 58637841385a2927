"""Settings of a run: keys, types, defaults and error messages; parsing of TOML files and `key=value` arguments.

This package knows no engine and no experiment. Add a setting to `settings.py` with a string that explains it; `fedloom run --help` prints
that string.
"""
