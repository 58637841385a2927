"""fedloom: personalised and heterogeneous federated learning in PyTorch."""

from fedloom import losses, tree
from fedloom._version import __version__
from fedloom.api import Run, resume, run
from fedloom.data import Dataset, Partition, from_arrays
from fedloom.errors import ConfigError, DataError, FedloomError, MethodError, RunFolderError, UsageError, WireError
from fedloom.method import (
    Batch,
    Client,
    Downlink,
    Free,
    Interleave,
    Method,
    Paper,
    Round,
    Sweep,
    Task,
    Train,
    Turn,
)
from fedloom.methods import Centralised, FedAvg, FedAvgFT, FedMR, FedProx, FedRIR, Local, Scaffold
from fedloom.nets import Nets
from fedloom.rng import Stream

__all__ = [
    "Batch",
    "Centralised",
    "Client",
    "ConfigError",
    "DataError",
    "Dataset",
    "Downlink",
    "FedAvg",
    "FedAvgFT",
    "FedMR",
    "FedProx",
    "FedRIR",
    "FedloomError",
    "Free",
    "Interleave",
    "Local",
    "Method",
    "MethodError",
    "Nets",
    "Paper",
    "Partition",
    "Round",
    "Run",
    "RunFolderError",
    "Scaffold",
    "Stream",
    "Sweep",
    "Task",
    "Train",
    "Turn",
    "UsageError",
    "WireError",
    "__version__",
    "from_arrays",
    "losses",
    "resume",
    "run",
    "tree",
]
