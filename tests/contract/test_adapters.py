"""Runs with low-rank adapters: the weights that are trained and sent, on every engine."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from contract import assert_close, assert_same, left_by
from fedloom import ConfigError, FedMR, from_arrays
from fedloom.experiment.build import arithmetic
from fedloom.experiment.loop import Experiment
from fedloom.models import arch
from fedloom.models.lora import LowRank, merge_adapters
from fedloom.nets import layer_of, read_weights
from fedloom.rng import Stream
from fedloom.tools.export import write
from fedloom.wire.messages import Meter
from small import initial_weights, interrupted_after

N_CLASSES, WIDTH, RANK = 3, 8, 2
A, B = "body.hidden.parametrizations.weight.0.a", "body.hidden.parametrizations.weight.0.b"


def clouds(n=60):
    y = np.arange(n) % N_CLASSES
    x = Stream(0).normal((n, 4)).numpy() + 2 * np.eye(N_CLASSES, 4, dtype=np.float32)[y]
    return from_arrays(x, y, name="clouds")


class Pretrained(nn.Module):
    """A module that carries its weights."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, N_CLASSES)
        with torch.no_grad():
            for p in self.hidden.parameters():
                p.copy_(torch.linspace(-9, 9, p.numel(), dtype=torch.float32).sin().reshape(p.shape))

    def forward(self, x):
        return self.out(self.hidden(x).relu())


@pytest.fixture
def run(experiment):
    def go(method="fedavg", module=Pretrained, **settings):
        chosen = {"model": "own", "data": "clouds", "partition": "iid", "clients": 3, "model.lora": RANK, **settings}
        return experiment(method, dataset=clouds(), module=module, **chosen)

    return go


def message(**params):
    """Return the size of a message with these parameters, in bytes."""
    tensors = {f"model.{name}": torch.zeros(shape, dtype=torch.float64) for name, shape in params.items()}
    return sum(Meter().sizes({"weights": {"params": tensors, "buffers": {}}}).values())


ADAPTERS = {A: (RANK, 4), B: (WIDTH, RANK)}
HEAD = {"head.weight": (N_CLASSES, WIDTH), "head.bias": (N_CLASSES,)}


@pytest.mark.parametrize(
    ("method", "settings", "sent"),
    [
        ("fedavg", {}, ADAPTERS | HEAD),
        ("fedper", {}, ADAPTERS),
        ("fedper", {"model.lora_freeze_a": True}, {B: (WIDTH, RANK)}),
    ],
)
def test_the_uplink_is_exactly_the_adapters(run, method, settings, sent):
    done = run(method, **settings)
    done.run()
    assert done.ledger.total("uplink") == 2 * 3 * message(**sent)


@pytest.mark.parametrize("engine", ["sequential", "vectorised", "processes", "debug", "bytes+sequential"])
def test_every_engine_trains_the_adapters_alone(run, engine):
    reference, done = left_by(run("fedper")), run("fedper", engine=engine)
    (assert_close if engine == "vectorised" else assert_same)(left_by(done), reference)
    left = done.personal_model(1).nets.model.state_dict()
    original = Pretrained().double()
    assert torch.equal(left["body.hidden.parametrizations.weight.original"], original.hidden.weight)
    assert torch.equal(left["body.hidden.bias"], original.hidden.bias)
    assert left[B].any()


def test_lanes_are_used(run, caplog):
    run(engine="vectorised").run()
    assert "one after another" not in caplog.text


def test_a_model_with_adapters_starts_as_the_base():
    x = torch.randn(5, 4)
    module = Pretrained()
    made = arch(module, (4,), N_CLASSES, options={"lora": RANK, "lora_alpha": 8}).model()
    assert torch.equal(made(x), module(x))
    (adapter,) = [part for part in made.modules() if isinstance(part, LowRank)]
    assert adapter.scale == 4
    assert list(dict(module.named_parameters())) == ["hidden.weight", "hidden.bias", "out.weight", "out.bias"]


def test_fedmr_keeps_an_adapters_matrices_together(run):
    weights = read_weights({"model": arch(Pretrained(), (4,), N_CLASSES, options={"lora": RANK}).model()})
    pieces = FedMR().units(weights)
    assert [[name for _, name in piece] for piece in pieces] == [
        [f"model.{A}", f"model.{B}"],
        ["model.head.weight", "model.head.bias"],
    ]
    assert all(len({layer_of(name) for _, name in piece}) == 1 for piece in pieces)
    assert run("fedmr", cohort=3).run()["rounds"] == 2


