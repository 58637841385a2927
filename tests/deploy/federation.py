"""Settings for tests of federations of processes."""

from __future__ import annotations

from typing import Any

from small import SMALL, changed

VALUES = changed(SMALL, **{"data.rows": 400, "clients": 6, "checkpoint_every": 1})


def values(**settings: Any) -> dict[str, Any]:
    """Return `VALUES`, overridden by the given settings."""
    return changed(VALUES, **settings)
