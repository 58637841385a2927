"""Methods, one file each. A method imports nets, losses, models and other methods, never engines, data or experiments."""

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

__all__ = [
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