def test_frozen_matrices_stay_at_their_common_initial_value(run):
    done = run("fedavg", **{"model.lora_freeze_a": True})
    with arithmetic(done.settings):
        first = done.problem.modules(0)["model"].state_dict()[A]
    done.run()
    assert f"model.{A}" not in done.server["weights"]["params"]
    for i in range(3):
        assert torch.equal(done.personal_model(i).nets.model.state_dict()[A], first)


@pytest.fixture
def base(tmp_path):
    """Return a file with the weights of an MLP for the digits."""
    torch.manual_seed(1)
    model = arch("mlp", (1, 8, 8), 10, options={"hidden": 12}).model()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def test_a_run_on_a_base_from_a_file_resumes(experiment, base):
    settings = {"model.lora": 2, "model.weights": str(base), "rounds": 3, "checkpoint_every": 1}
    whole = left_by(experiment("fedper", **settings))
    path = interrupted_after(experiment("fedper", **settings), 1)
    assert_same(left_by(Experiment.resume(path)), whole)


def test_a_personal_model_can_be_merged(experiment, base):
    done = experiment("fedper", **{"model.lora": 2, "model.weights": str(base), "precision": "fp32"})
    done.run()
    model, x = done.personal_model(1), done.data.test(1)[0]
    plain = merge_adapters(model)
    assert torch.equal(plain(x), model(x))
    assert type(plain.nets.model.body.linear) is nn.Linear
    assert "nets.model.body.linear.weight" in plain.state_dict()


def test_an_exported_file_has_plain_weights(experiment, base, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    done = experiment("fedper", **{"model.lora": 2, "model.weights": str(base), "precision": "fp32"})
    done.run()
    x, file = done.data.test(1)[0], tmp_path / "client.onnx"
    model, _ = write(done, 1, file)
    with torch.inference_mode():
        assert torch.equal(model(x), done.personal_model(1)(x))
    found = onnxruntime.InferenceSession(str(file)).run(None, {"input": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x))
    names = set(load_file(file.with_suffix(".safetensors")))
    assert names == {f"nets.model.{name}" for name in load_file(base)}
    again = arch("mlp", (1, 8, 8), 10, options={"hidden": 12, "weights": str(file.with_suffix(".safetensors"))}).body()
    assert torch.equal(again.linear.weight, model.nets.model.body.linear.weight)


def test_a_base_can_be_fine_tuned_without_adapters(experiment, base):
    module = experiment("fedavg", **{"model.weights": str(base)}).problem.modules(0)["model"]
    assert torch.equal(module.body.linear.weight, load_file(base)["body.linear.weight"].double())
    assert module.body.linear.weight.requires_grad


def test_a_projection_to_a_common_width_is_trained(run):
    weights = initial_weights(run(width=5))["params"]
    assert "model.body.project.weight" in weights
    assert "model.body.backbone.hidden.parametrizations.weight.0.b" in weights
    assert not any("original" in name for name in weights)


def test_a_function_may_have_options_of_the_same_name(run):
    def net(weights):
        assert weights == "mine"
        return Pretrained()

    names = set(initial_weights(run(module=net, **{"model.weights": "mine"}))["params"])
    assert names == {f"model.{name}" for name in (A, B, *HEAD)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model.lora": 2}, "is random.*set model.weights=FILE.safetensors"),
        ({"model.lora": 0}, "model.lora=0: must be an integer of at least 1"),
        ({"model.lora": "two"}, "model.lora='two': must be an integer of at least 1"),
        ({"model.lora_alpha": 4}, "model.lora_alpha=4: has no effect without adapters; set model.lora=RANK"),
        ({"model.lora_freeze_a": True}, "model.lora_freeze_a=True: has no effect without adapters"),
        ({"model.lora": 2, "model.lora_alpha": 0}, "model.lora_alpha=0: must be a number above 0"),
        ({"model.lora": 2, "model.lora_freeze_a": 1}, "model.lora_freeze_a=1: must be true or false"),
        ({"model.weights": "nowhere.safetensors"}, "model.weights=nowhere.safetensors: there is no such file"),
        ({"model.weights": 3}, "model.weights=3: must be the name of a safetensors file"),
        ({"model": "logistic", "model.lora": 2}, "model.lora=2: the model's body has no nn.Linear"),
        ({"model.lra": 2}, r"model mlp has no option 'lra' \(did you mean 'lora'\?\)"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(experiment, settings, words):
    with pytest.raises(ConfigError, match=words) as caught:
        experiment("fedavg", **settings)
    assert "\n" not in str(caught.value)
