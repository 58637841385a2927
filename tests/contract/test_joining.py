"""Clients that join after training. They send nothing to the server, and do not change the shared weights that they receive."""

import json

import pytest
import torch

from contract import assert_close, assert_same, left_by
from fedloom import FedPer, FedRIR, Stream, Task, Train, tree
from fedloom.errors import ConfigError
from fedloom.experiment.loop import Experiment
from fedloom.inputs import InputSpec
from fedloom.losses import cross_entropy
from fedloom.method import Interleave, Sweep, without
from fedloom.methods.registry import METHODS
from fedloom.models import arch
from fedloom.nets import read_weights, select, write_weights
from fedloom.objectives import Classification
from fedloom.training.turn import fresh_modules
from small import brief, kinds_first

SETTINGS = {
    "clients": 6,
    "join.clients": 2,
    "join.turns": 3,
    "cohort": 3,
    "rounds": 3,
    "checkpoint_every": 1,
    "data.rows": 300,
}
SHORT = {**SETTINGS, "rounds": 2, "join.turns": 2, "data.rows": 200}
JOINABLE = [name for name in METHODS if name != "centralised"]
# with fedbn, because the MLP has no normalisation layers
ALL_TRAVELS = {
    "ccvr",
    "clustered_sampling",
    "fedadagrad",
    "fedadam",
    "fedasam",
    "fedavg",
    "fedavgm",
    "fedyogi",
    "fedbn",
    "fedbuff",
    "fedcross",
    "feddisco",
    "feddyn",
    "fedexp",
    "fedgamma",
    "fedgen",
    "fedlc",
    "fedmr",
    "fedmut",
    "fednova",
    "fedntd",
    "fedprox",
    "fedsam",
    "fedspeed",
    "ifca",
    "moon",
    "scaffold",
}


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


@pytest.mark.parametrize("name", kinds_first(JOINABLE))
def test_newcomers_leave_training_and_the_server_as_they_are(experiment, tmp_path, name):
    settings = {**SHORT, **brief(name)}
    run = experiment(name, **settings)
    with_newcomers = left_by(run)
    assert {row["client"] for row in with_newcomers.turns} <= {0, 1, 2, 3}
    assert with_newcomers.summary["clients"] == 4
    dealt = json.loads((run.folder.path / "partition.json").read_text())
    splits = {split: dealt[split][:4] for split in ("train", "valid", "test")}
    (tmp_path / "four.json").write_text(json.dumps(splits))
    four = {"name": "file", "path": str(tmp_path / "four.json")}
    without_them = left_by(experiment(name, **{**settings, "join.clients": 0, "clients": 4, "partition": four}))
    assert tree.equal(with_newcomers.server, without_them.server)
    assert all(tree.equal(a, b) for a, b in zip(with_newcomers.clients, without_them.clients, strict=True))
    assert with_newcomers.summary["uplink_bytes"] == without_them.summary["uplink_bytes"]
    assert "new_clients" not in without_them.summary


LITTLE_TO_LEARN = {"fedala", "fedpac", "fedtgp", "per_fedavg", "pfedme"}
"""Methods with which a new client learns little in this test.

FedALA and FedPAC send heads, FedTGP's pull is too strong for this learning rate, and Per-FedAvg and pFedMe take few small steps.
"""


@pytest.mark.parametrize("name", JOINABLE)
def test_travelling_weights_are_frozen_and_private_ones_are_trained(experiment, name):
    learning = {"join.turns": 8, "rounds": 2, "data.rows": 600, "method.lr": 8e-3 if name == "fedrir" else 0.1}
    run = experiment(name, **{**SETTINGS, **learning, **brief(name)})
    found = run.run()["new_clients"]
    down = run.hooks.deploy(run.server, run.done)
    for i in (4, 5):
        _, client, _ = run.engine.personal(2, down, i)
        if run.method.shared and not run.method.adapt():
            assert tree.equal(run.method.travelling(client.weights), down.common["weights"])
        kept = run.engine.client(i)
        assert tree.structure(kept._asdict()) == tree.structure(run.engine.client(0)._asdict())
        assert tree.equal(kept.opts, run.problem.initial(i, read_weights(run.problem.modules(0))).opts)
    assert [each["client"] for each in found["each"]] == [4, 5]
    if name in ALL_TRAVELS:
        assert found["joined"] == found["received"]
    elif name not in LITTLE_TO_LEARN:
        assert found["joined"] > found["received"] + 0.1


