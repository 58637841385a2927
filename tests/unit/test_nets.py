"""Nets bound to tensors, and the names of their parts."""

import pytest
import torch
from torch import nn

from fedloom.errors import ConfigError, MethodError
from fedloom.models import arch
from fedloom.nets import Nets, block_of, layer_of, read_weights, select, units, write_weights
from fedloom.rng import Stream


def small() -> dict[str, nn.Module]:
    """Return a net with a BatchNorm, split into body and head, and a second net."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    return {"model": nn.ModuleDict({"body": body, "head": nn.Linear(4, 2)}), "other": nn.Linear(3, 2)}


@pytest.fixture
def weights():
    return read_weights(small())


HEAD = {"model.head.weight", "model.head.bias"}
BODY = {f"model.body.{k}" for k in ("0.weight", "0.bias", "1.weight", "1.bias")}
NORM = {"model.body.1.weight", "model.body.1.bias"}
OTHER = {"other.weight", "other.bias"}
STATISTICS = {f"model.body.1.{k}" for k in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize(
    ("patterns", "params", "buffers"),
    [
        (("model",), HEAD | BODY, STATISTICS),
        (("other",), OTHER, set()),
        (("model", "other"), HEAD | BODY | OTHER, STATISTICS),
        (("model:head",), HEAD, set()),
        (("model:-head",), BODY, STATISTICS),
        (("model:body.0", "other"), {"model.body.0.weight", "model.body.0.bias"} | OTHER, set()),
        (("model:norm",), NORM, STATISTICS),
        (("model:-norm",), HEAD | BODY - NORM, set()),
        ((), set(), set()),
    ],
)
def test_select_by_patterns(weights, patterns, params, buffers):
    found = select(weights, patterns)
    assert (set(found["params"]), set(found["buffers"])) == (params, buffers)
    assert select(weights, patterns, buffers=False) == {"params": found["params"], "buffers": {}}
    rest = select(weights, patterns, rest=True)
    assert set(rest["params"]) == (HEAD | BODY | OTHER) - params
    assert set(rest["buffers"]) == STATISTICS - buffers
    private = select(weights, patterns, buffers=False, rest=True)
    assert set(private["buffers"]) == STATISTICS


def test_select_shares_the_tensors(weights):
    assert select(weights, ("other",))["params"]["other.bias"] is weights["params"]["other.bias"]


@pytest.mark.parametrize("pattern", ["modle", "model:tail", "other:norm", "mod", "model:hea"])
def test_a_pattern_that_names_nothing_is_an_error(weights, pattern):
    with pytest.raises(MethodError, match=f"the pattern '{pattern}' matches nothing; nets: model, other"):
        select(weights, (pattern,))


def test_norm_layers_are_found_in_the_zoo():
    for name, options in (("resnet8", {}), ("resnet8", {"norm": "group"}), ("vit_tiny", {})):
        found = select(read_weights({"model": arch(name, (1, 8, 8), 10, options=options).model()}), ("model:norm",))
        assert found["params"]
        assert all("norm" in path for path in found["params"])


@pytest.mark.parametrize(
    ("name", "layer", "block"),
    [
        ("model.body.stage2.0.conv1.weight", "model.body.stage2.0.conv1", "model.body.stage2.0"),
        ("model.body.stage2.0.norm1.running_mean", "model.body.stage2.0.norm1", "model.body.stage2.0"),
        ("model.body.stage2.0.shortcut.conv.weight", "model.body.stage2.0.shortcut.conv", "model.body.stage2.0"),
        ("model.body.conv.weight", "model.body.conv", "model.body.conv"),
        ("model.head.bias", "model.head", "model.head"),
    ],
)
def test_layers_and_blocks_of_resnet8(name, layer, block):
    weights = read_weights({"model": arch("resnet8", (1, 8, 8), 10).model()})
    assert name in weights["params"] | weights["buffers"]
    assert (layer_of(name), block_of(name)) == (layer, block)


@pytest.mark.parametrize("model", ["resnet8", "fedavg_cnn", "mobilenetv2", "mlp"])
@pytest.mark.parametrize("unit", ["layer", "block", "tensor"])
def test_units_split_all_tensors_once(model, unit):
    weights = read_weights({"model": arch(model, (1, 8, 8), 10).model()})
    groups = units(weights, unit)
    flat = [tensor for group in groups for tensor in group]
    assert len(flat) == len(set(flat)) == len(weights["params"]) + len(weights["buffers"])
    owners = {"layer": layer_of, "block": block_of, "tensor": lambda name: name}[unit]
    assert [len({owners(name) for _, name in group}) for group in groups] == [1] * len(groups)
    assert len({owners(group[0][1]) for group in groups}) == len(groups)


def test_a_norm_layer_is_one_unit_with_its_statistics(weights):
    group = next(g for g in units(weights, "layer") if ("params", "model.body.1.weight") in g)
    assert {name for _, name in group} == NORM | STATISTICS


def test_reading_gives_copies_and_writing_puts_them_back():
    modules = small()
    weights = read_weights(modules)
    weights["params"]["other.bias"].fill_(5)
    assert not torch.equal(modules["other"].bias, weights["params"]["other.bias"])
    write_weights(modules, weights)
    assert modules["other"].bias.tolist() == [5, 5]


class Whole(nn.Module):
    """A linear layer, a BatchNorm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def modules():
    torch.manual_seed(1)
    return {"model": Whole(), "other": nn.Linear(3, 2)}


