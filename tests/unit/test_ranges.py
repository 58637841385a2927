from dataclasses import dataclass

import pytest

from fedloom import Ditto, FedAvg, FedMR, FedRIR
from fedloom.methods.registry import describe_method


@dataclass(frozen=True)
class Mine(FedAvg):
    lr: float = 0.2


@pytest.mark.parametrize(
    ("cls", "value", "message"),
    [
        (Mine, {"lr": 0.0}, "lr=0.0: must be above 0"),  # limits also apply to a subclass's default
        (FedAvg, {"momentum": 1.0}, "momentum=1.0: must be at least 0 and below 1"),
        (FedAvg, {"weight_decay": float("nan")}, "weight_decay=nan: must be a finite number"),
        (FedMR, {"segment": 1.5}, "segment=1.5: must be above 0 and at most 1"),
        (FedMR, {"first_stage_rounds": -1}, "first_stage_rounds=-1: must be at least 0"),
        (FedRIR, {"mask_ratio": 1.0}, "mask_ratio=1.0: must be at least 0 and below 1"),
        (Ditto, {"personal_epochs": 0}, "personal_epochs=0: must be at least 1"),
    ],
)
def test_numbers_outside_their_limits_are_refused(cls, value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        cls(**value)


def test_listings_say_what_a_number_may_be():
    types = {name: each["type"] for name, each in describe_method("fedmr", FedMR)["hyper_parameters"].items()}
    assert types["segment"] == "number > 0, ≤ 1"
    assert types["unit"] == "layer|tensor|block|segment"
    assert types["secure"] == "true|false"
    assert types["local_epochs"] == "integer ≥ 1"
