"""FedPer, FedRep, FedBN and FedBABU: the weights that are sent, those that stay, and those that each phase trains."""

import pytest
import torch

from fedloom import FedAvg, FedBABU, FedBN, FedPer, FedRep, Stream, Task, Train, Turn, tree
from fedloom.inputs import InputSpec
from fedloom.method import Client
from fedloom.models import arch
from fedloom.nets import norm_layers, read_weights, select
from fedloom.objectives import Classification
from fedloom.training.batches import Plan, Rows
from fedloom.training.context import ClientContext
from fedloom.training.gradients import Gradients
from fedloom.training.turn import fresh_modules, run_phases
from small import initial_weights, spied


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


TASK = Task(
    n_clients=4,
    max_cohort=4,
    objective=Classification.numbered(10),
    spec=InputSpec.plain((1, 8, 8)),
    width=16,
    rounds=5,
)


def messages(run):
    """Run the experiment to the end. Return the downlinks and uplinks."""
    rounds = spied(run)
    run.run()
    return {
        "down": [message for turns in rounds for message in turns.sent],
        "up": [reply.uplink for turns in rounds for reply in turns.replies],
    }


def names(weights):
    return {name for part in weights.values() for name in part}


def changed_by(phases):
    """Return the parts of the model that some phases change."""
    choice = arch("resnet8", TASK.input_shape, TASK.n_classes)
    modules = fresh_modules(lambda: {"model": choice.model()}, Stream(0))
    client = Client(read_weights(modules), {}, {})
    rows = Rows(Stream(0).normal((20, 1, 8, 8)), Stream(1).integers(10, (20,)))
    context = ClientContext(rows=rows, plan=Plan(10), task=TASK, rng=Stream(2))
    after, _, _ = run_phases(phases, Gradients(modules), client, {}, context, turn=Turn(0, 4, 20))
    return [
        {name.split(".")[1] for name, t in part.items() if not torch.equal(t, client.weights[kind][name])}
        for kind, part in after.weights.items()
    ]


@pytest.mark.parametrize("method", [FedPer, FedRep, FedBABU])
@pytest.mark.parametrize("buffers", ["shared", "private"])
def test_the_body_travels_and_the_head_stays(experiment, method, buffers):
    run = experiment(method(buffers=buffers), model="resnet8", rounds=1, **{"data.rows": 120})
    for way in messages(run).values():
        for message in way:
            assert names(message["weights"])
            assert all(name.startswith("model.body.") for name in names(message["weights"]))
            assert bool(message["weights"]["buffers"]) == (buffers == "shared")
    kept = names(run.engine.client(0).weights)
    assert {name.split(".")[1] for name in kept} == ({"head"} if buffers == "shared" else {"head", "body"})


@pytest.mark.parametrize("method", [FedPer(), FedRep(head_epochs=1)])
def test_the_bodies_are_averaged_and_the_heads_part(experiment, method):
    run = experiment(method, rounds=2)
    uplinks = messages(run)["up"][-4:]
    rows = torch.tensor([float(run.data.n_train(i)) for i in range(4)])
    mean = tree.mean([up["weights"] for up in uplinks], (rows / rows.sum()).tolist())
    for name, p in run.server["weights"]["params"].items():
        torch.testing.assert_close(p, mean["params"][name], rtol=1e-12, atol=1e-14)
    heads = [run.engine.client(i).weights["params"]["model.head.weight"] for i in range(4)]
    assert all(not torch.equal(heads[0], head) for head in heads[1:])
    assert run.rows[-1]["server_accuracy"] is None


@pytest.mark.parametrize("model", ["mlp", "resnet8"])
def test_fedper_with_one_client_is_fedavg_with_one_client(experiment, model):
    settings = {"clients": 1, "rounds": 3, "model": model, "data.rows": 120}
    one, other = experiment(FedPer(), **settings), experiment(FedAvg(), **settings)
    one.run()
    other.run()
    head = one.engine.client(0).weights
    assert tree.equal(tree.merge(one.server["weights"], head), other.server["weights"])
    assert [row["personal_accuracy"] for row in one.rows] == [row["personal_accuracy"] for row in other.rows]