def test_a_newcomers_head_learns_on_the_body_that_it_received(experiment):
    settings = {**SETTINGS, "join.turns": 1, "batch_size": 1000, "method.local_epochs": 3, "method.lr": 0.1}
    run = experiment("fedper", **settings)
    run.run()
    modules = run.problem.modules(0)
    down = run.hooks.deploy(run.server, run.done).common["weights"]
    write_weights(modules, tree.merge(run.problem.initial(5, read_weights(modules)).weights, down))
    model, (x, y) = modules["model"], run.data.train(5)
    head = list(model.head.requires_grad_().parameters())
    for _ in range(3):
        slopes = torch.autograd.grad(cross_entropy(model(x), y), head)
        for p, slope in zip(head, slopes, strict=True):
            p.data -= 0.1 * slope
    kept = run.engine.client(5).weights["params"]
    torch.testing.assert_close(kept, {f"model.head.{name}": p.data for name, p in model.head.named_parameters()})


@pytest.mark.parametrize("name", ["fedrir", "fedper"])
def test_running_statistics_move_where_they_stay_and_only_there(experiment, name):
    choice = {"model": "fedrir_cnn", "width": 16} if name == "fedrir" else {"model": "resnet8"}
    run = experiment(name, **{**SETTINGS, **choice, "rounds": 1, "data.rows": 160, "partition": {"name": "iid"}})
    run.run()
    down = run.hooks.deploy(run.server, run.done)
    _, client, _ = run.engine.personal(1, down, 4)
    initial = run.problem.initial(4, read_weights(run.problem.modules(0))).weights
    net = "gfe" if name == "fedrir" else "model"
    stays = select(client.weights, (net,))["buffers"]
    if (
        name == "fedrir"
    ):  # private running statistics: gfe is in training mode, although none of its parameters is trained
        assert all(not torch.equal(b, initial["buffers"][n]) for n, b in stays.items() if n.endswith("running_mean"))
    else:
        assert all(torch.equal(b, down.common["weights"]["buffers"][n]) for n, b in stays.items())


def test_fedbn_fits_normalisation_layers(experiment):
    run = experiment(
        "fedbn", **{**SETTINGS, "model": "resnet8", "rounds": 1, "data.rows": 160, "partition": {"name": "iid"}}
    )
    run.run()
    received, own = run.server["weights"]["params"], run.engine.client(5).weights["params"]
    norms = {name for name in run.problem.modules(0)["model"].state_dict() if ".norm" in f".{name}"}
    assert own
    assert received.keys().isdisjoint(own)
    initial = run.problem.initial(5, read_weights(run.problem.modules(0))).weights["params"]
    assert all(not torch.equal(p, initial[name]) for name, p in own.items())
    assert {name.removeprefix("model.") for name in own} <= norms


def test_local_updates_of_a_newcomer_count_from_0(experiment):
    """The learning rate is 0 after a newcomer's first local update, so three updates equal one. If it were 0 earlier, none would count."""
    settings = {**SETTINGS, "method.lr": 0.1, "method.lr_decay": 1e-9}
    one, three, constant = (
        experiment("fedper", **{**settings, **choice})
        for choice in ({"join.turns": 1}, {"join.turns": 3}, {"join.turns": 1, "rounds": 1, "method.lr_decay": 1.0})
    )
    for run in (one, three, constant):
        run.run()
    initial = one.problem.initial(5, read_weights(one.problem.modules(0))).weights["params"]
    for name, p in one.engine.client(5).weights["params"].items():
        assert (p - initial[name]).abs().max() > 1e-3
        torch.testing.assert_close(three.engine.client(5).weights["params"][name], p, rtol=0, atol=1e-6)


def test_newcomers_receive_the_decoded_downlink(experiment):
    run = experiment("fedper", **SETTINGS, downlink="int8")
    run.run()
    exact = run.hooks.deploy(run.server, run.done)
    arrived = run.problem.codec.through(exact).common["weights"]["params"]
    _, client, _ = run.engine.personal(3, run.problem.codec.through(exact), 5)
    for name, p in arrived.items():
        assert torch.equal(client.weights["params"][name], p)
        assert name.endswith("bias") or not torch.equal(p, run.server["weights"]["params"][name])


