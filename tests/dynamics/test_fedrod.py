"""FedRoD: the balanced loss, and the part of the loss from which each head learns."""

import pytest
import torch

from fedloom import Batch, ClientData, FedRoD, Nets, Stream
from fedloom.models import arch
from fedloom.nets import read_weights
from fedloom.training.turn import fresh_modules

Y = 3


def setting(counts):
    method, choice = FedRoD(), arch("mlp", (1, 8, 8), Y, 6)
    modules = fresh_modules(lambda: method.nets(choice, None), Stream(0))  # type: ignore[arg-type]
    weights = read_weights(modules)
    memory = method.init_memory(weights, None, ClientData(int(sum(counts)), torch.tensor(counts)))  # type: ignore[arg-type]
    params = {name: p.requires_grad_() for name, p in weights["params"].items()}
    labels = torch.tensor([y for y, n in enumerate(counts) for _ in range(int(n))])
    batch = Batch(Stream(1).normal((len(labels), 1, 8, 8)), labels)
    return method, Nets(modules, params, weights["buffers"]), batch, memory


def test_with_balanced_classes_the_generic_part_is_the_cross_entropy():
    method, nets, batch, memory = setting([4.0, 4.0, 4.0])
    _, logs = method.loss(nets, batch, {}, memory)
    torch.testing.assert_close(logs["balanced"], nets.loss(nets.model(batch.x), batch.y))
    torch.testing.assert_close(
        logs["personal"], nets.loss(nets.model(batch.x), batch.y)
    )  # the personal head starts at 0


def test_a_client_with_one_class_does_not_train_the_model_but_its_own_head():
    """The client's balanced loss is 0, because no other class is pushed down. The personal loss has no gradient in the model."""
    method, nets, batch, memory = setting([6.0, 0.0, 0.0])
    loss, logs = method.loss(nets, batch, {}, memory)
    assert float(logs["balanced"].detach()) == pytest.approx(0, abs=1e-7)
    slopes = dict(zip(nets.params, torch.autograd.grad(loss, list(nets.params.values())), strict=True))
    assert max(float(g.abs().max()) for n, g in slopes.items() if n.startswith("model.")) < 1e-6
    assert float(slopes["own.bias"].abs().max()) > 0.1


def test_rare_classes_count_more_than_in_the_cross_entropy():
    """The prior of a rare class is low, so its logit must be higher for the same loss."""
    method, nets, batch, memory = setting([9.0, 1.0, 1.0])
    _, logs = method.loss(nets, batch, {}, memory)
    logits = nets.model(batch.x)
    weighted = (logits + torch.tensor([9.0, 1.0, 1.0]).log()).log_softmax(1)
    torch.testing.assert_close(logs["balanced"], -weighted[torch.arange(11), batch.y].mean())
    assert not torch.isclose(logs["balanced"], nets.loss(logits, batch.y))


def test_a_client_predicts_with_the_sum_and_the_server_with_the_generic_head(experiment):
    run = experiment("fedrod", clients=3, cohort=2, rounds=1)
    run.run()
    x = run.data.test(0)[0].double()
    trained = [i for i in range(3) if run.engine.client(i).weights["params"]["own.bias"].any()]
    assert len(trained) == 2  # the third client's own head is still 0
    for i in range(3):
        model = run.personal_model(i)(x)
        nets = Nets(run.problem.modules(0), **run.server["weights"])
        z = nets.model.body(x)
        own = run.engine.client(i).weights["params"]
        torch.testing.assert_close(model, nets.model.head(z) + z @ own["own.weight"].T + own["own.bias"])
