"""Data sets, their partition across clients, and the examples of each client. This package knows neither methods nor engines."""

from typing import TYPE_CHECKING

from fedloom import lazy
from fedloom.data.catalogue import SOURCES, Source

if TYPE_CHECKING:
    from fedloom.data.dataset import Dataset, from_arrays
    from fedloom.data.federation import Federation
    from fedloom.data.partition import Partition, partition
    from fedloom.data.sources import load

__all__ = ["SOURCES", "Dataset", "Federation", "Partition", "Source", "from_arrays", "load", "partition"]

lazy.export(
    __name__,
    {
        **dict.fromkeys(("Dataset", "from_arrays"), "fedloom.data.dataset"),
        "Federation": "fedloom.data.federation",
        **dict.fromkeys(("Partition", "partition"), "fedloom.data.partition"),
        "load": "fedloom.data.sources",
    },
)
