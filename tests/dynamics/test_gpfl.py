"""GPFL: its conditional layer and its losses on known answers."""

import math

import pytest
import torch

from fedloom import GPFL, Batch, ClientData, Nets, Stream
from fedloom.methods.gpfl import Valve
from fedloom.models import arch
from fedloom.nets import read_weights
from fedloom.training.turn import fresh_modules

Y, P = 3, 6


def setting(counts=(2.0, 2.0, 0.0), **options):
    method, choice = GPFL(**options), arch("mlp", (1, 8, 8), Y, P)
    task = type("Task", (), {"n_classes": Y})
    modules = fresh_modules(lambda: method.nets(choice, task), Stream(0))  # type: ignore[arg-type]
    weights = read_weights(modules)
    memory = method.init_memory(weights, task, ClientData(int(sum(counts)), torch.tensor(counts)))  # type: ignore[arg-type]
    labels = torch.tensor([y for y, n in enumerate(counts) for _ in range(int(n))])
    batch = Batch(Stream(1).normal((len(labels), 1, 8, 8)), labels)
    return method, modules, weights, memory, batch


def test_a_closed_valve_passes_positive_features():
    """With zero affine parameters of the last LayerNorm, gamma and beta are 0."""
    valve = Valve(P)
    for part in (valve.gamma, valve.beta):
        part[2].weight.data.zero_()
        part[2].bias.data.zero_()
    z = Stream(0).normal((4, P))
    torch.testing.assert_close(valve(z, torch.ones(P)), z.relu())


def test_the_personal_context_is_the_clients_mixture_of_received_embeddings():
    method, modules, weights, memory, batch = setting()
    received = weights["params"]["classes.weight"]
    down = {"weights": weights}
    nets = Nets(modules, **weights)
    z = nets.model.body(batch.x)
    expected = nets.model.head(nets.valve(z, (received[0] + received[1]) / 2))
    torch.testing.assert_close(method.predict(nets, batch.x, down, memory), expected)
    loss, logs = method.loss(nets, batch, down, memory)
    torch.testing.assert_close(logs["cross_entropy"], nets.loss(expected, batch.y))
    generic = nets.valve(z, received.mean(0))
    cosines = torch.nn.functional.cosine_similarity(generic[:, None], received[None], dim=2)
    torch.testing.assert_close(logs["guidance"], nets.loss(cosines, batch.y))
    away = (generic - received[batch.y]).norm(dim=1).mean()
    decay = sum(p.square().sum() for n, p in weights["params"].items() if not n.startswith("model."))
    torch.testing.assert_close(loss, logs["cross_entropy"] + logs["guidance"] + 0.01 * away + 0.05 * decay)


def test_guidance_moves_the_embedding_of_a_class_towards_its_generic_features():
    """One step on the guidance alone increases the cosine with the embedding of the own class. With one class, the guidance is 0."""
    method, modules, weights, memory, batch = setting(magnitude=0.0, embedding_decay=0.0)
    params = {n: p.clone().requires_grad_(n == "classes.weight") for n, p in weights["params"].items()}
    nets = Nets(modules, params, weights["buffers"])
    _, logs = method.loss(nets, batch, {"weights": weights}, memory)
    (slope,) = torch.autograd.grad(logs["guidance"], [params["classes.weight"]])
    stepped = {**weights["params"], "classes.weight": weights["params"]["classes.weight"] - 0.1 * slope}
    _, after = method.loss(Nets(modules, stepped, weights["buffers"]), batch, {"weights": weights}, memory)
    assert after["guidance"] < logs["guidance"].detach()
    assert float(logs["guidance"].detach()) > math.log(1 + (Y - 1) * math.exp(-2))


def test_body_embeddings_and_valve_travel_and_the_head_stays(experiment):
    run = experiment("gpfl", clients=3, rounds=1, **{"data.rows": 90})
    run.run()
    sent = {name.partition(".")[0] for name in run.server["weights"]["params"]}
    assert sent == {"model", "classes", "valve"}
    assert not any("head" in name for name in run.server["weights"]["params"])
    assert run.server["weights"]["params"]["classes.weight"].std() == pytest.approx(1, abs=0.3)
