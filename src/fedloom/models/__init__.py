"""The model zoo: plain torch modules that follow their papers closely, each split into a body and a linear head.

`arch.py` builds and checks an architecture, from the zoo or from a user's file. To add a model, write a function in a file in this package
and add a line to `zoo.py`. This package does not depend on federated learning.
"""

from typing import TYPE_CHECKING

from fedloom import lazy
from fedloom.models.zoo import ZOO as ZOO

if TYPE_CHECKING:
    from fedloom.models.arch import Arch as Arch
    from fedloom.models.arch import OutsideArch as OutsideArch
    from fedloom.models.arch import arch as arch
    from fedloom.models.arch import option_defaults as option_defaults
    from fedloom.models.fedrir import ImageGenerator as ImageGenerator
    from fedloom.models.fedrir import InformationDistillation as InformationDistillation
    from fedloom.models.lora import merge_adapters as merge_adapters
    from fedloom.models.vtc import VtcDecoder as VtcDecoder

__all__ = sorted(lazy.export(__name__))
