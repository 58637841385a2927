"""Input layers by their Gram matrix: the numbers of plain SGD, and losses that do not support this form."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from fedloom import FedAvg, Stream, Task, Train, Turn, losses, optim
from fedloom.inputs import InputSpec
from fedloom.method import Client
from fedloom.nets import read_weights
from fedloom.objectives import Classification
from fedloom.training.batches import Plan, Rows
from fedloom.training.context import ClientContext
from fedloom.training.fast.gram_layer import GramLayer, PhaseWork
from fedloom.training.gradients import Gradients
from fedloom.training.turn import run_phases

TASK = Task(
    n_clients=1, max_cohort=1, objective=Classification.numbered(3), spec=InputSpec.plain((1, 2, 3)), width=5, rounds=4
)


@pytest.fixture(autouse=True)
def exact():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def taken(monkeypatch):
    """Use the Gram matrix for every input layer that allows it. Return the list of the shapes of the layers' weights."""
    shapes, init = [], GramLayer.__init__
    monkeypatch.setattr(PhaseWork, "is_less_by_gram_matrix", lambda *_: True)

    def spied(self, weights, rows, lr):
        shapes.append(tuple(weights[0].shape))
        init(self, weights, rows, lr)

    monkeypatch.setattr(GramLayer, "__init__", spied)
    return shapes


def test_several_clients_with_different_numbers_of_examples_take_the_steps_of_sgd():
    lanes = [(torch.randn(4, 6), torch.randn(n, 2, 3)) for n in (7, 3, 5)]
    layer = GramLayer([weight for weight, _ in lanes], pad_sequence([x for _, x in lanes], batch_first=True), 0.1)
    weights = [weight.clone() for weight, _ in lanes]
    for step, some in enumerate([(0, 1, 2), (0, 2), (2,)]):
        lane, index = torch.tensor(some), torch.stack([torch.randperm(len(lanes[k][1]))[:2] for k in some])
        places = (index + 7 * lane[:, None]).flatten()
        seen, slopes = layer.outputs(places, lane), torch.randn(len(some), 2, 4)
        for k, mine, outputs, slope in zip(some, index, seen, slopes, strict=True):
            x = lanes[k][1][mine].flatten(1)
            torch.testing.assert_close(outputs, x @ weights[k].T)
            weights[k] -= 0.1 * (step + 1) * slope.T @ x
        layer.step(places, slopes, scale=step + 1)
    for k, weight in enumerate(weights):
        torch.testing.assert_close(layer.weight(k), weight)


def modules(hidden=5):
    body = nn.Sequential(nn.Flatten(), nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 6), nn.Tanh())
    return {"model": nn.Sequential(body, nn.Linear(6, 3))}


SGD = optim.sgd(0.1)


def trained(loss, nets, optimizer=SGD, augment=None, epochs=3, draw=None):
    """Return a client's parameters after a phase on nine examples, and the phase's logs."""
    stream = Stream("rows")
    rows = Rows(stream.normal((9, 1, 2, 3)), torch.arange(9) % 3, augment)
    phase = Train("train", loss, ("model",), optimizer, epochs, draw=draw)
    client = Client(read_weights(nets), {}, {})
    context = ClientContext(rows=rows, plan=Plan(2), task=TASK, rng=Stream(0))
    after, _, logs = run_phases((phase,), Gradients(nets), client, {}, context, turn=Turn(0, 3, 9, lr_scale=0.9))
    return after.weights["params"], logs


def by_torch(nets, epochs=3):
    """Return the same parameters, computed with torch's own SGD."""
    model, stream = nets["model"].requires_grad_(), Stream("rows")
    x, y = stream.normal((9, 1, 2, 3)), torch.arange(9) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.09)
    for index in Plan(2).batches(9, epochs, None, Stream(0, "train", "batches")):
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return {f"model.{name}": p.detach() for name, p in model.named_parameters()}


def logistic(bias=True):
    return {"model": nn.Sequential(nn.Flatten(), nn.Linear(6, 3, bias=bias))}


