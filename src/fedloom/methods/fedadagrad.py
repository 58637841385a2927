"""FedAdagrad: the server divides the clients' mean change by the square root of the sum of all its past squares."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedloom.methods.fedadam import FedAdam
from fedloom.ranges import Fraction


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(FedAdam):
    """FedAdagrad (Reddi et al., ICLR 2021, algorithm 2): v <- v + D^2.

    Sent: The whole model is sent in both directions. Kept: Clients keep nothing between rounds. Everything else is as in FedAdam. `beta1`
    is 0, and `beta2` must keep its default, because it has no effect.
    """

    beta1: Fraction = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError if `beta2` is set."""
        super().__post_init__()
        if self.beta2 != FedAdam.beta2:
            raise ValueError(
                f"beta2={self.beta2}: fedadagrad adds up squares without decay; leave beta2 at {FedAdam.beta2}"
            )

    def second(self, v: Tensor, d: Tensor) -> Tensor:
        """Return the next v."""
        return v + d.square()
