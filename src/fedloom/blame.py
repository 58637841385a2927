"""An exception from somebody's own method in one line: what, where in their file, and at which client, round and phase."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from fedloom.errors import FedloomError

HOME = str(Path(__file__).parent)


def blame(error: BaseException) -> str:
    """`ZeroDivisionError: division by zero (my.py:12, in loss; in phase 'train' ...; client 0, round 1)`."""
    known = isinstance(error, FedloomError)
    what = str(error) if known else f"{type(error).__name__}: {error}"
    frame = own_frame(error)
    if frame is None and not known:
        frame = (traceback.extract_tb(error.__traceback__) or [None])[-1]
    place = [] if frame is None else [f"{place_of(frame)}, in {frame.name}"]
    rest = "; ".join([*place, *getattr(error, "__notes__", [])])
    return " ".join(f"{what} ({rest})".removesuffix(" ()").split())


def own_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost line of code that belongs neither to fedloom nor to an installed package."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_installed(frame.filename)]
    return frames[-1] if frames else None


def place_of(frame: traceback.FrameSummary) -> str:
    """`my.py:12`, relative to the current folder where that is shorter."""
    file = Path(frame.filename)
    inside = file.is_relative_to(Path.cwd())
    return f"{file.relative_to(Path.cwd()) if inside else file}:{frame.lineno}"


def _is_installed(file: str) -> bool:
    return file.startswith((HOME, sys.prefix, sys.base_prefix, "<")) or "site-packages" in file