X = Stream(0).normal((8, 3))


def test_a_call_computes_with_the_bound_tensors(modules):
    weights = read_weights(modules)
    for part in weights.values():
        for tensor in part.values():
            tensor.mul_(2)
    expected = Whole()
    write_weights({"model": expected}, {k: {n: t for n, t in p.items() if "model" in n} for k, p in weights.items()})
    assert torch.equal(Nets(modules, **weights).model(X), expected.eval()(X))


def test_buffers_change_in_training_mode_only_and_only_the_bound_ones(modules):
    weights, theirs = read_weights(modules), read_weights(modules)
    own = {name: b.clone() for name, b in modules["model"].named_buffers()}
    Nets(modules, **weights).model(X)
    assert all(torch.equal(b, theirs["buffers"][n]) for n, b in weights["buffers"].items())
    Nets(modules, **weights, training=("model",)).model(X)
    assert not any(torch.equal(b, theirs["buffers"][n]) for n, b in weights["buffers"].items())
    assert all(torch.equal(b, own[name]) for name, b in modules["model"].named_buffers())
    Nets(modules, **theirs).model(X)  # evaluation mode again, on the module that was in training mode
    assert theirs["buffers"]["model.body.1.num_batches_tracked"].item() == 0


def test_at_binds_other_weights_in_evaluation_mode(modules):
    here, there = read_weights(modules), read_weights(modules)
    there["params"]["model.head.bias"].add_(1)
    nets = Nets(modules, **here, training=("model",))
    only_head = {"params": {"model.head.bias": there["params"]["model.head.bias"]}, "buffers": {}}
    torch.testing.assert_close(nets.at(only_head).model(X), Nets(modules, **here).model(X) + 1)
    assert here["buffers"]["model.body.1.num_batches_tracked"].item() == 0


def test_a_part_called_in_another_mode_does_not_change_the_mode_of_the_whole(modules):
    here, steps = read_weights(modules), "model.body.1.num_batches_tracked"
    Nets(modules, **here).model.body(X)
    Nets(modules, **here, training=("model",)).model(X)
    assert here["buffers"][steps].item() == 1
    Nets(modules, **here, training=("model",)).model.body(X)
    Nets(modules, **here).model(X)
    assert here["buffers"][steps].item() == 2


