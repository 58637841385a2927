"""FedPer that misbehaves in some rounds. Nodes have a copy each; one of them is given the list of its faults."""

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
        """The personal predictor alone."""
        return {"personal": super().predictors()["personal"]}

    def uplink(self, client, received, down, turn):
        """FedPer's uplink, or what the round's fault makes of it."""
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
