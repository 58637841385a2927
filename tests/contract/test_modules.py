"""State in a user's module other than weights: frozen parameters, assigned buffers, and Python attributes."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from fedloom import ConfigError, FedAvg, MethodError, from_arrays, tree
from fedloom.rng import Stream
from fedloom.wire.messages import Meter

N_CLASSES, WIDTH = 3, 8
ENGINES = ("sequential", "vectorised", "processes", "debug", "bytes+sequential")


def clouds(n=60):
    y = np.arange(n) % N_CLASSES
    x = Stream(0).normal((n, 4)).numpy() + 2 * np.eye(N_CLASSES, 4, dtype=np.float32)[y]
    return from_arrays(x, y, name="clouds")


class Adapted(nn.Module):
    """A frozen layer with a trained head."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, WIDTH).requires_grad_(False)
        self.out = nn.Linear(WIDTH, N_CLASSES)

    def forward(self, x):
        return self.out(self.base(x).relu())


class Centring(nn.Module):
    """A module that assigns to its buffers in training."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(4))
        self.register_buffer("calls", torch.zeros(()))
        self.hidden, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, N_CLASSES)

    def forward(self, x):
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * x.mean(0).detach()
            self.calls = self.calls + 1
        return self.out(self.hidden(x - self.centre).relu())


class Recurrent(nn.Module):
    """Reads the features one after another."""

    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(1, WIDTH, batch_first=True), nn.Linear(WIDTH, N_CLASSES)

    def forward(self, x):
        return self.out(self.gru(x.unsqueeze(2))[0][:, -1])


class Remembering(nn.Module):
    """A module that adds part of the last batch to the next one."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, N_CLASSES), None

    def forward(self, x):
        h = self.hidden(x).relu()
        h = h if self.last is None else h + self.last
        self.last = h.detach().mean(0)
        return self.out(h)


class Initialising(Remembering):
    """A module that takes its scale from the first batch."""

    def forward(self, x):
        self.last = x.detach().std() if self.last is None else self.last
        return self.out((self.hidden(x) / self.last).relu())


