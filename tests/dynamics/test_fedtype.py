"""FedType: known conformal sets, both losses computed by hand, and the limits without transfer."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from fedloom import Batch, FedAvg, FedType, Nets, tree
from fedloom.methods.fedtype import GRID, consensus, ranking_loss
from fedloom.nets import read_weights

WHOLE = {"batch_size": 1000, "eval_every": 2, "data.rows": 160}


@dataclass(frozen=True)
class Equal(FedAvg):
    """FedAvg in which clients have equal weights."""

    equal_shares: ClassVar[bool] = True


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


class Fixed:
    """Nets whose logits are the inputs."""

    def model(self, x):
        return x

    personal = model


def test_a_set_ends_at_the_threshold_and_its_last_class_is_random():
    """Probabilities 0.6, 0.3, 0.1; penalties 0, 0.1, 0.2 in total: sums 0.6, 1.0, 1.2. At 0.8, class 2 is in with chance 1/3."""
    method = FedType(free_ranks=1, proxy_penalty=0.1, temperature=1.0)
    logits = torch.tensor([0.1, 0.6, 0.3]).log().expand(4, 3)
    thresholds = method.thresholds("model", 3)
    assert thresholds[[0, -1]].tolist() == pytest.approx([0, 1.2])

    def sets(limit):
        memory = {"calibration": {"model": (thresholds >= limit).double()}}
        return method.sets("model", logits, torch.tensor([0.0, 0.3, 0.4, 0.9]), memory).tolist()

    assert sets(0.8) == [[0, 1, 1], [0, 1, 1], [0, 1, 0], [0, 1, 0]]
    assert sets(0.0) == [[0, 1, 0]] * 4  # at least one class
    assert sets(1.2) == [[1, 1, 1]] * 4


def test_sets_cover_the_classes_of_the_calibration_examples():
    """The expected fraction of examples whose class is in the set is 1 - alpha, except for sets that contain only their first class."""
    method, generator = FedType(alpha=0.25, free_ranks=2, proxy_penalty=0.05), torch.Generator().manual_seed(0)
    logits = torch.randn(600, 6, generator=generator)
    y = torch.multinomial((logits * 0.5).softmax(1), 1, generator=generator)[:, 0]  # the model is overconfident
    total = {"model": torch.zeros(GRID), "personal": torch.zeros(GRID)}
    for part in (slice(0, 200), slice(200, 600)):
        total = method.calibrate(Fixed(), Batch(logits[part], y[part]), total, {}, {})
    memory, covered = {"calibration": total}, []
    assert total["model"][-1].item() == pytest.approx(600)
    for chance in torch.linspace(0.005, 0.995, 40):
        sets = method.sets("model", logits, chance.expand(600), memory)
        covered.append(sets.gather(1, y[:, None]).mean())
    assert torch.stack(covered).mean().item() == pytest.approx(0.75, abs=0.02)
    assert method.sets("model", logits, torch.rand(600), memory).sum(1).mean() > 2


def test_consensus_and_ranking_by_hand():
    proxy = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]])
    private = torch.tensor([[1.0, 0, 1, 0], [1, 1, 1, 0]])
    assert consensus(proxy, private).item() == pytest.approx((1 / 3 + 1) / 2)
    logits = torch.tensor([[1.0, 3, 2, 0], [5, 0, 0, 0]], requires_grad=True)
    value = ranking_loss(logits, proxy)  # pairs (0, 2): 1, (0, 3): 0, (1, 2): 0, (1, 3): 0; and none
    assert value.item() == pytest.approx(1 / 4 / 2)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient[0, 0] < 0 < gradient[0, 2]  # a step raises the class in the set above the other one
    assert ranking_loss(logits, torch.ones(2, 4)).item() == 0


def test_both_losses_by_hand(experiment):
    run = experiment(FedType(ranking_weight=0.7, distillation_weight=0.4), **WHOLE)
    modules, memory = (
        run.problem.modules(0),
        {"calibration": {"model": torch.arange(GRID) / GRID, "personal": torch.arange(GRID) / GRID}},
    )
    nets, (x, y) = Nets(modules, **read_weights(modules)), run.data.train(0)
    batch = Batch(x, y, {"model": torch.rand(len(y)), "personal": torch.rand(len(y))})
    own, proxy = nets.personal(x), nets.model(x)
    s, p = (run.method.sets(net, o, batch.draws[net], memory) for net, o in (("model", proxy), ("personal", own)))
    assert 1 < s.sum(1).mean() < 10
    loss, logs = run.method.private_loss(nets, batch, {}, memory)
    assert loss.item() == pytest.approx((cross_entropy(own, y) + 0.7 * consensus(s, p) * ranking_loss(own, s)).item())
    assert logs["ranking"] > 0
    loss, _ = run.method.proxy_loss(nets, batch, {}, memory)
    distance = kl_div(proxy.log_softmax(1), own.softmax(1), reduction="batchmean")
    assert loss.item() == pytest.approx((cross_entropy(proxy, y) + 0.4 * distance).item())


def test_without_transfer_the_proxy_is_fedavgs_and_private_models_train_alone(experiment):
    free, plain = (
        experiment(FedType(ranking_weight=0.0, distillation_weight=0.0), **WHOLE),
        experiment(Equal(), **WHOLE),
    )
    model = free.problem.modules(0)["personal"].requires_grad_(True)
    free.run()
    plain.run()
    assert tree.equal(free.server, plain.server)
    x, y = free.data.train(0)
    for _ in range(2):
        grads = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= free.method.lr * g
    kept = free.engine.client(0).weights["params"]
    for name, p in model.named_parameters():
        torch.testing.assert_close(kept[f"personal.{name}"], p.detach(), rtol=1e-9, atol=1e-12)


def test_only_the_proxy_travels_and_architectures_may_differ(experiment):
    settings = {"models": ["mlp", "resnet8"], "common_model": "logistic", "data.rows": 120}
    run = experiment(FedType(), engine="debug+bytes+sequential", **settings)
    kinds = run.run()["bytes_by_kind"]
    assert kinds["uplink"]["weights"] == kinds["downlink"]["weights"] == 2 * 4 * (64 * 10 + 10) * 8
    assert 1 <= run.rows[-1]["private.set_size"] <= 10
    assert 0 < run.rows[-1]["private.consensus"] <= 1
