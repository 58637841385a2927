"""Engines run the clients of a federation. All give the same numbers; `sequential.py` is the reference.

`base.py` is the interface to the experiment, `local.py` is what engines in this process share, `make.py` lists the engines. This package
does not depend on methods or experiments. To add an engine, write a file here and add a line to `make.py`.
"""

from typing import TYPE_CHECKING

from fedloom import lazy

if TYPE_CHECKING:
    from fedloom.engines.base import Engine, Problem, Reply, Score, ScoreRequest, sum_scores
    from fedloom.engines.make import ENGINES, WRAPPERS, make_engine
    from fedloom.engines.newcomers import Newcomers
    from fedloom.engines.processes import Processes
    from fedloom.engines.sequential import Sequential
    from fedloom.engines.vectorised import Vectorised
    from fedloom.engines.wrappers import Bytes, Debug

__all__ = [
    "ENGINES",
    "WRAPPERS",
    "Bytes",
    "Debug",
    "Engine",
    "Newcomers",
    "Problem",
    "Processes",
    "Reply",
    "Score",
    "ScoreRequest",
    "Sequential",
    "Vectorised",
    "make_engine",
    "sum_scores",
]

lazy.export(
    __name__,
    {
        **dict.fromkeys(("Engine", "Problem", "Reply", "Score", "ScoreRequest", "sum_scores"), "fedloom.engines.base"),
        **dict.fromkeys(("ENGINES", "WRAPPERS", "make_engine"), "fedloom.engines.make"),
        "Newcomers": "fedloom.engines.newcomers",
        "Processes": "fedloom.engines.processes",
        "Sequential": "fedloom.engines.sequential",
        "Vectorised": "fedloom.engines.vectorised",
        **dict.fromkeys(("Bytes", "Debug"), "fedloom.engines.wrappers"),
    },
)
