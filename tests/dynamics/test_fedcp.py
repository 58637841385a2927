"""FedCP: the policy, the discrepancy and the heads on known answers."""

import math

import pytest
import torch

from fedloom import Nets, Stream, tree
from fedloom.methods.fedcp import WIDTHS, Policy, context, discrepancy


def test_the_policy_divides_every_feature_of_every_example():
    policy, z = Policy(5), Stream(0).normal((3, 5))
    shares = policy(z)
    assert shares.shape == (2, 3, 5)
    torch.testing.assert_close(shares.sum(0), torch.ones(3, 5))
    policy.layers[0].weight.data.zero_()
    policy.layers[0].bias.data.zero_()
    torch.testing.assert_close(policy(z), torch.full((2, 3, 5), 0.5))


def test_the_discrepancy_is_0_for_equal_features_and_known_for_one_pair():
    """For one example each, at squared distance d, the discrepancy is 2 (4 - sum_t exp(-d / 2t))."""
    z = Stream(0).normal((4, 3))
    assert float(discrepancy(z, z)) == pytest.approx(0, abs=1e-6)
    far = discrepancy(torch.zeros(1, 3), torch.tensor([[3.0, 0, 0]]))
    assert float(far) == pytest.approx(2 * (4 - sum(math.exp(-9 / (2 * t)) for t in WIDTHS)), rel=1e-5)
    moved = z.clone().requires_grad_()
    assert torch.autograd.grad(discrepancy(moved, z), moved)[0].abs().max() < 1e-6  # no pull at the first step


def test_with_equal_heads_the_policy_cannot_change_logits_beyond_the_biases(experiment):
    """r + s = 1, so h = g gives W z + 2 b for every policy."""
    run = experiment("fedcp", clients=2, rounds=1, **{"data.rows": 60})
    method, nets = (
        run.method,
        Nets(run.problem.modules(0), **tree.map_tree(torch.Tensor.float, run.server["weights"] | {})),
    )
    modules = run.problem.modules(0)
    weights = {f"{net}.{n}": p.detach() for net, module in modules.items() for n, p in module.named_parameters()}
    nets = Nets(modules, weights, {})
    z = Stream(1).normal((4, 12))
    outputs = method.outputs(nets, z, {"context": torch.ones(12)})
    torch.testing.assert_close(outputs, nets.model.head(z) + weights["model.head.bias"])


def test_the_mean_of_both_heads_travels_and_the_common_head_is_fixed(experiment):
    run = experiment("fedcp", clients=2, rounds=1, **{"data.rows": 80, "partition.name": "iid"})
    before = tree.clone(run.server["weights"]["params"])
    run.run()
    params = [run.engine.client(i).weights["params"]["model.head.weight"] for i in range(2)]
    shares = [run.data.n_train(i) for i in range(2)]
    mean = sum(n * (before["common.weight"] + p) / 2 for n, p in zip(shares, params, strict=True)) / sum(shares)
    torch.testing.assert_close(run.server["weights"]["params"]["common.weight"], mean)
    for i, head in enumerate(params):
        kept = run.engine.client(i).memory["context"]
        torch.testing.assert_close(kept, context({"params": {"model.head.weight": head}, "buffers": {}}))
        assert float(kept.norm()) == pytest.approx(1)