def test_with_params_keeps_the_mode(modules):
    here = read_weights(modules)
    nets = Nets(modules, **here, training=("model",))
    moved = {"model.head.bias": here["params"]["model.head.bias"] + 1}
    torch.testing.assert_close(nets.with_params(moved).model(X), nets.model(X) + 1)
    assert here["buffers"]["model.body.1.num_batches_tracked"].item() == 2


def test_frozen_lets_gradients_through_to_inputs_only(modules):
    here = read_weights(modules)
    params = {name: p.requires_grad_() for name, p in here["params"].items()}
    x = X.clone().requires_grad_()
    Nets(modules, params, here["buffers"]).frozen.model(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in params.values())


def test_tied_weights_are_refused():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    with pytest.raises(ConfigError, match=r"'model\.0\.weight' and 'model\.1\.weight' are one tensor"):
        read_weights({"model": net})
    with pytest.raises(ConfigError, match=r"'body\.weight' and 'head\.weight' are one tensor"):
        read_weights({"body": net[0], "head": net[1]})
    with pytest.raises(ConfigError, match="are one tensor"):
        arch(net, (3,), 3)  # before its parts are copied
    norms = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    norms[1].running_mean = norms[0].running_mean
    with pytest.raises(ConfigError, match=r"'model\.1\.running_mean' are one tensor"):
        read_weights({"model": norms})
    table = torch.ones(3)
    for norm in (masked := nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))):
        norm.register_buffer("table", table, persistent=False)
    assert "model.0.table" not in read_weights({"model": masked})["buffers"]  # not a weight, so it may be shared


def test_an_unknown_net_is_named(modules):
    with pytest.raises(AttributeError, match=r"there is no net 'modle' \(did you mean 'model'\?\)"):
        _ = Nets(modules, **read_weights(modules)).modle


def test_parts_of_a_net_use_the_clients_tensors_and_the_nets_mode():
    """Body and head give the outputs of the net. In training mode, the running statistics of the body change in place."""
    modules, x = {"model": arch("fedrir_cnn", (1, 28, 28), 3, 8).model()}, torch.randn(4, 1, 28, 28)
    weights = read_weights(modules)
    nets = Nets(modules, **weights)
    torch.testing.assert_close(nets.model.head(nets.model.body(x)), nets.model(x))
    before = {name: b.clone() for name, b in weights["buffers"].items()}
    Nets(modules, **weights, training=("model",)).model.body(x)
    changed = {name for name, b in weights["buffers"].items() if not torch.equal(b, before[name])}
    assert changed == set(before)
    with pytest.raises(AttributeError, match="the net has no part 'tail'"):
        _ = nets.model.tail


def test_a_gradient_inside_a_loss_changes_no_running_statistics(modules, weights):
    """The gradient is that of autograd, and it is differentiable. Frozen nets give constants."""
    modules = {"model": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))}
    weights = read_weights(modules)
    x, before = torch.randn(5, 3), {name: b.clone() for name, b in weights["buffers"].items()}
    params = {name: p.requires_grad_() for name, p in weights["params"].items()}

    def error(nets):
        return nets.model(x).pow(3).mean()

    nets = Nets(modules, params, weights["buffers"], training=("model",))
    found = nets.gradient(error, ("model:0",))
    assert all(torch.equal(b, before[name]) for name, b in weights["buffers"].items())
    expected = torch.autograd.grad(error(nets), [params["model.0.weight"], params["model.0.bias"]])
    assert list(found) == ["model.0.weight", "model.0.bias"]
    for mine, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(mine, other)
    assert found["model.0.weight"].requires_grad
    assert not nets.frozen.gradient(error, ("model:0",))["model.0.weight"].requires_grad


def test_parameters_under_the_names_of_another_net(modules, weights):
    nets = Nets(modules, **weights)
    renamed = nets.renamed("other", "model")
    assert renamed.keys() == {"model.weight", "model.bias"}
    assert renamed["model.bias"] is weights["params"]["other.bias"]
