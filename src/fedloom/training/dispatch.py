"""The base class of modes that intercept every tensor operation."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Intercepts every tensor operation while it is active."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Prevent torch from importing its compiler at the first operation of a mode, which would take several seconds."""
        return False
