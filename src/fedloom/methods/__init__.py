"""Federated learning methods, one per file, written as in their papers.

To add a method, write a file here and add a line to the block below; `registry.py` finds it by name. A method may import nets, losses,
models and other methods, but never engines, data or experiments.
"""

from typing import TYPE_CHECKING

from fedloom import lazy

if TYPE_CHECKING:
    from fedloom.methods.apfl import APFL as APFL
    from fedloom.methods.ccvr import CCVR as CCVR
    from fedloom.methods.centralised import Centralised as Centralised
    from fedloom.methods.clustered_sampling import ClusteredSampling as ClusteredSampling
    from fedloom.methods.ditto import Ditto as Ditto
    from fedloom.methods.fd import FD as FD
    from fedloom.methods.fedadagrad import FedAdagrad as FedAdagrad
    from fedloom.methods.fedadam import FedAdam as FedAdam
    from fedloom.methods.fedala import FedALA as FedALA
    from fedloom.methods.fedamp import FedAMP as FedAMP
    from fedloom.methods.fedas import FedAS as FedAS
    from fedloom.methods.fedasam import FedASAM as FedASAM
    from fedloom.methods.fedavg import FedAvg as FedAvg
    from fedloom.methods.fedavg_ft import FedAvgFT as FedAvgFT
    from fedloom.methods.fedavgm import FedAvgM as FedAvgM
    from fedloom.methods.fedbabu import FedBABU as FedBABU
    from fedloom.methods.fedbn import FedBN as FedBN
    from fedloom.methods.fedbuff import FedBuff as FedBuff
    from fedloom.methods.fedcp import FedCP as FedCP
    from fedloom.methods.fedcross import FedCross as FedCross
    from fedloom.methods.feddbe import FedDBE as FedDBE
    from fedloom.methods.feddisco import FedDisco as FedDisco
    from fedloom.methods.feddyn import FedDyn as FedDyn
    from fedloom.methods.fedexp import FedExP as FedExP
    from fedloom.methods.fedfomo import FedFomo as FedFomo
    from fedloom.methods.fedgamma import FedGamma as FedGamma
    from fedloom.methods.fedgen import FedGen as FedGen
    from fedloom.methods.fedgh import FedGH as FedGH
    from fedloom.methods.fedkd import FedKD as FedKD
    from fedloom.methods.fedlc import FedLC as FedLC
    from fedloom.methods.fedmr import FedMR as FedMR
    from fedloom.methods.fedmrl import FedMRL as FedMRL
    from fedloom.methods.fedmut import FedMut as FedMut
    from fedloom.methods.fednova import FedNova as FedNova
    from fedloom.methods.fedntd import FedNTD as FedNTD
    from fedloom.methods.fedpac import FedPAC as FedPAC
    from fedloom.methods.fedper import FedPer as FedPer
    from fedloom.methods.fedproto import FedProto as FedProto
    from fedloom.methods.fedprox import FedProx as FedProx
    from fedloom.methods.fedrep import FedRep as FedRep
    from fedloom.methods.fedrir import FedRIR as FedRIR
    from fedloom.methods.fedrir_moments import FedRIRMoments as FedRIRMoments
    from fedloom.methods.fedrod import FedRoD as FedRoD
    from fedloom.methods.fedsam import FedSAM as FedSAM
    from fedloom.methods.fedspeed import FedSpeed as FedSpeed
    from fedloom.methods.fedtgp import FedTGP as FedTGP
    from fedloom.methods.fedtype import FedType as FedType
    from fedloom.methods.fedvtc import FedVTC as FedVTC
    from fedloom.methods.fedyogi import FedYogi as FedYogi
    from fedloom.methods.fml import FML as FML
    from fedloom.methods.gpfl import GPFL as GPFL
    from fedloom.methods.ifca import IFCA as IFCA
    from fedloom.methods.lg_fedavg import LGFedAvg as LGFedAvg
    from fedloom.methods.local import Local as Local
    from fedloom.methods.moon import Moon as Moon
    from fedloom.methods.per_fedavg import PerFedAvg as PerFedAvg
    from fedloom.methods.pfedme import PFedMe as PFedMe
    from fedloom.methods.scaffold import Scaffold as Scaffold

_ORIGINS = lazy.export(__name__)
CLASSES = {module.rpartition(".")[2]: name for name, module in _ORIGINS.items()}
"""The class of each method, by the name of its file."""

__all__ = sorted(_ORIGINS)
