"""Composition of one method's server with another's clients."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fedloom import ConfigError, FedASAM, FedAvg, FedMR, FedProx, FedRIR, Local, Scaffold, compose, tree
from fedloom.config.parsing import from_words
from fedloom.config.settings import make_method, make_settings
from fedloom.methods.registry import method_class
from fedloom.tools.compare import plan


def test_local_hyper_parameters_are_the_clients_and_others_stay_with_their_method():
    joined = compose(server=FedMR(unit="block", lr=0.3), client=FedProx(mu=0.2, lr=0.02, local_epochs=3))
    assert (joined.unit, joined.mu, joined.lr, joined.local_epochs, joined.momentum) == ("block", 0.2, 0.02, 3, 0.0)
    settings = make_settings(from_words(["method=fedmr+fedprox", "method.unit=block", "method.mu=0.2"]))
    named = make_method(settings.method)
    assert (named.unit, named.mu, named.lr) == ("block", 0.2, FedProx.lr)
    assert method_class("fedmr+fedrir")().optimizer == "adam"
    assert method_class("fedmr+fedrir").shared == ("gfe",)


def test_one_half_that_does_nothing_gives_the_other_method(experiment):
    pairs = [
        (compose(server=FedMR(), client=FedProx(mu=0.0, lr=0.1)), FedMR(lr=0.1, momentum=0.0, local_epochs=1)),
        (compose(server=FedAvg(), client=FedProx(mu=0.5)), FedProx(mu=0.5)),
        (compose(server=FedMR(), client=FedAvg(lr=0.1)), FedMR(lr=0.1, momentum=0.0, local_epochs=1)),
    ]
    for joined, alone in pairs:
        one, other = experiment(joined), experiment(alone)
        one.run(), other.run()
        assert tree.structure(one.server) == tree.structure(other.server)
        torch.testing.assert_close(tree.leaves(one.server), tree.leaves(other.server), rtol=0, atol=1e-12)


def test_both_halves_work(experiment):
    plain = experiment("fedmr", **{"method.lr": 0.1})
    joined = {name: experiment(f"fedmr+{name}", **{"method.lr": 0.1}) for name in ("fedprox", "fedasam", "fedrir")}
    for run in (plain, *joined.values()):
        run.run()
        assert "slots" in run.server
        assert "server.slot_cosine" in run.rows[0]
    assert all(path.startswith("slots/params/gfe.") for path in tree.structure(joined["fedrir"].server))


def test_composed_methods_can_be_compared():
    found = plan(from_words(["method=fedmr,fedmr+fedprox", "fedmr+fedprox.mu=0.3", "method.unit=block"]))
    rows = {row.label: row.method for row in found.rows}
    assert rows["fedmr+fedprox"]["mu"] == 0.3
    assert rows["fedmr"]["unit"] == rows["fedmr+fedprox"]["unit"] == "block"


@dataclass(frozen=True)
class Segmented(FedProx):
    """FedProx with a hyper-parameter that FedMR also has."""

    segment: Any = 3


@pytest.mark.parametrize(
    ("server", "client", "message"),
    [
        (FedMR, Scaffold, "Scaffold cannot be the clients' half, because it overrides server hooks .init_server, downlink, aggregate"),
        (FedMR, FedMR, "FedMR cannot be the clients' half"),
        (FedRIR, FedProx, "FedRIR cannot be the server's half, because it overrides client hooks .nets, phases, loss"),
        (Scaffold, FedASAM, "Scaffold cannot be the server's half"),
        (Local, FedProx, "Local cannot be the server's half"),
        (FedMR, Local, "method=FedMR.Local: one of them is not a federated method"),
        (FedMR, Segmented, "method=FedMR.Segmented: both define 'segment'"),
    ],
)  # fmt: skip
def test_incompatible_methods_are_refused(server, client, message):
    with pytest.raises(ConfigError, match=message):
        compose(server=server(), client=client())


@pytest.mark.parametrize("name", ["fedmr+fedprocks", "fedmr+", "+fedprox", "fedmr+fedprox+fedavg"])
def test_wrong_names_are_refused(name):
    with pytest.raises(ConfigError, match="method="):
        method_class(name)