@pytest.mark.parametrize(
    ("name", "engines"),
    [
        ("fedrir", ["processes"]),
        ("fedper", ["debug+bytes+sequential", "vectorised"]),
        ("fedvtc", ["processes", "vectorised"]),
    ],
)
def test_every_engine_lets_the_same_clients_join(experiment, name, engines):
    settings = {**SHORT, **brief(name)}
    one = left_by(experiment(name, **settings))
    for engine in engines:
        other = left_by(experiment(name, **{**settings, "engine": engine, "engine.workers": 2}))
        (assert_close if engine == "vectorised" else assert_same)(one, other)
        assert other.summary["new_clients"]["joined"] == one.summary["new_clients"]["joined"]


class StopError(Exception):
    """Simulates a kill."""


@pytest.mark.parametrize("when", ["in training", "after the first newcomer"])
def test_an_interrupted_run_ends_the_same(experiment, when):
    whole = left_by(experiment("fedrir", **SHORT))
    run = experiment("fedrir", **SHORT)

    def stop(done, rounds, row):
        if (done == 1 and when == "in training") or row.get("joined") == "1/2":
            raise StopError

    with pytest.raises(StopError):
        run.run(stop)
    again = Experiment.resume(run.folder.path)
    assert_same(left_by(again), whole)


def test_a_newcomer_can_be_looked_at_later(experiment):
    run = experiment("fedper", **SETTINGS)
    found = run.run()["new_clients"]["each"]
    again = Experiment.reopen(run.folder.path)
    for each in found:
        x, y = again.data.test(each["client"])
        right = again.personal_model(each["client"])(x).argmax(1) == y
        assert float(right.double().mean()) == each["joined"]


def test_progress_counts_newcomers(experiment):
    told = []

    def tell(done, rounds, row):
        told.append((done, rounds, row.get("joined")))

    experiment("local", **SETTINGS).run(tell)
    assert told == [(1, 3, None), (2, 3, None), (3, 3, None), (3, 3, "1/2"), (3, 3, "2/2")]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "centralised"}, "join.clients=2: centralised pools all examples in one place"),
        ({"join.clients": 6}, "join.clients=6: there are only 6 clients, and at least one must train"),
        ({"cohort": 5}, "cohort=5: there are only 6 clients, 2 of which join after training"),
    ],
)
def test_invalid_join_settings_are_refused(experiment, settings, words):
    with pytest.raises(ConfigError, match=words):
        experiment(settings.pop("method", "fedavg"), **{**SETTINGS, **settings})


# the phases of a newcomer


def weights_of(method, model="mlp"):
    choice = arch(model, (1, 8, 8), 10)
    return read_weights(
        fresh_modules(
            lambda: method.nets(
                choice,
                Task(
                    n_clients=4,
                    max_cohort=4,
                    objective=Classification.numbered(10),
                    spec=InputSpec.plain((1, 8, 8)),
                    width=choice.features,
                    rounds=5,
                ),
            ),
            Stream(0),
        )
    )


def test_fedper_trains_its_head_alone():
    weights = weights_of(FedPer())
    (phase,) = without(FedPer().phases(), weights, FedPer().travelling(weights))
    assert isinstance(phase, Train)
    assert phase.params == ("model.head.weight", "model.head.bias")
    assert phase.modes == ("model",)


@pytest.mark.parametrize(("buffers", "modes"), [("private", ("gfe", "head")), ("shared", ("head",))])
def test_fedrir_keeps_its_stages_without_gfe(buffers, modes):
    method = FedRIR(buffers=buffers)
    weights = weights_of(method, "fedrir_cnn")
    first, second = without(method.phases(), weights, method.travelling(weights))
    assert first.name == "mcsl"
    assert {name.partition(".")[0] for name in first.params} == {"csfe", "generator"}
    assert isinstance(second, Interleave)
    assert second.epochs == method.local_epochs
    fit_q, classify = second.members
    assert {name.partition(".")[0] for name in fit_q.params} == {"idm"}
    assert set(classify.params) == {"head.weight", "head.bias"}
    assert classify.modes == modes


def keep(nets, batch, total, down, memory):
    return total


def test_phases_without_parameters_to_train_go_and_sweeps_stay():
    method = FedPer()
    weights = weights_of(method)
    sweep = Sweep("count", keep)
    assert without((*method.phases(), sweep), weights, weights) == (sweep,)
    everything = without(method.phases(), weights, {"params": {}, "buffers": {}})
    assert set(everything[0].params) == weights["params"].keys()