def test_fedrep_trains_the_head_first_and_then_the_body():
    head, body = FedRep(head_epochs=3, local_epochs=2).phases()
    assert (head.epochs, body.epochs) == (3, 2)
    assert changed_by([head]) == [
        {"head"},
        {"body"},
    ]  # the body's running statistics change, as in the released code
    assert changed_by([body]) == [{"body"}, {"body"}]


def test_invalid_hyper_parameters_are_refused():
    with pytest.raises(ValueError, match="head_epochs=0: must be at least 1"):
        FedRep(head_epochs=0)


@pytest.mark.parametrize("model", ["resnet8", "vit_tiny"])
def test_fedbn_sends_no_normalisation_layer(experiment, model):
    run = experiment(FedBN(), model=model, rounds=2, **{"data.rows": 120})
    whole = initial_weights(run)
    norms = norm_layers(whole)
    assert norms
    for way in messages(run).values():
        for message in way:
            sent = names(message["weights"])
            assert sent == names(whole) - {name for name in names(whole) if name.rpartition(".")[0] in norms}
    kept = [run.engine.client(i).weights for i in range(2)]
    assert {name.rpartition(".")[0] for name in names(kept[0])} == norms
    assert all(not torch.equal(p, kept[1]["params"][name]) for name, p in kept[0]["params"].items())


def test_fedbn_without_normalisation_layers_is_fedavg(experiment):
    one, other = experiment(FedBN()), experiment(FedAvg())
    one.run()
    other.run()
    assert tree.equal(one.server, other.server)


def test_fedbabu_never_trains_the_head_of_the_federation(experiment):
    run = experiment(FedBABU(), rounds=3)
    head = select(initial_weights(run), ("model:head",))
    run.run()
    for i in range(4):
        assert tree.equal(run.engine.client(i).weights, head)
    assert changed_by(FedBABU().phases())[0] == {"body"}


@pytest.mark.parametrize(("tuned", "parts"), [("model", {"body", "head"}), ("head", {"head"}), ("body", {"body"})])
def test_fedbabu_fine_tunes_the_chosen_part(tuned, parts):
    (phase,) = FedBABU(tuned=tuned, tuning_epochs=2, tuning_lr=0.1).adapt()
    assert isinstance(phase, Train)
    assert phase.epochs == 2
    assert changed_by([phase])[0] == parts


def test_fedbabus_server_predicts_with_the_common_head(experiment):
    runs = [experiment(FedBABU(tuning_epochs=n), rounds=2) for n in (1, 5)]
    for run in runs:
        run.run()
    assert tree.equal(runs[0].server, runs[1].server)
    whole = tree.merge(initial_weights(runs[0]), runs[0].server["weights"])
    x, y = runs[0].data.common()
    model = runs[0].problem.modules(0)["model"].eval()
    state = {name.removeprefix("model."): t for part in whole.values() for name, t in part.items()}
    accuracy = (torch.func.functional_call(model, state, (x,)).argmax(1) == y).double().mean().item()
    assert [run.rows[-1]["server_accuracy"] for run in runs] == [pytest.approx(accuracy)] * 2
    assert runs[0].rows[-1]["personal_accuracy"] > accuracy


def test_fedrep_refits_heads_on_copies_before_predictions(experiment):
    """The re-fitted head is better on the client's training examples, and the stored head does not change."""
    plain, refit = (experiment("fedrep", rounds=1, clients=3, **{"method.head_epochs": 1, **extra, "data.rows": 90})
                    for extra in ({}, {"method.final_head_epochs": 20}))  # fmt: skip
    losses = []
    for run in (plain, refit):
        run.run()
        x, y = run.data.train(0)
        losses.append(float(torch.nn.functional.cross_entropy(run.personal_model(0)(x.double()).detach(), y)))
    assert losses[1] < losses[0]
    kept = [run.engine.client(0).weights["params"]["model.head.weight"] for run in (plain, refit)]
    assert torch.equal(*kept)


@pytest.mark.parametrize(
    ("method", "same", "warned"), [("fedbabu", False, True), ("fedbabu", True, False), ("fedper", False, False)]
)
def test_different_fixed_heads_are_reported(experiment, caplog, method, same, warned):
    experiment(method, same_init=same)
    assert ("same_init=false: each client keeps its own random 'model.head.weight'" in caplog.text) == warned
