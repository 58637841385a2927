"""FedAvg: the server averages the clients' models, weighted by their numbers of examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom.method import Method, Paper


@dataclass(frozen=True)
class FedAvg(Method):
    """FedAvg (McMahan et al., AISTATS 2017, algorithm 1). The code is in `fedloom.Method`.

    Sent: The whole model is sent in both directions. Kept: Clients keep nothing between rounds.
    """

    accepts_late: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Communication-efficient learning of deep networks from decentralized data",
        "McMahan, Moore, Ramage, Hampson, Agüera y Arcas",
        "AISTATS 2017",
        "https://arxiv.org/abs/1602.05629",
    )
