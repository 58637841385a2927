"""Methods, one file each. A method imports nets, losses, models and other methods, never engines, data or experiments."""

from fedloom.methods.centralised import Centralised
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedavg_ft import FedAvgFT
from fedloom.methods.fedmr import FedMR
from fedloom.methods.fedprox import FedProx
from fedloom.methods.fedrir import FedRIR
from fedloom.methods.local import Local
from fedloom.methods.scaffold import Scaffold

__all__ = ["Centralised", "FedAvg", "FedAvgFT", "FedMR", "FedProx", "FedRIR", "Local", "Scaffold"]
