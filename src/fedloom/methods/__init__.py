"""Methods, one file each. A method imports nets, losses, models and other methods, but never engines, data or experiments."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from fedloom import lazy

if TYPE_CHECKING:
    from fedloom.methods.centralised import Centralised
    from fedloom.methods.ditto import Ditto
    from fedloom.methods.fedasam import FedASAM
    from fedloom.methods.fedavg import FedAvg
    from fedloom.methods.fedavg_ft import FedAvgFT
    from fedloom.methods.fedbabu import FedBABU
    from fedloom.methods.fedbn import FedBN
    from fedloom.methods.fedmr import FedMR
    from fedloom.methods.fedper import FedPer
    from fedloom.methods.fedproto import FedProto
    from fedloom.methods.fedprox import FedProx
    from fedloom.methods.fedrep import FedRep
    from fedloom.methods.fedrir import FedRIR
    from fedloom.methods.fedvtc import FedVTC
    from fedloom.methods.local import Local
    from fedloom.methods.scaffold import Scaffold

CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "centralised": "Centralised",
        "ditto": "Ditto",
        "fedasam": "FedASAM",
        "fedavg": "FedAvg",
        "fedavg_ft": "FedAvgFT",
        "fedbabu": "FedBABU",
        "fedbn": "FedBN",
        "fedmr": "FedMR",
        "fedper": "FedPer",
        "fedproto": "FedProto",
        "fedprox": "FedProx",
        "fedrep": "FedRep",
        "fedrir": "FedRIR",
        "fedvtc": "FedVTC",
        "local": "Local",
        "scaffold": "Scaffold",
    }
)
"""The class of each method by name; a method's file has the method's name."""

__all__ = [
    "CLASSES",
    "Centralised",
    "Ditto",
    "FedASAM",
    "FedAvg",
    "FedAvgFT",
    "FedBABU",
    "FedBN",
    "FedMR",
    "FedPer",
    "FedProto",
    "FedProx",
    "FedRIR",
    "FedRep",
    "FedVTC",
    "Local",
    "Scaffold",
]

lazy.export(__name__, {name: f"fedloom.methods.{module}" for module, name in CLASSES.items()})
