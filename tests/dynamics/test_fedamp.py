"""FedAMP: the weights of models in cases with known results, the pull computed by hand, and the method without the pull."""

import math

import pytest
import torch
from torch import nn

from fedloom import FedAMP, tree
from small import spied

TINY = {"clients": 3, "rounds": 2, "data.rows": 90, "batch_size": 1000}


def server_of(*models, sent=None):
    stacked = torch.tensor(models).double()
    weights = {"params": {"model.w": stacked}, "buffers": {}}
    return {"model": weights, "sent": torch.ones(len(models)) if sent is None else torch.tensor(sent)}


def test_the_attention_of_two_clients_has_a_closed_form():
    """Two models at distance d: xi_12 = (alpha / sigma) e^(-d^2 / sigma), and the client's own model has the remaining weight."""
    found = FedAMP(alpha=0.4, sigma=2.0).attentions(server_of([0.0, 0.0], [1.0, 1.0]), 0)
    expected = 0.4 / 2 * math.exp(-2 / 2)
    torch.testing.assert_close(found, torch.tensor([1 - expected, expected]).double())


def test_models_that_are_far_away_or_were_never_sent_do_not_count():
    far = FedAMP().attentions(server_of([0.0], [100.0], [200.0]), 1)
    assert far.tolist() == [0, 1, 0]
    unsent = FedAMP(alpha=0.2).attentions(server_of([0.0], [0.0], [0.0], sent=[1.0, 1.0, 0.0]), 2)
    torch.testing.assert_close(unsent, torch.tensor([0.2, 0.2, 0.6]).double())


def test_the_combination_never_extrapolates():
    """Five equal models at alpha = sigma: the other models would have a total weight of 4."""
    found = FedAMP().attentions(server_of(*[[1.0]] * 5), 2)
    torch.testing.assert_close(found, torch.tensor([0.25, 0.25, 0, 0.25, 0.25]).double())


def test_the_heuristic_attention_depends_on_directions():
    method = FedAMP(attention="cosine", sigma=2.0, own_share=0.2)
    found = method.attentions(server_of([1.0, 0.0], [3.0, 0.0], [0.0, 5.0]), 0)
    same, other = math.exp(2.0), math.exp(0.0)
    expected = [0.2, 0.8 * same / (same + other), 0.8 * other / (same + other)]
    torch.testing.assert_close(found, torch.tensor(expected).double())
    alone = method.attentions(server_of([1.0], [2.0], sent=[0.0, 0.0]), 1)
    assert alone.tolist() == [0, 1]


@pytest.mark.parametrize("attention", ["distance", "cosine"])
def test_a_step_goes_down_the_loss_and_towards_the_combination(experiment, attention):
    lr, mu, alpha = 0.1, 2.0, 0.5
    run = experiment(FedAMP(lr=lr, mu=mu, alpha=alpha, attention=attention), **TINY)
    rounds = spied(run)
    model = run.problem.modules(0)["model"].double()
    run.run()
    x, y = run.data.train(0)
    w = {name: p.requires_grad_() for name, p in rounds[0].replies[0].uplink["model"]["params"].items()}
    outputs = torch.func.functional_call(model, {n.removeprefix("model."): p for n, p in w.items()}, (x.double(),))
    slopes = torch.autograd.grad(nn.functional.cross_entropy(outputs, y), list(w.values()))
    u = rounds[1].sent[0]["model"]["params"]
    others = [reply.uplink["model"]["params"] for reply in rounds[0].replies]
    assert not torch.allclose(u["model.head.weight"], others[0]["model.head.weight"])
    for (name, p), slope in zip(w.items(), slopes, strict=True):
        expected = p - lr * (slope + mu / alpha * (p - u[name]))
        torch.testing.assert_close(rounds[1].replies[0].uplink["model"]["params"][name], expected.detach())
    assert 0 <= run.rows[-1]["server.own_weight"] < 1


def test_without_the_pull_clients_train_alone(experiment):
    free, alone = experiment(FedAMP(mu=0.0), **TINY), experiment("local", **TINY)
    free.run(), alone.run()
    for i in range(3):
        one, other = (run.engine.client(i).weights for run in (free, alone))
        tree.map_tree(lambda a, b: torch.testing.assert_close(a, b) or a, one, other)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"lr": 0.1, "mu": 1.0, "alpha": 0.05},
            r"alpha=0\.05: the pull diverges, because lr mu / alpha = 2 is not below 2",
        ),
        ({"own_share": 0.5}, r"own_share=0\.5: has no effect with attention=distance"),
    ],
)
def test_a_pull_that_diverges_and_options_without_effect_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        FedAMP(**settings)
