"""The debug engine detects every broken rule and names it."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from fedloom import ConfigError, Downlink, FedAvg, FedRIR, Local, MethodError, Set, Sweep, Train, tree
from fedloom.losses import cross_entropy
from fedloom.nets import write_weights


@dataclass(frozen=True)
class Scribbler(FedAvg):
    """Writes into its downlink."""

    def uplink(self, client, received, down, turn):
        next(iter(down["weights"]["params"].values())).add_(1)
        return super().uplink(client, received, down, turn)


@dataclass(frozen=True)
class LeakyNet(FedRIR):
    """Sends private nets."""

    def uplink(self, client, received, down, turn):
        return {"weights": client.weights}, client.memory


@dataclass(frozen=True)
class LeakyPart(FedAvg):
    """Shares the body, and sends the head too."""

    shared: ClassVar[tuple[str, ...]] = ("model:body",)

    def uplink(self, client, received, down, turn):
        return {"weights": client.weights}, client.memory


@dataclass(frozen=True)
class Growing(Local):
    """Its memory grows in a local update."""

    def uplink(self, client, received, down, turn):
        return {}, {"extra": torch.zeros(2)}


@dataclass(frozen=True)
class Retyping(Local):
    """Its memory changes its dtype."""

    def init_memory(self, weights, task, data):
        return {"n": torch.zeros(2, dtype=torch.float32)}

    def uplink(self, client, received, down, turn):
        return {}, {"n": client.memory["n"].double()}


@dataclass(frozen=True)
class Exploding(FedAvg):
    """Its loss is NaN."""

    def loss(self, nets, batch, down, memory):
        return cross_entropy(nets.model(batch.x), batch.y) * float("nan")


@dataclass(frozen=True)
class PrivatelyExploding(Local):
    """Its loss is NaN too, for a model that stays with the client."""

    loss = Exploding.loss


COMMON = torch.zeros(1, dtype=torch.float64)


@dataclass(frozen=True)
class Entangled(FedAvg):
    """All clients remember the same tensor, and write to it."""

    def init_memory(self, weights, task, data):
        return {"common": COMMON}

    def uplink(self, client, received, down, turn):
        client.memory["common"].add_(1)
        return super().uplink(client, received, down, turn)


@dataclass(frozen=True)
class Misnaming(FedAvg):
    """Trains a net that does not exist."""

    def phases(self):
        return (Train("train", self.loss, ("modle",), self.local_optimizer()),)


@dataclass(frozen=True)
class Forgetful(FedAvg):
    """Sends half of the model."""

    def downlink(self, server, cohort, round):
        down = super().downlink(server, cohort, round)
        half = dict(list(down.common["weights"]["params"].items())[:2])
        return down._replace(common={"weights": {"params": half, "buffers": {}}})


@dataclass(frozen=True)
class Doubled(FedAvg):
    """Draws a client twice."""

    def cohort(self, server, task, size, round):
        return [1, 1]


BROKEN = {
    Scribbler: r"Scribbler\.uplink changes 'received/params/model\.\S+' in place; its inputs are read-only",
    LeakyNet: r"round 0, client 0: the private tensor 'csfe\.\S+' is in the uplink",
    LeakyPart: r"round 0, client 0: the private tensor 'model\.head\.bias' is in the uplink",
    Growing: r"round 0, client 0: the structure of its state changed at 'memory/extra'",
    Retyping: r"round 0, client 0: the structure of its state changed at 'memory/n'",
    Exploding: r"round 0, client 0 sends 'weights/params/model\.\S+' \(shape .*\), which is not finite",
    PrivatelyExploding: r"round 0, client 0 keeps 'weights/params/model\.\S+' \(shape .*\), which is not finite",
    Forgetful: r"the downlink must contain all shared weights, but lacks 2 of them, such as params/\S+",
    Doubled: r"round 0: a cohort must consist of distinct clients from 0 to 3, but is \[1, 1\]",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda cls: cls.__name__)
def test_a_broken_rule_is_named(experiment, broken):
    run = experiment(broken(), engine="debug+sequential", model="mlp")
    with pytest.raises(MethodError, match=BROKEN[broken]):
        run.run()


def test_a_net_that_does_not_exist_is_named_before_the_first_round(experiment):
    with pytest.raises(
        ConfigError, match="Misnaming trains modle, but the pattern 'modle' matches nothing; nets: model"
    ):
        experiment(Misnaming())
    with pytest.raises(ConfigError, match=r"model=logistic: FedProto trains body, head, but .* matches nothing"):
        experiment("fedproto", model="logistic")


def test_a_client_that_changes_without_working_is_named(experiment):
    COMMON.zero_()
    run = experiment(Entangled(), engine="debug+sequential", cohort=1)
    with pytest.raises(MethodError, match=r"Entangled\.uplink changes 'memory/common' in place"):
        run.run()


def test_a_broken_rule_is_named_on_any_inner_engine(experiment):
    run = experiment(Scribbler(), engine="debug")
    with pytest.raises(MethodError, match=r"changes .* in place"):
        run.run()


def test_an_error_says_where_it_happened(experiment):
    @dataclass(frozen=True)
    class Failing(FedAvg):
        def loss(self, nets, batch, down, memory):
            raise ZeroDivisionError("by zero")

    for engine in ("sequential", "processes"):
        run = experiment(Failing(), engine=engine)
        with pytest.raises(ZeroDivisionError) as caught:
            run.run()
        notes = "\n".join(caught.value.__notes__)
        assert "in phase 'train', after 0 steps" in notes
        assert "round 1" in notes
        assert "client" in notes


@dataclass(frozen=True)
class WritesIntoServer(FedAvg):
    """Changes the server's state in place."""

    def aggregate(self, server, uplinks, round):
        for name, p in server["weights"]["params"].items():
            p.copy_(uplinks[0]["weights"]["params"][name])
        return server


