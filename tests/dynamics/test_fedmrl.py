"""FedMRL: both heads learn from one nested representation; only the common model is sent."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedloom import Batch, ConfigError, FedMRL, Nets
from fedloom.nets import read_weights


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


def test_the_loss_by_hand_and_which_weights_learn_from_which_head(experiment):
    """The loss of the common head has no gradient in outputs of the projection that this head does not use."""
    run = experiment(FedMRL(small_features=5), **{"data.rows": 160})
    modules = run.problem.modules(0)
    weights = read_weights(modules)
    wanted = {name: p.requires_grad_() for name, p in weights["params"].items()}
    nets, (x, y) = Nets(modules, wanted, {}), run.data.train(0)
    loss, logs = run.method.loss(nets, Batch(x, y), {}, {})
    r = nets.projection(torch.cat([nets.model.body(x), nets.personal.body(x)], 1))
    own, common = cross_entropy(nets.personal.head(r), y), cross_entropy(nets.model.head(r[:, :5]), y)
    assert loss.item() == pytest.approx((own + common).item())
    torch.testing.assert_close(run.method.predict(nets, x, {}, {}), nets.personal.head(r))
    names = [name for name in wanted if not name.startswith("personal.head")]
    grads = dict(
        zip(names, torch.autograd.grad(logs["common"], [wanted[n] for n in names], retain_graph=True), strict=True)
    )
    into = grads["projection.weight"]
    assert into.shape == (12, 17)
    assert (into[:5].abs().max(1).values > 0).all()
    assert into[5:].abs().max() == 0
    assert all(grads[name].abs().max() > 0 for name in names)  # bodies of both models, too
    whole = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
    assert (whole["projection.weight"][5:].abs().max(1).values > 0).all()
    assert whole["personal.head.weight"].abs().max() > 0


def test_only_the_common_model_travels_and_the_projection_is_kept(experiment):
    """By default, the common model has a quarter of the features of the clients' own models, whose architectures differ."""
    settings = {"models": ["mlp", "resnet8"], "width": 16, "common_model": "logistic", "data.rows": 120}
    run = experiment(FedMRL(), engine="debug+bytes+sequential", **settings)
    before = run.problem.modules(0)["projection"].weight
    kinds = run.run()["bytes_by_kind"]
    n = 64 * 4 + 4 + 4 * 10 + 10
    assert kinds["uplink"]["weights"] == kinds["downlink"]["weights"] == 2 * 4 * n * 8
    for i in range(4):
        params = run.engine.client(i).weights["params"]
        assert {name.partition(".")[0] for name in params} == {"personal", "projection"}
        assert (params["projection.weight"] - before).abs().max() > 1e-6
    assert run.rows[-1]["server_accuracy"] is None


def test_more_common_features_than_the_clients_have_are_refused(experiment):
    with pytest.raises(ConfigError, match=r"^method\.small_features=13: must be at most 12, .* of mlp"):
        experiment(FedMRL(small_features=13))