@pytest.mark.parametrize("make", [modules, logistic, lambda: logistic(bias=False)], ids=["mlp", "logistic", "no bias"])
def test_a_model_arrives_where_torch_takes_it(taken, make):
    nets = make()
    params, _ = trained(FedAvg().loss, nets)
    assert len(taken) == 1
    expected = by_torch(nets)
    assert params.keys() == expected.keys()
    for name, value in params.items():
        torch.testing.assert_close(value, expected[name])


def penalised(nets, batch, down, memory):
    size = sum(p.square().sum() for p in nets.params.values())
    return losses.cross_entropy(nets.model(batch.x), batch.y) + 0.01 * size


def on_noise(nets, batch, down, memory):
    return losses.cross_entropy(nets.model(batch.x + batch.draws["noise"]), batch.y)


def on_both(nets, batch, down, memory):
    """Apply one layer to the examples and to something else."""
    return losses.cross_entropy(nets.model(batch.x) + nets.model(-batch.x), batch.y)


def sometimes(nets, batch, down, memory):
    """Add a penalty for batches that contain the last class."""
    return (penalised if batch.y.max() == 2 else FedAvg().loss)(nets, batch, down, memory)


def noise(batch, task, rng):
    return {"noise": rng.normal(batch.x.shape)}


def mirrored(x, rng):
    return x.flip(-1)


REFUSED = {
    "a penalty": {"loss": penalised},
    "noisy rows": {"loss": on_noise, "draw": noise},
    "two inputs": {"loss": on_both},
    "momentum": {"optimizer": optim.sgd(0.1, 0.9)},
    "weight decay": {"optimizer": optim.sgd(0.1, 0.0, 0.01)},
    "adam": {"optimizer": optim.adam(0.1)},
    "augmentation": {"augment": mirrored},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_gram_matrix_form_runs_as_written(taken, monkeypatch, what):
    nets, given = modules(), {"loss": FedAvg().loss, **REFUSED[what]}
    params, logs = trained(nets=nets, **given)
    assert not taken
    monkeypatch.setattr(PhaseWork, "is_less_by_gram_matrix", lambda *_: False)
    again, logs_again = trained(nets=nets, **given)
    assert logs == logs_again
    assert all(torch.equal(params[name], again[name]) for name in params)


def test_a_loss_that_looks_at_a_weight_now_and_then_runs_as_written_from_the_start(taken, monkeypatch):
    nets = modules()
    params, logs = trained(sometimes, nets)
    monkeypatch.setattr(PhaseWork, "is_less_by_gram_matrix", lambda *_: False)
    again, logs_again = trained(sometimes, nets)
    assert logs == logs_again
    assert all(torch.equal(params[name], again[name]) for name in params)


def test_draws_are_the_same_in_either_form(taken, monkeypatch):
    """A trial of a loss uses none of the phase's random numbers."""

    def loss(nets, batch, down, memory):
        return losses.cross_entropy(nets.model(batch.x), batch.y) * (1 + batch.draws["noise"].mean())

    nets = modules()
    params, logs = trained(loss, nets, draw=noise)
    assert taken
    monkeypatch.setattr(PhaseWork, "is_less_by_gram_matrix", lambda *_: False)
    again, logs_again = trained(loss, nets, draw=noise)
    assert logs == pytest.approx(logs_again)
    for name in params:
        torch.testing.assert_close(params[name], again[name])


@pytest.mark.parametrize(
    ("shape", "work", "less"),
    [
        ((200, 784), PhaseWork(60, 300, 30), True),  # several passes over a few examples of MNIST, in batches of 10
        ((200, 784), PhaseWork(60, 60, 6), False),  # one pass: too few steps
        ((200, 784), PhaseWork(60, 60, 6, lanes=4), True),  # the fixed cost of a step is shared
        ((1000, 784), PhaseWork(60, 60, 6), True),  # a larger weight
        (
            (200, 784),
            PhaseWork(600, 600, 60),
            False,
        ),  # many examples: their inner products take longer than the updates of the weight
        ((32, 64), PhaseWork(60, 300, 30), False),  # a small layer
    ],
)
def test_the_gram_matrix_is_for_large_layers_and_few_rows(shape, work, less):
    assert work.is_less_by_gram_matrix(torch.empty(shape)) is less
