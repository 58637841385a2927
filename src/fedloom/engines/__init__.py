"""Engines, which run the clients of a federation. All engines give the same numbers; `sequential.py` is the reference.

`base.py` is the interface to the experiment, `local.py` contains the code that engines in this process share, and `make.py` lists the
engines. This package does not depend on methods or experiments. To add an engine, write a file here and add a line to `make.py`.
"""

from typing import TYPE_CHECKING

from fedloom import lazy

if TYPE_CHECKING:
    from fedloom.engines.base import Engine as Engine
    from fedloom.engines.base import Problem as Problem
    from fedloom.engines.base import Reply as Reply
    from fedloom.engines.base import Score as Score
    from fedloom.engines.base import ScoreRequest as ScoreRequest
    from fedloom.engines.make import ENGINES as ENGINES
    from fedloom.engines.make import WRAPPERS as WRAPPERS
    from fedloom.engines.make import make_engine as make_engine
    from fedloom.engines.newcomers import Newcomers as Newcomers
    from fedloom.engines.processes import Processes as Processes
    from fedloom.engines.sequential import Sequential as Sequential
    from fedloom.engines.vectorised import Vectorised as Vectorised
    from fedloom.engines.wrappers import Bytes as Bytes
    from fedloom.engines.wrappers import Debug as Debug

__all__ = sorted(lazy.export(__name__))
