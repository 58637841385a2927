"""Data sets, their partition over clients, and the examples that each client sees.

`sources.py` loads a data set by name, `partition.py` divides examples among clients, and `federation.py` returns normalised examples. To
add a data set, add it to `catalogue.py`. This package does not depend on methods or engines.
"""

from typing import TYPE_CHECKING

from fedloom import lazy
from fedloom.data.catalogue import SOURCES as SOURCES
from fedloom.data.catalogue import Source as Source

if TYPE_CHECKING:
    from fedloom.data.arrays import from_arrays as from_arrays
    from fedloom.data.dataset import Dataset as Dataset
    from fedloom.data.dataset import with_classes as with_classes
    from fedloom.data.factors import with_factor as with_factor
    from fedloom.data.federation import Federation as Federation
    from fedloom.data.layouts import TableOptions as TableOptions
    from fedloom.data.layouts import TextOptions as TextOptions
    from fedloom.data.partition import Partition as Partition
    from fedloom.data.partition import default_scheme as default_scheme
    from fedloom.data.partition import given_partition as given_partition
    from fedloom.data.partition import partition as partition
    from fedloom.data.sources import load as load

__all__ = sorted(lazy.export(__name__))
