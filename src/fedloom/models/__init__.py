"""The model zoo: plain torch modules that follow their papers, each split into a body and a linear head."""

from typing import TYPE_CHECKING

from fedloom import lazy
from fedloom.models.zoo import ZOO

if TYPE_CHECKING:
    from fedloom.models.arch import Arch, OutsideArch, arch, option_defaults
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

lazy.export(
    __name__,
    {
        **dict.fromkeys(("Arch", "OutsideArch", "arch", "option_defaults"), "fedloom.models.arch"),
        **dict.fromkeys(("ImageGenerator", "InformationDistillation"), "fedloom.models.fedrir"),
        "VtcDecoder": "fedloom.models.vtc",
    },
)
