"""Low-rank adapters, and the weights that they adapt."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrize

from fedloom.errors import ConfigError
from fedloom.models import ZOO
from fedloom.models.layers import sequence
from fedloom.models.lora import Base, LowRank, load_base, merge_adapters, with_adapters
from fedloom.nets import block_of, layer_of, read_weights, units


def mlp(seed=0, hidden=6):
    torch.manual_seed(seed)
    return ZOO["mlp"]((4,), hidden=hidden)


def adapted(seed=0, rank=2, **options):
    return with_adapters(mlp(seed), rank, 2 * rank, **options)


def trained(body):
    """Change the adapters, as training would."""
    torch.manual_seed(5)
    with torch.no_grad():
        for part in body.modules():
            if isinstance(part, LowRank):
                part.b.normal_()
    return body


def n_trainable(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def test_adapters_change_nothing_at_first():
    assert torch.equal(adapted()(X), mlp()(X))
    assert not torch.equal(trained(adapted())(X), mlp()(X))


def test_only_adapters_are_trainable():
    model = sequence({"body": with_adapters(ZOO["mlp"]((784,)), 4, 8), "head": nn.Linear(200, 10)})
    assert n_trainable(model) == 4 * (784 + 200) + 2_010
    assert sum(p.numel() for p in model.parameters()) == 784 * 200 + 200 + 4 * (784 + 200) + 2_010
    assert n_trainable(with_adapters(mlp(), 2, 4, freeze_a=True)) == 2 * 6


def test_the_weight_is_the_base_plus_the_scaled_product():
    body = trained(with_adapters(mlp(), 2, 6))
    adapter = body.linear.parametrizations.weight[0]
    torch.testing.assert_close(body.linear.weight, mlp().linear.weight + 3 * adapter.b @ adapter.a)
    assert isinstance(body.linear, nn.Linear)


def test_adapters_of_one_layer_are_one_unit():
    weights = read_weights({"model": adapted()})
    names = ["model.linear.parametrizations.weight.0.a", "model.linear.parametrizations.weight.0.b"]
    assert list(weights["params"]) == names
    assert {layer_of(name) for name in names} == {block_of(name) for name in names} == {"model.linear"}
    assert units(weights, "layer") == [[("params", name) for name in names]]
    assert block_of("model.body.blocks.2.attention.qkv.parametrizations.weight.0.a") == "model.body.blocks.2"


def test_adapters_can_be_mapped_over_clients():
    models = [trained(adapted(seed)).double() for seed in (1, 2)]
    weights, _ = stack_module_state(models)
    x = torch.stack([X, X.flip(0)]).double()
    mapped = vmap(grad(lambda own, x: functional_call(models[0], own, (x,)).square().sum()))(weights, x)
    for i, model in enumerate(models):
        model(x[i]).square().sum().backward()
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(mapped[key][i], parameter.grad, rtol=1e-12, atol=1e-14)


def test_merging_gives_a_plain_module_and_leaves_the_original_alone():
    body = trained(adapted())
    twin = copy.deepcopy(body)
    plain = merge_adapters(body)
    assert torch.equal(plain(X), body(X))
    assert plain.state_dict().keys() == mlp().state_dict().keys()
    assert type(plain.linear) is nn.Linear
    assert torch.equal(pickle.loads(pickle.dumps(plain))(X), body(X))
    for other in (body, twin):  # a copy shares its layers' classes with the original
        assert isinstance(other.linear.parametrizations.weight[0], LowRank)
        assert torch.equal(other(X), plain(X))


def test_merging_keeps_other_parametrisations():
    module = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), trained(adapted()))
    plain = merge_adapters(module)
    assert parametrize.is_parametrized(plain[0])
    assert not parametrize.is_parametrized(plain[1].linear)
    assert torch.equal(plain[0](X), module[0](X))


def test_layers_of_attention_can_be_adapted():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0).eval()
    x = torch.randn(2, 5, 8)
    before = layer(x)
    with_adapters(layer, 2, 4)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), before)
        after = trained(layer)(x)  # the fast path, without gradients
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, layer(x))


@pytest.mark.parametrize("prefix", ["", "body.", "model.", "model.body.", "nets.model.body."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_base_is_loaded_from_a_file(tmp_path, prefix, dtype):
    file = tmp_path / "base.safetensors"
    head = {"head.weight": torch.ones(2, 6), "model.head.bias": torch.ones(2)}
    save_file({prefix + name: tensor for name, tensor in mlp(1).state_dict().items()} | head, file)
    body = mlp(0).to(dtype)
    load_base(body, file)
    assert torch.equal(body(X.to(dtype)), mlp(1).to(dtype)(X.to(dtype)))


def test_running_statistics_are_part_of_a_base(tmp_path):
    one, other = (ZOO["fedrir_cnn"]((1, 8, 8), 16) for _ in range(2))
    one(torch.randn(8, 1, 8, 8))
    save_file(one.state_dict(), tmp_path / "base.safetensors")
    load_base(other, tmp_path / "base.safetensors")
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(one.eval()(x), other.eval()(x))


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path):
    file = tmp_path / "base.safetensors"
    cases = {
        "there is no such file": None,
        "safetensors file": b"nonsense",
        "'linear.weight' has shape (5, 4), but the model needs (6, 4)": mlp(hidden=5).state_dict(),
        "'linear.weight', 'linear.bias' of the model's body not found; the file contains 'a', 'b', 'c' and 1 more": {
            name: torch.ones(1) for name in "abcd"
        },
    }
    for words, content in cases.items():
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content:
            save_file(content, file)
        with pytest.raises(ConfigError) as caught:
            load_base(mlp(), file)
        assert words in str(caught.value)
        assert f"model.weights={file}: " in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_random_base_is_refused(tmp_path):
    file = tmp_path / "base.safetensors"
    save_file(mlp(1).state_dict(), file)
    with pytest.raises(ConfigError, match=r"model\.lora=2: 'linear\.\w+' of mlp is random.*model\.weights=FILE"):
        Base(lora=2).check(lambda: Base(lora=2).prepared(ZOO["mlp"]((4,), hidden=6)), "mlp")
    Base().check(lambda: ZOO["mlp"]((4,)), "mlp")  # without adapters, everything is trained
    for base in (Base(lora=2, weights=str(file)), Base(lora=2, weights=str(file), freeze_a=True)):
        base.check(lambda base=base: base.prepared(ZOO["mlp"]((4,), hidden=6)), "mlp")
    own = mlp(3)
    Base(lora=2).check(lambda: Base(lora=2).prepared(copy.deepcopy(own)), "own")


def test_a_body_without_linear_layers_is_refused():
    with pytest.raises(ConfigError, match=r"model\.lora=2: the model's body has no nn\.Linear"):
        with_adapters(nn.Sequential(nn.Flatten()), 2, 4)
