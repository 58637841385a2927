"""Models for texts: published sizes, padding, causality, and vectorisation over clients."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from fedloom.errors import ConfigError
from fedloom.inputs import Field, InputSpec
from fedloom.models import ZOO
from fedloom.models.zoo import BY_SPEC, KINDS, SEQUENCES

MODELS = sorted(name for name in ZOO if "token" in KINDS[name])
POOLED = sorted(set(MODELS) - SEQUENCES)
MAPPED = sorted(name for name in MODELS if "lstm" not in name)
V, T = 20, 12
IDS = torch.tensor(
    [
        [3, 7, 1, 9, 0, 0, 0, 0, 0, 0, 0, 0],
        [5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [2, 4, 6, 8, 10, 12, 14, 16, 0, 0, 0, 0],
    ]
)


def tokens(vocabulary=V, length=T):
    return InputSpec((Field(shape=(length,), kind="token", levels=(vocabulary,)),))


def body(name, spec=None, seed=0, width=None, **options):
    torch.manual_seed(seed)
    return ZOO[name](spec or tokens(), width, **options).eval()


def with_head(made, n_outputs):
    with torch.no_grad():
        features = made(torch.ones(1, 4, dtype=torch.int64)).shape[-1]
    return nn.Sequential(made, nn.Linear(features, n_outputs))


@pytest.mark.parametrize(
    ("name", "spec", "n_outputs", "options", "count"),
    [
        ("char_lstm", tokens(80, 80), 80, {}, 819_920),
        ("char_lstm", tokens(90, 80), 90, {}, 822_570),
        ("lm_lstm", tokens(80, 80), 80, {}, 819_920),
        ("text_mean", tokens(10_000, 64), 4, {}, 640_260),
        ("text_mean", tokens(32_000, 200), 4, {"dim": 512, "hidden": True}, 16_648_708),
        ("text_cnn", tokens(10_000, 64), 4, {}, 718_304),
        ("text_cnn", tokens(32_000, 200), 4, {"dim": 512}, 16_999_904),
        ("text_transformer", tokens(10_000, 64), 4, {}, 744_452),
        ("lm_transformer", tokens(80, 80), 80, {}, 427_600),
    ],
)
def test_number_of_parameters_is_the_published_one(name, spec, n_outputs, options, count):
    model = with_head(body(name, spec, **options), n_outputs)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_one_bias_per_layer_would_give_tensorflows_counts():
    lstm = body("char_lstm").lstm.lstm
    assert sum(p.numel() for name, p in lstm.named_parameters() if name.startswith("bias_hh")) == 2_048


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_are_those_of_examples_or_of_positions(name, dtype):
    features = body(name).to(dtype)(IDS)
    assert features.dtype == dtype
    assert features.shape[:-1] == ((3, T) if name in SEQUENCES else (3,))


@pytest.mark.parametrize("name", MODELS)
def test_a_common_width_is_kept(name):
    assert body(name, width=24)(IDS).shape[-1] == 24


@pytest.mark.parametrize("name", MODELS)
def test_texts_without_tokens_give_finite_features_and_gradients(name):
    made = body(name)
    features = made(torch.zeros(2, T, dtype=torch.int64))
    assert features.isfinite().all()
    features.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_more_padding_changes_nothing(name):
    made, short = body(name).double(), IDS[:, :8]
    long, brief = made(IDS), made(short)
    torch.testing.assert_close(long[:, :8] if name in SEQUENCES else long, brief)


@pytest.mark.parametrize("name", POOLED)
def test_every_token_counts(name):
    made = body(name).double()
    before = made(IDS)
    for i in range(4):
        changed = IDS.clone()
        changed[0, i] = 19
        after = made(changed)
        assert not torch.allclose(after[0], before[0])
        torch.testing.assert_close(after[1:], before[1:])


@pytest.mark.parametrize("name", sorted(SEQUENCES))
def test_a_position_depends_on_itself_and_on_those_before_it(name):
    made, changed = body(name).double(), IDS.clone()
    changed[2, 5] = 19
    before, after = made(IDS)[2], made(changed)[2]
    torch.testing.assert_close(after[:5], before[:5])
    assert all(not torch.allclose(after[i], before[i]) for i in (5, 6, 7))


def test_the_first_tokens_features_can_represent_a_text():
    ids = IDS.clone()
    pooled = body("text_transformer", pool="first").double()
    assert not torch.allclose(pooled(ids), body("text_transformer").double()(ids))
    ids[0, 3] = 19  # the first token attends to it
    assert not torch.allclose(pooled(ids)[0], pooled(IDS)[0])


def test_the_mean_is_that_of_the_tokens():
    made = body("text_mean")
    table = made.words.embedding.weight
    torch.testing.assert_close(made(IDS)[0], table[[3, 7, 1, 9]].mean(0))


def test_the_lstm_returns_its_output_at_the_last_token():
    made = body("char_lstm").lstm
    outputs, _ = made.lstm(made.embedding(IDS))
    assert torch.equal(made(IDS), outputs[[0, 1, 2], [3, 0, 7]])


SMALL = {"text_mean": {"dim": 8}, "text_cnn": {"dim": 8, "dropout": 0.0}, "char_lstm": {"dim": 8, "hidden": 16}}
SMALL |= {
    "lm_lstm": SMALL["char_lstm"],
    "text_transformer": {"dim": 16, "hidden": 16},
    "lm_transformer": {"dim": 16, "hidden": 16},
}


@pytest.mark.parametrize("name", MODELS)
def test_models_learn(name):
    """Texts contain one of two words at any position. In sequences, each token is the number of tokens so far."""
    torch.manual_seed(0)
    lengths = torch.randint(1, T + 1, (64, 1))
    if name in SEQUENCES:
        ids = torch.arange(1, T + 1).repeat(64, 1)
        targets, n_outputs = ids + 1, T + 2
    else:
        ids, targets, n_outputs = torch.randint(3, V, (64, T)), torch.arange(64) % 2, 2
        ids[torch.arange(64), (torch.rand(64) * lengths[:, 0]).long()] = 1 + targets
    ids = torch.where(torch.arange(T) < lengths, ids, 0)
    model = with_head(body(name, **SMALL[name]), n_outputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        outputs = model(ids)
        loss = nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
        loss = loss[ids.flatten() > 0].mean() if name in SEQUENCES else loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize("name", MAPPED)
def test_mapping_over_two_clients_equals_a_loop(name):
    models = [body(name, seed=seed).double() for seed in (1, 2)]
    ids = torch.stack([IDS, IDS.flip(0)])
    weights, _ = stack_module_state(models)

    def loss(own, x):
        return functional_call(models[0], own, (x,)).square().mean()

    mapped = vmap(grad(loss))(weights, ids)
    for i, model in enumerate(models):
        model(ids[i]).square().mean().backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(mapped[key][i], parameter.grad, rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_padding_is_never_trained(name):
    made = body(name)
    made(IDS).square().sum().backward()
    table = next(part for part in made.modules() if isinstance(part, nn.Embedding)).weight
    assert not table[0].any()
    assert not table.grad[0].any()
    assert table.grad[3].any()


@pytest.mark.parametrize("name", MODELS)
def test_calls_with_a_clients_tensors_leave_the_module_fit_for_copies(name):
    made = body(name)
    weights = {key: value.detach() * 2 for key, value in made.named_parameters()}
    doubled = functional_call(made, weights, (IDS,))
    assert not torch.equal(doubled, made(IDS))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(made)))
    assert torch.equal(copied(IDS), made(IDS))


@pytest.mark.parametrize("name", ["text_cnn", "text_transformer", "lm_transformer"])
def test_dropout_can_be_chosen(name):
    assert not any(isinstance(part, nn.Dropout) for part in body(name, dropout=0.0).modules())
    made = body(name, dropout=0.3)
    assert torch.equal(made(IDS), made(IDS))
    made.train()
    assert not torch.equal(made(IDS), made(IDS))


@pytest.mark.parametrize(
    ("name", "spec", "options", "words"),
    [
        ("text_transformer", tokens(), {"heads": 5}, ["heads=5", "dim=64"]),
        ("text_transformer", tokens(), {"pool": "last"}, ["pool='last'", "mean, first"]),
        ("text_cnn", tokens(), {"dropout": 1.0}, ["dropout=1.0"]),
        ("lm_transformer", tokens(), {"dropout": -0.1}, ["dropout=-0.1"]),
        ("text_mean", InputSpec((Field(shape=(3,), kind="number"),)), {}, ["text_mean", "token ids", "number (3,)"]),
        ("lm_lstm", InputSpec((Field(name="a", shape=(3,), kind="token", levels=(5,)),)), {}, ["lm_lstm", "a: token"]),
    ],
)
def test_impossible_models_are_refused_in_one_line(name, spec, options, words):
    with pytest.raises(ConfigError) as caught:
        body(name, spec, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_the_zoo_lists_what_each_model_takes():
    assert KINDS.keys() == ZOO.keys()
    assert KINDS["mlp"] == {"picture", "number"}
    assert KINDS["resnet8"] == {"picture"}
    assert KINDS["har_cnn"] == {"number"}
    assert KINDS["table_mlp"] == {"number", "category"}
    assert {name for name in BY_SPEC if KINDS[name] == {"token"}} == set(MODELS)
    assert {"lm_lstm", "lm_transformer"} == SEQUENCES
