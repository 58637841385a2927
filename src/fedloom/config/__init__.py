"""Settings of a run: their keys, types and defaults, how files and `key=value` words become settings, and the errors they give.

Knows no engine and no experiment. Add a setting in `settings.py`, with its meaning; `fedloom run --help` shows it.
"""
