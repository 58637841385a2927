"""fedloom: personalised and heterogeneous federated learning in PyTorch.

Nothing is loaded before it is used: `import fedloom` alone imports no torch.
"""

from typing import TYPE_CHECKING

from fedloom import lazy
from fedloom._version import __version__
from fedloom.methods import CLASSES as _CLASSES

if TYPE_CHECKING:
    from fedloom import losses, tree
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
    from fedloom.methods import (
        Centralised,
        Ditto,
        FedASAM,
        FedAvg,
        FedAvgFT,
        FedBABU,
        FedBN,
        FedMR,
        FedPer,
        FedProto,
        FedProx,
        FedRep,
        FedRIR,
        FedVTC,
        Local,
        Scaffold,
    )
    from fedloom.methods.composition import compose
    from fedloom.nets import Nets
    from fedloom.rng import Stream

__all__ = [
    "Batch",
    "Centralised",
    "Client",
    "ConfigError",
    "DataError",
    "Dataset",
    "Ditto",
    "Downlink",
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
    "compose",
    "from_arrays",
    "losses",
    "resume",
    "run",
    "tree",
]

lazy.export(
    __name__,
    {
        "Run": "fedloom.api",
        "resume": "fedloom.api",
        "run": "fedloom.api",
        "compose": "fedloom.methods.composition",
        "Dataset": "fedloom.data",
        "Partition": "fedloom.data",
        "from_arrays": "fedloom.data",
        "ConfigError": "fedloom.errors",
        "DataError": "fedloom.errors",
        "FedloomError": "fedloom.errors",
        "MethodError": "fedloom.errors",
        "RunFolderError": "fedloom.errors",
        "UsageError": "fedloom.errors",
        "WireError": "fedloom.errors",
        "Batch": "fedloom.method",
        "Client": "fedloom.method",
        "Downlink": "fedloom.method",
        "Free": "fedloom.method",
        "Interleave": "fedloom.method",
        "Method": "fedloom.method",
        "Paper": "fedloom.method",
        "Round": "fedloom.method",
        "Sweep": "fedloom.method",
        "Task": "fedloom.method",
        "Train": "fedloom.method",
        "Turn": "fedloom.method",
        "Nets": "fedloom.nets",
        "Stream": "fedloom.rng",
        **{name: f"fedloom.methods.{module}" for module, name in _CLASSES.items()},
    },
)
