"""Data sets, their partition over clients, and the examples each client sees. Knows neither methods nor engines."""

from fedloom.data.catalogue import SOURCES, Source
from fedloom.data.dataset import Dataset, from_arrays
from fedloom.data.federation import Federation
from fedloom.data.partition import Partition, partition
from fedloom.data.sources import load

__all__ = ["SOURCES", "Dataset", "Federation", "Partition", "Source", "from_arrays", "load", "partition"]
