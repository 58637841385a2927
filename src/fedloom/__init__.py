"""fedloom: personalised and heterogeneous federated learning in PyTorch.

Modules are imported when they are first used, so `import fedloom` does not import torch.
"""

from typing import TYPE_CHECKING

from fedloom import lazy
from fedloom._version import __version__ as __version__

if TYPE_CHECKING:
    from fedloom import losses as losses
    from fedloom import tree as tree
    from fedloom.api.comparison import compare as compare
    from fedloom.api.runs import Run as Run
    from fedloom.api.runs import load_data as load_data
    from fedloom.api.runs import open as open
    from fedloom.api.runs import resume as resume
    from fedloom.api.runs import run as run
    from fedloom.data import Dataset as Dataset
    from fedloom.data import Partition as Partition
    from fedloom.data import from_arrays as from_arrays
    from fedloom.errors import ConfigError as ConfigError
    from fedloom.errors import DataError as DataError
    from fedloom.errors import FedloomError as FedloomError
    from fedloom.errors import MethodError as MethodError
    from fedloom.errors import RunFolderError as RunFolderError
    from fedloom.errors import UsageError as UsageError
    from fedloom.errors import WireError as WireError
    from fedloom.method import Batch as Batch
    from fedloom.method import Client as Client
    from fedloom.method import ClientData as ClientData
    from fedloom.method import Downlink as Downlink
    from fedloom.method import Interleave as Interleave
    from fedloom.method import Method as Method
    from fedloom.method import Paper as Paper
    from fedloom.method import Round as Round
    from fedloom.method import Set as Set
    from fedloom.method import Sweep as Sweep
    from fedloom.method import Task as Task
    from fedloom.method import Train as Train
    from fedloom.method import Turn as Turn
    from fedloom.methods import *  # noqa: F403
    from fedloom.methods.composition import compose as compose
    from fedloom.nets import Nets as Nets
    from fedloom.rng import Stream as Stream

__all__ = sorted([*lazy.export(__name__), "__version__"])
