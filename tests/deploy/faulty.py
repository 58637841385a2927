"""FedPer with faults in some rounds. Each node has a copy; one node's copy has the list of faults."""

import os
import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedloom import Method

FAULTS: dict[int, str] = {}  # by round, from 0


@dataclass(frozen=True)
class Faulty(Method):
    """FedPer, with faults."""

    shared: ClassVar[tuple[str, ...]] = ("model:body",)
    accepts_late: ClassVar[bool] = True

    def predictors(self):
        """Return only the personal predictor."""
        return {"personal": super().predictors()["personal"]}

    def uplink(self, client, received, down, turn):
        """Return FedPer's uplink, changed by the fault of the round."""
        message, memory = super().uplink(client, received, down, turn)
        match FAULTS.get(turn.number):
            case "raises":
                raise ValueError("the disk is full")
            case "hangs":
                time.sleep(600)
            case "dawdles":
                time.sleep(30)
            case "dies":
                os._exit(3)
            case "foreign":
                message = {"weights": {"params": {"other.weight": torch.ones(3)}}}
        return message, memory