@dataclass(frozen=True)
class WritesIntoUplinks(FedAvg):
    """Accumulates in the first uplink."""

    def aggregate(self, server, uplinks, round):
        first = uplinks[0]["weights"]
        for p in first["params"].values():
            p.mul_(0.5)
        return {"weights": first}


@dataclass(frozen=True)
class LogsInPlace(FedAvg):
    """Changes uplinks in `server_logs`."""

    def server_logs(self, server, uplinks, round):
        next(iter(uplinks[0]["weights"]["params"].values())).zero_()
        return {}


@dataclass(frozen=True)
class SweepsInPlace(FedAvg):
    """Halves the examples that it visits."""

    def init_memory(self, weights, task, data):
        return {"seen": {"n": torch.zeros(())}}

    def phases(self):
        return Sweep("seen", self.visit), *super().phases()

    def visit(self, nets, batch, total, down, memory):
        batch.x.mul_(0.5)
        return {"n": total["n"] + len(batch.y)}


@dataclass(frozen=True)
class WorksInPlace(FedAvg):
    """Halves the received weights in a Set phase."""

    def phases(self):
        return Set("work", self.work), *super().phases()

    def work(self, weights, down, memory):
        next(iter(down["weights"]["params"].values())).mul_(0.5)
        return weights


@dataclass(frozen=True)
class SetsLess(FedAvg):
    """Loses a tensor in a Set phase."""

    def phases(self):
        return Set("work", self.work), *super().phases()

    def work(self, weights, down, memory):
        return {**weights, "params": dict(list(weights["params"].items())[1:])}


@dataclass(frozen=True)
class KeepsInPlace(FedAvg):
    """Adds to its memory in place in `uplink`."""

    def init_memory(self, weights, task, data):
        return {"n": torch.zeros(())}

    def uplink(self, client, received, down, turn):
        client.memory["n"].add_(1)
        return super().uplink(client, received, down, turn)


@dataclass(frozen=True)
class DeploysEach(FedAvg):
    """Has a message for one client too few."""

    def deploy(self, server, task, round):
        return Downlink({}, [self.downlink(server, (), round).common] * (task.n_clients - 1))


@dataclass(frozen=True)
class SendsToOne(FedAvg):
    """Has a message for one member of the cohort only."""

    def downlink(self, server, cohort, round):
        return Downlink({}, [super().downlink(server, cohort, round).common])


IN_PLACE = {
    WritesIntoServer: "WritesIntoServer.aggregate changes 'server/weights/params/.*' in place",
    WritesIntoUplinks: "WritesIntoUplinks.aggregate changes 'uplink 0/weights/params/.*' in place",
    LogsInPlace: "LogsInPlace.server_logs changes 'uplink 0/weights/params/.*' in place",
    SweepsInPlace: "phase 'seen' changes 'rows/x' in place",
    WorksInPlace: "phase 'work' changes '(weights|down/weights)/params/.*' in place",
    KeepsInPlace: "KeepsInPlace.uplink changes 'memory/n' in place",
    SetsLess: "phase 'work' must return all weights .* 'params/model.body.*' is missing",
    SendsToOne: "round 0: SendsToOne.downlink returns `each` with 1 trees for a cohort of",
    DeploysEach: "DeploysEach.deploy returns `each` with 3 trees; it must have one for each of the 4 clients",
}


@pytest.mark.parametrize("method", IN_PLACE, ids=lambda method: method.__name__)
@pytest.mark.parametrize("engine", ["sequential", "processes", "vectorised"])
def test_inputs_of_hooks_are_read_only_on_every_engine(experiment, method, engine):
    with pytest.raises(MethodError, match=IN_PLACE[method]):
        experiment(method(), engine=engine).run()


@dataclass(frozen=True)
class RandomStart(FedAvg):
    """Draws part of the server's state from torch's own generator."""

    def init_server(self, weights, task, round):
        return super().init_server(weights, task, round) | {"net": torch.randn(3)}

    def aggregate(self, server, uplinks, round):
        return super().aggregate(server, uplinks, round) | {"net": server["net"] + torch.randn(3)}


def test_torch_draws_of_server_hooks_depend_on_the_seed_alone(experiment):
    def net(seed):
        before = torch.get_rng_state()
        run = experiment(RandomStart(), seed=seed)
        run.run()
        assert torch.equal(before, torch.get_rng_state())
        torch.rand(1)
        return run.server["net"]

    first = net(0)
    assert torch.equal(first, net(0))
    assert not torch.equal(first, net(1))


@dataclass(frozen=True)
class Sceptical(FedAvg):
    """Clients predict with zero weights, whatever they receive."""

    def receive(self, weights, down, memory):
        return tree.zeros_like(super().receive(weights, down, memory))

    def aggregate(self, server, uplinks, round):
        return server  # the initial state


def test_the_servers_score_is_of_its_own_weights_whatever_clients_make_of_them(experiment):
    """A model of zeros predicts class 0 for every example; the server's initial weights do not."""
    run = experiment(Sceptical(), **{"partition.name": "iid"})
    run.run()
    modules = {net: module.double().eval() for net, module in run.problem.modules(0).items()}
    write_weights(modules, run.server["weights"])
    x, y = run.data.common()
    with torch.no_grad():
        expected = float((modules["model"](x.double()).argmax(1) == y).double().mean())
    assert run.rows[-1]["server_accuracy"] == pytest.approx(expected)
    assert run.rows[-1]["general_accuracy"] == pytest.approx(float((y == 0).double().mean()))
