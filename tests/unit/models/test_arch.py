"""Recipes: their checks, and how a user's module is split."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedloom.errors import ConfigError
from fedloom.inputs import Field, InputSpec
from fedloom.models import Arch, arch, option_defaults
from fedloom.objectives import MultiLabel

SHAPE = (1, 8, 8)


class Net(nn.Module):
    def __init__(self, input_shape, n_classes, hidden=12):
        super().__init__()
        self.conv = nn.Conv2d(input_shape[0], 4, 3, padding=1)
        self.layers = nn.Sequential(nn.Linear(4 * 64, hidden), nn.ReLU(), nn.Linear(hidden, n_classes))

    def forward(self, x):
        return self.layers(torch.relu(self.conv(x)).flatten(1))


class WidthNet(nn.Module):
    def __init__(self, n_classes, width):
        super().__init__()
        self.flatten, self.first = nn.Flatten(), nn.LazyLinear(width or 9)
        self.last = nn.Linear(width or 9, n_classes)

    def forward(self, x):
        return self.last(torch.tanh(self.first(self.flatten(x))))


class TwoParts(nn.Module):
    def __init__(self, n_classes):
        super().__init__()
        self.head = nn.Linear(16, n_classes)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16))
        self.unrelated = nn.Linear(3, n_classes)

    def forward(self, x):
        return self.head(self.body(x))


class SoftmaxNet(Net):
    def forward(self, x):
        return super().forward(x).softmax(1)


def convolutional_logits(n_classes):
    return nn.Sequential(nn.Conv2d(1, n_classes, 8), nn.Flatten())


def test_recipes_are_equal_hashable_and_survive_pickling():
    one = arch("mlp", [1, 8, 8], 10, options={"hidden": 5})
    two = arch("mlp", (1, 8, 8), 10, options={"hidden": 5})
    assert one == two
    assert len({one, two, arch("mlp", SHAPE, 10)}) == 2
    assert pickle.loads(pickle.dumps(one)) == one
    assert isinstance(one, Arch)


def test_options_reach_the_architecture():
    assert arch("mlp", SHAPE, 10, options={"hidden": 5}).features == 5
    assert option_defaults("mlp") == {"hidden": 200}
    assert option_defaults("logistic") == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "resnet21"}, ["resnet21", "did you mean", "resnet2"]),
        ({"source": "zebra"}, ["zebra", "fedavg_cnn", "vit_tiny"]),
        ({"source": 3}, ["model=3"]),
        ({"outputs": 0}, ["n_classes=0"]),
        ({"outputs": True}, ["n_classes=True"]),
        ({"width": 2.5}, ["width=2.5"]),
        ({"inputs": (1, 8, -1)}, ["input_shape", "-1"]),
        ({"source": "resnet8", "inputs": (64,)}, ["resnet8", "(64,)", "8x8"]),
        ({"source": "resnet8", "inputs": (1, 4, 8)}, ["resnet8", "(1, 4, 8)", "8x8"]),
        ({"options": {"hiden": 3}}, ["mlp", "hiden", "did you mean 'hidden'"]),
        ({"source": "logistic", "options": {"hidden": 3}}, ["logistic", "hidden", "known: lora"]),
        ({"options": {"hidden": "3"}}, ["hidden='3'", "int"]),
        ({"options": {"hidden": 0}}, ["hidden=0"]),
        ({"source": "resnet8", "options": {"norm": "layer"}}, ["norm='layer'", "batch", "group"]),
        ({"source": "vit_tiny", "options": {"heads": 5}}, ["heads=5", "dim=64"]),
        ({"source": "vgg16", "options": {"dropout": 1.0}}, ["dropout=1.0"]),
    ],
)
def test_invalid_recipes_are_refused_in_one_line(settings, words):
    with pytest.raises(ConfigError) as caught:
        arch(**{"source": "mlp", "inputs": SHAPE, "outputs": 10, **settings})
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_an_outsiders_class_is_split_at_its_last_linear_layer():
    made = arch(Net, SHAPE, 10)
    assert (made.name, made.features) == ("Net", 12)
    torch.manual_seed(3)
    model = made.model()
    torch.manual_seed(3)
    original = Net(SHAPE, 10)
    inputs = torch.randn(2, *SHAPE)
    torch.testing.assert_close(model(inputs), original(inputs))
    assert model.head.weight.shape == (10, 12)
    assert set(model.state_dict()) == {
        *("body.conv.weight", "body.conv.bias", "body.layers.0.weight", "body.layers.0.bias"),
        *("head.weight", "head.bias"),
    }


def test_an_outsiders_options_are_passed_by_name():
    assert arch(Net, SHAPE, 10, options={"hidden": 5}).features == 5
    with pytest.raises(ConfigError, match="'depth'"):
        arch(Net, SHAPE, 10, options={"depth": 5})


def test_an_outsider_that_names_the_width_gets_it_and_lazy_layers_are_filled():
    assert arch(WidthNet, SHAPE, 10).features == 9
    model = arch(WidthNet, SHAPE, 10, width=20).model()
    assert model.head.in_features == 20
    assert model.state_dict()["body.first.weight"].shape == (20, 64)


def test_an_outsider_that_does_not_name_the_width_is_projected():
    made = arch(Net, SHAPE, 10, width=20)
    model = made.model()
    assert made.features == model.head.in_features == 20
    assert model.state_dict()["body.project.weight"].shape == (20, 12)
    assert made.body(12)(torch.zeros(1, *SHAPE)).shape == (1, 12)
    assert (made.head().in_features, made.head(7).in_features) == (20, 7)


def test_an_instance_gives_the_initial_weights_and_is_left_alone():
    instance = Net(SHAPE, 10)
    made = arch(instance, SHAPE, 10)
    first, second = made.model(), made.model()
    with torch.no_grad():
        first.head.weight.zero_()
    assert torch.equal(second.head.weight, instance.layers[2].weight)
    assert torch.equal(made.head().weight, instance.layers[2].weight)
    assert isinstance(instance.layers[2], nn.Linear)
    assert instance.training


def test_a_module_with_body_and_head_keeps_them():
    model = arch(TwoParts, SHAPE, 10).model()
    assert set(model.state_dict()) == {"body.1.weight", "body.1.bias", "head.weight", "head.bias"}


def test_functions_and_bare_linear_layers_are_taken():
    assert arch(lambda n_classes: nn.Sequential(nn.Flatten(), nn.Linear(64, n_classes)), SHAPE, 10).features == 64
    assert arch(nn.Linear(5, 3), (5,), 3).model()(torch.zeros(2, 5)).shape == (2, 3)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (SoftmaxNet, ["SoftmaxNet", "not Linear"]),
        (Net((3, 8, 8), 10), ["Net", "fails on inputs"]),
        (Net(SHAPE, 11), ["Net", "shape (2, 11)", "return logits (2, 10)"]),
        (lambda depth: nn.Linear(1, depth), ["depth", "input_shape, n_classes, n_outputs, width"]),
        (lambda n_classes: n_classes, ["not int", "nn.Module"]),
        (lambda n_classes: nn.Linear(8, n_classes), ["logits (2, 10)"]),
    ],
)
def test_modules_that_cannot_be_used_are_refused_in_one_line(source, words):
    with pytest.raises(ConfigError) as caught:
        arch(source, SHAPE, 10)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_module_without_a_linear_head_stays_whole():
    made = arch(convolutional_logits, SHAPE, 10)
    assert not made.has_head
    assert made.features == 0
    assert isinstance(made.model(), nn.Sequential)
    assert made.model()(torch.zeros(2, *SHAPE)).shape == (2, 10)


class Pair(nn.Module):
    """A module with two inputs by name and an output object, as in Hugging Face models."""

    def __init__(self, vocabulary, n_outputs):
        super().__init__()
        self.embedding, self.classifier = nn.Embedding(vocabulary, 4), nn.Linear(4, n_outputs)

    def forward(self, ids, attention_mask):
        mask = attention_mask[:, :, None].to(self.embedding.weight.dtype)
        mean = (self.embedding(ids) * mask).sum(1) / mask.sum(1).clamp(min=1)
        return SimpleNamespace(logits=self.classifier(mean))


def test_several_inputs_go_by_name_and_logits_are_unwrapped():
    fields = (
        Field(name="ids", shape=(3,), kind="token", levels=(7,)),
        Field(name="attention_mask", shape=(3,), kind="token", levels=(2,)),
    )
    made = arch(Pair, InputSpec(fields), MultiLabel(names=("a", "b", "c")))
    x = {"ids": torch.tensor([[1, 2, 0], [3, 6, 5]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    model = made.model()
    whole = Pair(7, 3)
    head = {f"classifier.{name}": value for name, value in model.head.state_dict().items()}
    whole.load_state_dict({"embedding.weight": model.body.embedding.weight, **head})
    assert torch.equal(model(**x), whole(**x).logits)
    assert (made.features, made.has_vector) == (4, True)


def test_outputs_that_are_a_tuple_are_refused_in_one_line():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            return self.linear(x.flatten(1)), x

    with pytest.raises(ConfigError, match="returns a tuple; return only the logits, as one tensor"):
        arch(Two, SHAPE, 10)
