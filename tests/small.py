"""Settings of small runs, which tests change."""

from typing import Any

from fedloom.config import assign

SMALL: dict[str, Any] = {
    "data": {"name": "digits", "rows": 240},
    "model": {"name": "mlp", "hidden": 12},
    "partition": {"name": "dirichlet", "alpha": 0.5},
    "clients": 4,
    "rounds": 2,
    "batch_size": 16,
}
"""A run that takes a few hundredths of a second."""


def changed(values: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The values with other settings (as `fedloom.run` names them) over them; the given ones stay as they are."""
    found = {key: dict(v) if isinstance(v, dict) else v for key, v in values.items()}
    for key, value in settings.items():
        assign(found, key, value)
    return found
