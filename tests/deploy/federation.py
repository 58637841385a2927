"""The settings that federations of processes are tested with."""

from __future__ import annotations

from typing import Any

from small import SMALL, changed

VALUES = changed(SMALL, **{"data.rows": 400, "clients": 6, "checkpoint_every": 1})


def values(**settings: Any) -> dict[str, Any]:
    """Settings over those of `VALUES`."""
    return changed(VALUES, **settings)
