"""FedYogi: FedAdam with a mean square that changes in bounded steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedloom.methods.fedadam import FedAdam


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAdam):
    """FedYogi (Reddi et al., ICLR 2021, algorithm 2): v <- v - (1 - beta2) D^2 sign(v - D^2).

    Sent: The whole model is sent in both directions. Kept: Clients keep nothing between rounds. Everything else is as in FedAdam. The v of
    a coordinate that no longer changes stays constant, whereas FedAdam's v decays to 0 and its steps grow.
    """

    def second(self, v: Tensor, d: Tensor) -> Tensor:
        """Return the next v, which is never negative."""
        square = d.square()
        return v - (1 - self.beta2) * square * (v - square).sign()
