"""The model zoo: plain torch modules that read like their papers, each cut into a body and a linear head."""

from fedloom.models.arch import ZOO, Arch, OutsideArch, arch, option_defaults
from fedloom.models.fedrir import ImageGenerator, InformationDistillation
from fedloom.models.vtc import VtcDecoder

__all__ = [
    "ZOO",
    "Arch",
    "ImageGenerator",
    "InformationDistillation",
    "OutsideArch",
    "VtcDecoder",
    "arch",
    "option_defaults",
]