class Logging(Remembering):
    """A module that appends to a list."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        self.sizes.append(float(x.abs().sum()))
        return self.out(self.hidden(x).relu())


class CountingInEval(Centring):
    """A module that changes a buffer in place in evaluation mode."""

    def forward(self, x):
        self.calls += 1
        return self.out(self.hidden(x).relu())


class Fleeting(Centring):
    """A module that changes a buffer that is not in the state dictionary."""

    def __init__(self):
        super().__init__()
        self.register_buffer("fleeting", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.fleeting += 1
        return self.out(self.hidden(x).relu())


class Caching(Remembering):
    """A module that creates a constant at the first call, which is harmless."""

    def forward(self, x):
        self.last = torch.ones(WIDTH, dtype=x.dtype) if self.last is None else self.last
        return self.out((self.hidden(x) * self.last).relu())


@pytest.fixture
def run(experiment):
    def go(method="fedavg", module=Adapted, **settings):
        chosen = {"model": "own", "data": "clouds", "partition": "iid", "clients": 3, **settings}
        return experiment(method, dataset=clouds(), module=module, **chosen)

    return go


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_parameters_stay_bit_equal_and_do_not_travel(run, engine):
    module = Adapted()
    frozen = {name: p.detach().clone().double() for name, p in module.base.named_parameters()}
    done = run(module=module, engine=engine)
    done.run()
    left = done.personal_model(1).state_dict()
    for name, value in frozen.items():
        assert torch.equal(left[f"nets.model.body.base.{name}"], value)
    assert not torch.equal(left["nets.model.head.weight"], module.out.weight.double())
    sent = {
        "weights": {
            "params": {"model.head.weight": module.out.weight.double(), "model.head.bias": module.out.bias.double()}
        }
    }
    per_message = sum(Meter().sizes(tree.merge(sent, {"weights": {"buffers": {}}})).values())
    assert done.ledger.total("uplink") == 2 * 3 * per_message


def test_frozen_parameters_are_in_no_state_that_is_kept(run):
    done = run("scaffold")
    done.run()
    kept = {path for path, _ in tree.flatten({"server": done.server, **done.engine.client(0)._asdict()})}
    assert kept
    assert not [path for path in kept if "base" in path]


def test_a_model_that_is_wholly_frozen_is_refused_in_one_line(run):
    with pytest.raises(ConfigError, match=r"FedAvg shares model, but here the pattern 'model' matches nothing"):
        run(module=Adapted().requires_grad_(False))
    with pytest.raises(ConfigError, match=r"FedPer shares model:body, but here .* matches nothing"):
        run("fedper")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_buffer_that_a_module_assigns_is_kept_as_in_plain_torch(run, engine):
    """With one client and one batch per epoch, the same steps are taken by hand."""
    done = run(module=Centring, engine=engine, clients=1, batch_size=100, rounds=2)
    done.run()
    x, _ = done.data.train(0)
    x = x.double()
    expected = 0.1 * x.mean(0) + 0.9 * 0.1 * x.mean(0)
    buffers = done.server["weights"]["buffers"]
    torch.testing.assert_close(buffers["model.body.centre"], expected, rtol=1e-6, atol=1e-6)
    assert float(buffers["model.body.calls"]) == 2


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Remembering, "keeps 'last' between calls"),
        (Initialising, "keeps 'last' between calls"),
        (Logging, "keeps 'sizes' between calls"),
        (CountingInEval, "changes buffer 'calls' in evaluation mode"),
        (Fleeting, "changes buffer 'fleeting', which is not persistent"),
    ],
)
def test_state_that_clients_would_share_is_refused_by_name(run, module, message):
    with pytest.raises(ConfigError, match=message):
        run(module=module)


def test_a_cache_that_does_not_depend_on_inputs_is_accepted(run):
    done = run(module=Caching)
    assert done.run()["rounds"] == 2


def test_old_weight_norm_is_refused_with_its_successor(run):
    with pytest.warns(FutureWarning):
        module = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, WIDTH)), nn.Linear(WIDTH, N_CLASSES))
    with pytest.raises(ConfigError, match=r"'0' uses the old .* use torch.nn.utils.parametrizations"):
        run(module=module)


@dataclass(frozen=True)
class WithState(FedAvg):
    """A method whose own net keeps state."""

    def nets(self, arch, task):
        return {**super().nets(arch, task), "extra": Remembering()}

    def loss(self, nets, batch, down, memory):
        return super().loss(nets, batch, down, memory) + 0 * nets.extra(batch.x).sum()


def test_debug_names_a_methods_net_that_keeps_state(run):
    with pytest.raises(MethodError, match="round 0: net 'extra' keeps 'last' \\(Remembering\\) between calls"):
        run(WithState(), engine="debug").run()


class Reporting(nn.Module):
    """Returns more than its logits."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.change(self.module(x))


class Pair(Reporting):
    def change(self, logits):
        return logits, logits


class LogSoftmax(Reporting):
    def change(self, logits):
        return logits.log_softmax(1)


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [(Pair, "returns a tuple; return only the logits, as one tensor"), (LogSoftmax, "return logits, without")],
)
def test_outputs_that_are_not_logits_are_refused_with_a_remedy(run, wrapper, message):
    with pytest.raises(ConfigError, match=message):
        run(module=wrapper(Adapted()))


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_a_bare_linear_layer_of_another_precision_is_cast(run, precision):
    for dtype in (torch.float32, torch.float64):
        done = run(module=nn.Linear(4, N_CLASSES, dtype=dtype), precision=precision)
        assert done.run()["rounds"] == 2


@pytest.mark.parametrize("method", ["fedavg", "fedmr", "scaffold"])
def test_a_parameter_without_dimensions_is_one_number(run, method):
    class Scaled(Adapted):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.out((self.scale * self.base(x)).relu())

    assert run(method, module=Scaled).run()["rounds"] == 2


def test_recurrent_models_run_one_client_after_another(run, caplog):
    runs = {engine: run(module=Recurrent, engine=engine) for engine in ("sequential", "vectorised")}
    assert caplog.messages == [
        "model=Recurrent: clients run one after another, because recurrent layers are slower in lanes"
    ]
    for done in runs.values():
        done.run()
    one, other = (done.personal_model(1).state_dict() for done in runs.values())
    assert all(torch.equal(one[name], other[name]) for name in one)
