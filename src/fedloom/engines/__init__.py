"""Engines: what runs the clients of a federation. All give the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedloom.engines.base import Ask, Engine, Problem, Reply, Score, total
from fedloom.engines.processes import Processes
from fedloom.engines.sequential import Sequential
from fedloom.engines.wrappers import Bytes, Debug
from fedloom.errors import ConfigError, suggest

ENGINES: Mapping[str, Callable[[Problem], Engine]] = {"sequential": Sequential, "processes": Processes}
WRAPPERS: Mapping[str, Callable[[Engine], Engine]] = {"debug": Debug, "bytes": Bytes}


def make_engine(name: str, problem: Problem) -> Engine:
    """An engine by name: `sequential`, `auto`, a wrapper (`debug`, `bytes`), or several joined: `debug+bytes+sequential`.

    Raises:
        ConfigError: an unknown name.
    """
    *wrappers, last = name.split("+")
    if last in WRAPPERS:
        wrappers, last = [*wrappers, last], "auto"
    for word, known in [*((w, WRAPPERS) for w in wrappers), (last, {**ENGINES, "auto": None})]:
        if word not in known:
            raise ConfigError(
                f"engine={name}: no engine is called '{word}'{suggest(word, [*ENGINES, *WRAPPERS, 'auto'])}"
            )
    engine = ENGINES["sequential" if last == "auto" else last](problem)
    for wrapper in reversed(wrappers):
        engine = WRAPPERS[wrapper](engine)
    return engine


__all__ = [
    "ENGINES",
    "WRAPPERS",
    "Ask",
    "Bytes",
    "Debug",
    "Engine",
    "Problem",
    "Processes",
    "Reply",
    "Score",
    "Sequential",
    "make_engine",
    "total",
]
