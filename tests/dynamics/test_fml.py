"""FML: mutual teaching of the private and the common model, and the architecture that clients have in common."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from fedloom import FML, Batch, ConfigError, FedAvg, Nets, tree
from fedloom.nets import read_weights
from small import spied

WHOLE = {"batch_size": 1000, "eval_every": 2, "data.rows": 160}


@dataclass(frozen=True)
class Equal(FedAvg):
    """FedAvg in which clients have equal weights."""

    equal_shares: ClassVar[bool] = True


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


def test_without_distillation_the_common_model_is_fedavgs_bit_for_bit(experiment):
    both, plain = experiment(FML(alpha=1.0, beta=1.0)), experiment(Equal())
    both.run()
    plain.run()
    assert tree.equal(both.server, plain.server)
    assert both.ledger.total("uplink") == plain.ledger.total("uplink")


def test_both_models_step_on_outputs_from_before_the_step(experiment):
    """Two rounds of one step, computed by hand: each loss has a gradient only in its own model."""
    alpha, beta, lr = 0.3, 0.6, 0.2
    run = experiment(FML(alpha=alpha, beta=beta, lr=lr), clients=2, **WHOLE)
    rounds = spied(run)
    personal = run.problem.modules(0)["personal"].requires_grad_(True)
    meme = run.problem.modules(0)["model"].requires_grad_(True)
    run.run()
    x, y = run.data.train(0)
    for turns in rounds:
        meme.load_state_dict({n.removeprefix("model."): p for n, p in turns.down.common["weights"]["params"].items()})
        own, common = personal(x), meme(x)
        teach = [
            kl_div(a.log_softmax(1), b.detach().softmax(1), reduction="batchmean")
            for a, b in ((own, common), (common, own))
        ]
        mine = alpha * cross_entropy(own, y) + (1 - alpha) * teach[0]
        theirs = beta * cross_entropy(common, y) + (1 - beta) * teach[1]
        for module, loss in ((personal, mine), (meme, theirs)):
            grads = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
            with torch.no_grad():
                for p, g in zip(module.parameters(), grads, strict=True):
                    p -= lr * g
        sent = turns.replies[0].uplink["weights"]["params"]
        for name, p in meme.named_parameters():
            torch.testing.assert_close(sent[f"model.{name}"], p.detach(), rtol=1e-9, atol=1e-12)
    kept = run.engine.client(0).weights["params"]
    for name, p in personal.named_parameters():
        torch.testing.assert_close(kept[f"personal.{name}"], p.detach(), rtol=1e-9, atol=1e-12)


def test_equal_models_do_not_change_each_other(experiment):
    run = experiment(FML(alpha=1e-9, beta=1e-9), **WHOLE)
    modules = run.problem.modules(0)
    modules["personal"].load_state_dict(modules["model"].state_dict())
    weights = read_weights(modules)
    wanted = {name: p.requires_grad_() for name, p in weights["params"].items()}
    loss, logs = run.method.loss(Nets(modules, wanted, {}), Batch(*run.data.train(0)), {}, {})
    assert logs["distance"].item() == pytest.approx(0, abs=1e-12)
    assert max(float(g.abs().max()) for g in torch.autograd.grad(loss, list(wanted.values()))) < 1e-6


def test_the_common_architecture_travels_and_the_private_ones_differ(experiment):
    settings = {"models": ["mlp", "logistic"], "common_model": "mlp", "common_model.hidden": 7, "data.rows": 120}
    run = experiment(FML(), engine="debug+bytes+sequential", **settings)
    kinds = run.run()["bytes_by_kind"]
    n = 64 * 7 + 7 + 7 * 10 + 10
    assert kinds["uplink"]["weights"] == kinds["downlink"]["weights"] == 2 * 4 * n * 8
    assert {choice.common.name for choice in run.problem.archs} == {"mlp"}
    assert run.rows[-1]["server_accuracy"] is not None
    again = experiment(FML(), engine="vectorised", **settings)
    again.run()
    tree.map_tree(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10) or a, run.server, again.server)


def test_mistakes_with_the_common_architecture(experiment, caplog):
    with pytest.raises(ConfigError, match=r"^models=mlp, resnet8: FML shares model, .* set common_model to one"):
        experiment(FML(), models=["mlp", "resnet8"])
    with pytest.raises(ConfigError, match=r"^common_model=mlpp: there is no such model .*mlp"):
        experiment(FML(), common_model="mlpp")
    with pytest.raises(ConfigError, match=r"^common_model\.hidden: .* set common_model"):
        experiment(FML(), **{"common_model.hidden": 3})
    experiment("fedavg", common_model="mlp")
    assert "common_model=mlp: has no effect with method=fedavg" in caplog.text
