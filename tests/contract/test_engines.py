"""Every method on every engine: the same numbers as the reference, bit for bit."""

import importlib.util
import itertools
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from contract import TOYS, Left, assert_close, assert_same, left_by
from fedloom import Downlink, FedAvg, FedProx, Stream, Train, tree
from fedloom.engines import ENGINES, make_engine
from fedloom.errors import ConfigError
from fedloom.experiment.loop import Experiment, GivenObjects
from fedloom.methods.registry import METHODS
from fedloom.nets import write_weights
from fedloom.training.fast import step_cache
from fedloom.training.fast.gram_layer import GramLayer, PhaseWork
from fedloom.wire.messages import encode
from small import BRIEF, KINDS, brief, initial_weights, interrupted_after, kinds_first, spied

REFERENCE = "sequential"
WRAPPED = ("debug+sequential", "bytes+sequential", "debug+bytes+processes")
NO_RAY = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed (pip install ray)")
OTHERS = [engine for engine in [*ENGINES, *WRAPPED] if engine != REFERENCE]
FEW: dict[str, Any] = {"clients": 3, "cohort": 2, "data.rows": 100, "batch_size": 16}
MODELS: dict[str, dict[str, Any]] = {"mlp": {}, "fedrir_cnn": {**FEW, "width": 16}}
"""One model with an input layer, and one with convolutions and running statistics."""
ENOUGH = {"mlp": ("vectorised", "debug+bytes+processes"), "fedrir_cnn": ("vectorised",)}
"""The engines on which every method runs. Other engines run a few methods, and the rest only with `pytest -m slow`."""
SETTINGS = {"clients": 5, "cohort": 3, "rounds": 2, "batch_size": 32, "data.rows": 200, "engine.workers": 2}

ROUNDING = ("vectorised",)
"""Engines that give the same numbers up to rounding, but not the same bits."""


def marks_of(engine):
    """Return the marks of tests that need an engine that may not be installed."""
    return [NO_RAY] if engine.endswith("ray") else []


references: dict[tuple[Any, ...], Left] = {}


def make(experiment, method, model, engine, **settings):
    what = TOYS[method]() if method in TOYS else method
    chosen = {**SETTINGS, "engine": engine, "model": model, **MODELS.get(model, {}), **brief(method), **settings}
    chosen["schedule.warmup"] = min(
        1, chosen["rounds"] - 1
    )  # the first of several rounds has half of the learning rate
    return experiment(what, **chosen)


def assert_agrees(engine, run, with_):
    (assert_close if engine in ROUNDING else assert_same)(run, with_)


@pytest.fixture
def reference(experiment):
    """Return a function that returns the results of the reference engine. Each run is done only once."""

    def find(method, model, **settings):
        key = method, model, tuple(settings.items())
        if key not in references:
            references[key] = left_by(make(experiment, method, model, REFERENCE, **settings))
            assert not any(references[key].summary[what] for what in ("rejected", "lost", "late", "skipped"))
        return references[key]

    return find


CASES = [
    *((method, model) for model in MODELS for method in METHODS),
    *((toy, "mlp") for toy in TOYS),
    ("Perfed", "fedrir_cnn"),
    ("Sharing", "fedrir_cnn"),
    ("fedmr+fedprox", "mlp"),
    ("fedmr+fedasam", "fedrir_cnn"),
    ("Secure", "fedrir_cnn"),
]
EVERYWHERE = {
    ("fedavg", "mlp"),
    ("fedavg", "fedrir_cnn"),
    ("Sharing", "fedrir_cnn"),
    ("fedmr", "mlp"),
    ("fedrir", "mlp"),
    ("fedvtc", "mlp"),
    ("Meta", "mlp"),
}
"""Cases that run on all engines."""


def on_engines(cases, enough):
    """Return every case on every engine; a case is marked slow unless `enough(case, engine)`."""
    return [
        pytest.param(*case, engine, marks=marks_of(engine) + ([] if enough(case, engine) else [pytest.mark.slow]))
        for case in cases
        for engine in OTHERS
    ]


def enough(method, model, engine):
    """Return whether a case runs by default. Methods that are not in `KINDS` run with convolutions only with `pytest -m slow`."""
    return engine in ENOUGH[model] and (model == "mlp" or method not in METHODS or method in KINDS)


@pytest.mark.parametrize("method", METHODS)
def test_travelling_parts_are_declared(reference, method):
    ways = reference(method, "mlp").summary["bytes_by_kind"].values()
    sent = {kind for way in ways for kind in way} - {"header"}
    cls = METHODS[method]
    assert sent == {*(["weights"] if cls.shared else []), *cls.also_travels}


@pytest.fixture
def mapped(caplog):
    """Return whether lanes were really used, because a fallback to one client after another would also agree with the reference."""
    return lambda: "cannot be vectorised" not in caplog.text


@pytest.mark.parametrize(
    ("method", "model", "engine"),
    on_engines(CASES, lambda case, engine: enough(*case, engine) or case in EVERYWHERE),
)
def test_all_engines_agree_bit_for_bit(experiment, reference, mapped, method, model, engine):
    assert_agrees(engine, left_by(make(experiment, method, model, engine)), reference(method, model))
    assert mapped()


MASKED = {"method.loss_region": "masked", "method.rec_reduction": "sum"}
VARIANTS = {
    "fedvtc, architectures": (
        "fedvtc",
        {"models": ["mlp", "fedrir_cnn"], "width": 16, "clients": 4, "cohort": 4, **BRIEF},
    ),
    "fedvtc, shared": ("fedvtc", {"method.share_generator": True, **BRIEF}),
    "fedvtc, at the end": ("fedvtc", {"method.finetune": "end", **BRIEF}),
    "fedvtc, scaled": ("fedvtc", {"method.pull": "scaled", "method.covariance": "full", **BRIEF}),
    "fedrir, sampled": ("fedrir", {"method.idm_mode": "vclub_sampled"}),
    "fedrir, decorrelated": ("fedrir", {"method.idm_mode": "decorrelated"}),
    "fedrir, released": ("fedrir", {"method.idm_mode": "released", "method.csfe_mode": "training"}),
    "fedrir, supervised": ("fedrir", {"method.mcsl": "supervised"}),
    "fedrir, unmasked": ("fedrir", {"method.mcsl": "unmasked", "method.keep_optimizer": False}),
    "fedrir, off": ("fedrir", {"method.mcsl": "off", "method.buffers": "shared", "model": "fedrir_cnn", "width": 16}),
    "fedrir, masked pixels": ("fedrir", MASKED),
    "own starts": ("fedper", {"same_init": False}),
    "apfl, learned": ("apfl", {"method.alpha_lr": 0.5}),
    "per_fedavg, hf": ("per_fedavg", {"method.variant": "hf", "batch_size": 8}),
    "fedamp, cosine": ("fedamp", {"method.attention": "cosine"}),
    "fedfomo, valid": ("fedfomo", {"eval": {"valid": 0.2}}),
    "scores": ("fedper", {"eval": {"fitted": True, "valid": 0.2, "clients": 3, "general_every": 1}}),
}


ELSEWHERE = ("fedvtc, architectures", "fedvtc, at the end", "fedrir, off", "own starts", "scores", "fedfomo, valid")
"""Variants that change the code that a worker process runs. All other variants change only numbers."""


@pytest.mark.parametrize(
    ("variant", "engine"), [*((name, "vectorised") for name in VARIANTS), *((name, "processes") for name in ELSEWHERE)]
)
def test_engines_agree_on_variants(experiment, reference, mapped, variant, engine):
    method, settings = VARIANTS[variant]
    settings = {**SETTINGS, **FEW, "model": "mlp", **settings}
    if "models" in settings:
        del settings["model"]
    key = variant, REFERENCE
    if key not in references:
        references[key] = left_by(experiment(method, **{**settings, "engine": REFERENCE}))
    assert_agrees(engine, left_by(experiment(method, **{**settings, "engine": engine})), references[key])
    assert mapped()


@pytest.mark.parametrize("same", [True, False])
def test_clients_start_from_equal_weights_or_each_from_its_own(experiment, same):
    run = experiment("local", same_init=same, **{**SETTINGS, "engine": "sequential"})
    one, other = (initial_weights(run, i) for i in (0, 1))
    assert tree.equal(one, other) == same


@pytest.mark.parametrize("method", ["fedavg", "fedrir", "fedvtc"])
def test_workers_train_lanes_up_to_rounding(experiment, reference, method, monkeypatch):
    def refuse(*words):
        raise AssertionError(words)

    monkeypatch.setattr("fedloom.engines.vectorised.log.warning", refuse)  # the workers are forks
    lanes = make(experiment, method, "fedrir_cnn", "processes", **{"engine.lanes": 2})
    assert_close(left_by(lanes), reference(method, "fedrir_cnn"))


@pytest.mark.parametrize(
    ("method", "engine"),
    on_engines(
        [(method,) for method in ("fedavg", "scaffold", "fedmr", "fedrir", "Perfed")],
        lambda case, engine: engine == "vectorised" or (engine == "processes" and case == ("fedavg",)),
    ),
)
def test_convolutions_with_biases_agree_too(experiment, reference, method, engine):
    expected = reference(method, "fedmr_cnn", **FEW)
    assert_agrees(engine, left_by(make(experiment, method, "fedmr_cnn", engine, **FEW)), expected)


CODED = [{"uplink": "topk:0.2,int8", "downlink": "fp16"}, {"uplink": "gaussian:1.0:0.01,fp16", "downlink": "int8"}]


@pytest.mark.parametrize("settings", CODED)
@pytest.mark.parametrize(
    ("method", "engine"),
    on_engines(
        [(method,) for method in ("fedavg", "fedmr", "fedrir", "scaffold", "Perfed", "Differing")],
        lambda case, engine: (
            engine in (ENOUGH["mlp"][1:] if case == ("fedrir",) else ENOUGH["mlp"]) or case == ("Perfed",)
        ),
    ),
)
def test_engines_agree_on_messages_that_are_transformed(experiment, reference, method, settings, engine):
    settings = {"model.hidden": 32, **settings}
    expected = reference(method, "mlp", **settings)
    plain = reference(method, "mlp", **{"model.hidden": 32})
    assert expected.summary["uplink_bytes"] < 0.7 * plain.summary["uplink_bytes"]
    assert expected.summary["downlink_bytes"] < 0.7 * plain.summary["downlink_bytes"]
    assert_agrees(engine, left_by(make(experiment, method, "mlp", engine, **settings)), expected)


def test_clients_are_scored_with_the_decoded_downlink_and_the_server_with_its_own_model(experiment):
    run = make(experiment, "fedavg", "mlp", "sequential", downlink="int8", clients=3, cohort=3)
    run.run()
    exact, own = run.server["weights"]["params"], dict(run.personal_model(1).named_parameters())
    for name, p in exact.items():
        step = float(p.abs().max()) / 127
        gap = (own[f"nets.{name}"] - p).abs().max()
        assert 0 < gap <= step / 2 * (1 + 1e-6)
    x, y = run.data.common()
    modules = run.problem.modules(0)
    write_weights(modules, run.server["weights"])
    right = (modules["model"].eval()(x).argmax(1) == y).double().mean().item()
    assert run.rows[-1]["server_accuracy"] == pytest.approx(right, abs=1e-12)
    assert not run.problem.one_model


OTHER_PARTS = {
    **dict.fromkeys(("fedproto", "fedtgp", "fedvtc", "fedgh"), "prototypes"),
    **dict.fromkeys(("fedamp", "fedfomo"), "model"),
    "fd": "predictions",
    "fedkd": "update",
    "ifca": "models",
}
"""The largest part of a message that has no `weights`."""
PARTS = [
    *((method, OTHER_PARTS.get(method, "weights")) for method in METHODS),
    ("scaffold", "control"),
    ("fedvtc", "variance"),
]


@pytest.mark.parametrize(("method", "part"), PARTS)
def test_every_method_accepts_transforms_of_its_messages(experiment, reference, method, part):
    word = "int8" if part == "weights" else f"{part}/int8"
    only_up = part == "variance" or method == "fedgh"
    up = "int8" if part == "models" else word
    ways = {"uplink": up} if only_up else {"uplink": up, "downlink": word}
    run = make(experiment, method, "mlp", "debug+bytes+sequential", **ways)
    summary = run.run()
    kinds, plain = summary["bytes_by_kind"], reference(method, "mlp").summary["bytes_by_kind"]
    assert summary["rejected"] == 0
    for way in ways:
        assert part not in plain[way] or kinds[way][part] < plain[way][part] / 4
    clients = [run.engine.client(i)._asdict() for i in range(5)]
    assert all(torch.isfinite(leaf).all() for tree_ in (run.server, *clients) for leaf in tree.leaves(tree_))
    assert part != "variance" or (run.server["variance"] >= 0).all()


@pytest.mark.parametrize("engine", ["sequential", "vectorised", "processes"])
@pytest.mark.parametrize(("method", "kept"), [("fedavg", []), ("fedper", [0, 1, 2, 3, 4])])
def test_only_clients_that_keep_something_are_kept(experiment, method, kept, engine):
    run = make(experiment, method, "mlp", engine, cohort=5)
    run.run()
    assert list(run.engine.changed()) == kept


@pytest.mark.parametrize("method", [*kinds_first(METHODS), *TOYS])
def test_a_round_changes_nobody_outside_the_cohort_and_no_message(experiment, method):
    run = make(experiment, method, "fedrir_cnn" if method == "fedrir" else "mlp", "sequential", clients=5)
    before = [tree.clone(run.engine.client(i)._asdict()) for i in range(5)]
    server = tree.clone(run.server)
    torch.set_default_dtype(torch.float64)
    try:
        cohort = [0] if run.method.pooled else [1, 3]
        down = run.hooks.downlink(run.server, 0, cohort)
        sent = [tree.clone(down.to(slot)) for slot in range(len(cohort))]
        replies = run.engine.train(0, cohort, down)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [reply.client for reply in replies] == cohort
    for i in {0, 1, 2, 3, 4} - set(cohort):
        assert tree.equal(before[i], run.engine.client(i)._asdict())
    assert tree.equal(server, run.server)
    assert all(tree.equal(copy, down.to(slot)) for slot, copy in enumerate(sent))
    assert set(run.engine.changed()) <= set(cohort)


@pytest.mark.parametrize(
    ("method", "engine"),
    [
        *((method, REFERENCE) for method in [*KINDS, *TOYS]),
        ("fedrir", "processes"),
        pytest.param("fedrir", "ray", marks=NO_RAY),
    ],
)
def test_the_order_in_which_a_cohort_works_changes_nothing(experiment, method, engine):
    run = make(experiment, method, "mlp", REFERENCE)
    cohort = [0] if run.method.pooled else [0, 2, 4]
    torch.set_default_dtype(torch.float64)
    try:
        down = run.hooks.downlink(run.server, 0, cohort)
        found = []
        for order in ([0, 1, 2], [2, 0, 1]):
            places = [slot for slot in order if slot < len(cohort)]
            inner = make_engine(engine, run.problem, 2)
            there = Downlink(each=[down.to(slot) for slot in places])
            replies = inner.train(0, [cohort[slot] for slot in places], there)
            found.append({r.client: (r.uplink, tree.clone(inner.client(r.client)._asdict()), r.logs) for r in replies})
            inner.close()
    finally:
        torch.set_default_dtype(torch.float32)
    one, other = found
    for i in cohort:
        assert tree.equal(one[i][0], other[i][0])
        assert tree.equal(one[i][1], other[i][1])
        assert one[i][2] == other[i][2]


@pytest.mark.parametrize("method", ["fedrir", "fedbn", "Perfed"])
def test_private_running_statistics_never_leave(experiment, method):
    """The engine `debug` checks that a client sends only what the method declares."""
    run = make(experiment, method, "fedrir_cnn", "sequential", rounds=1)
    rounds = spied(run)
    run.run()
    sent = [reply.uplink for turns in rounds for reply in turns.replies]
    assert any(path.endswith("running_mean") for path in tree.structure(initial_weights(run)))
    assert sent
    assert not any("running_mean" in path for uplink in sent for path in tree.structure(uplink))


@pytest.mark.parametrize(
    ("method", "model"),
    [*((name, "mlp") for name in KINDS), *((name, "fedrir_cnn") for name in ("fedavg", "fedrir", "fedbn"))],
)
def test_the_bytes_reported_are_the_bytes_of_the_messages(experiment, method, model):
    run = make(experiment, method, model, "sequential")
    rounds = spied(run)
    summary = run.run()
    sent = {
        "up": [reply.uplink for turns in rounds for reply in turns.replies],
        "down": [message for turns in rounds for message in turns.sent],
    }
    lengths = {way: [len(encode(m, round=1, client=2, examples=3)) for m in sent[way]] for way in ("up", "down")}
    assert summary["uplink_bytes"] == sum(lengths["up"])
    assert summary["downlink_bytes"] == sum(lengths["down"])
    for way in ("uplink", "downlink"):
        assert sum(summary["bytes_by_kind"][way].values()) == summary[f"{way}_bytes"]
        tensors = sum(tree.n_bytes(m) for m in sent[way.removesuffix("link")])
        assert summary["bytes_by_kind"][way].get("weights", 0) <= tensors
        assert summary[f"{way}_bytes"] - summary["bytes_by_kind"][way].get("header", 0) == tensors
    turns = [row for row in run.client_rows if "uplink_bytes" in row]
    assert sum(row["uplink_bytes"] for row in turns) == summary["uplink_bytes"]
    assert sum(row["downlink_bytes"] for row in turns) == summary["downlink_bytes"]


class Dropping(nn.Module):
    """A small net with Dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout2d(0.3), nn.Flatten(), nn.Dropout(0.5))
        self.head = nn.Linear(144, 10)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("engine", ["processes", "vectorised", "bytes+sequential"])
def test_dropout_follows_from_the_seed(experiment, engine):
    def go(name, seed):
        torch.manual_seed(0)
        settings = {**SETTINGS, "engine": name, "seed": seed, "model": "Dropping"}
        return left_by(experiment("fedavg_ft", module=Dropping(), **settings))

    torch.manual_seed(1)
    first = go("sequential", 0)
    torch.rand(7)  # the state of torch's own generator must not matter
    assert_agrees(engine, go(engine, 0), first)


class Watching(nn.Module):
    """Records which of 64 ones its Dropout drops for batches of five examples. Operations are counted with smaller batches."""

    seen: ClassVar[list[tuple[bool, ...]]] = []

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.last = nn.Dropout(0.5), nn.Linear(64, 10)

    def forward(self, x):
        left = self.dropout(x.new_ones(64))
        if self.training and len(x) == 5:
            Watching.seen.append(tuple((left == 0).tolist()))
        return self.last(x.flatten(1) * left)


def test_dropout_differs_from_client_to_client_and_step_to_step(experiment):
    run = experiment("fedavg", module=Watching, **{**SETTINGS, "rounds": 2, "model": "Watching", "batch_size": 5})
    Watching.seen.clear()  # of the dry runs
    run.run()
    assert len(Watching.seen) > 20
    assert len(set(Watching.seen)) == len(Watching.seen)


def test_workers_and_models_that_refuse_channels_last(experiment):
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(144, 10)

        def forward(self, x):
            return self.head(torch.relu(self.conv(x)).view(len(x), -1))

    def go(name):
        torch.manual_seed(0)
        return left_by(experiment("fedavg_ft", module=Viewing(), **{**SETTINGS, "engine": name, "model": "Viewing"}))

    assert_same(go("sequential"), go("processes"))


@dataclass(frozen=True)
class Retuned(FedProx):
    """FedProx whose training and adaptation share code and name, but not hyper-parameters.

    It creates other losses in every local update.
    """

    mu: float = 5.0

    def adapt(self):
        own, optimizer = replace(self, mu=0.0), self.local_optimizer()
        enclosing = Train("enclosing", lambda *given: self.mu * own.loss(*given), ("model",), optimizer)
        bound = Train("bound", partial(own.scaled, 2.0), ("model",), optimizer)
        return (*own.phases(), enclosing, bound)

    def scaled(self, factor, *given):
        return factor * self.loss(*given)


@dataclass(frozen=True)
class Uneven(FedAvg):
    """FedAvg with a loss whose tensors depend on the number of classes in the batch, or of examples of some class."""

    def loss(self, nets, batch, down, memory):
        logits, few = nets.model(batch.x), batch.y < 5
        chosen = cross_entropy(logits[few], batch.y[few], reduction="sum")
        return chosen + cross_entropy(logits, batch.y) / len(batch.y.unique())


@dataclass(frozen=True)
class Selective(FedAvg):
    """FedAvg in which clients with many examples take more steps."""

    def phases(self):
        more = Train("more", self.loss, ("model:head",), self.local_optimizer(), when=lambda turn: turn.examples > 24)
        return (*super().phases(), more)


def test_lanes_are_of_clients_with_the_same_work(experiment, mapped):
    settings = {**SETTINGS, "clients": 12, "cohort": 12, "rounds": 4, "data.rows": 400, "checkpoint_every": 1}
    expected = left_by(experiment(Selective(), **{**settings, "engine": "sequential"}))
    assert {"more.loss" in row for row in expected.turns} == {True, False}
    lanes = {**settings, "engine": "vectorised", "engine.lanes": 4}
    whole = left_by(experiment(Selective(), **lanes))
    assert_close(whole, expected)
    assert mapped()
    resumed = Experiment.resume(
        interrupted_after(experiment(Selective(), **lanes), 2), GivenObjects(method=Selective())
    )
    assert_same(left_by(resumed), whole)


CODES = {"Retuned": Retuned, "Uneven": Uneven}


@pytest.mark.parametrize("method", [*kinds_first(METHODS), *TOYS, *CODES])
def test_replaying_short_steps_changes_nothing(experiment, method, monkeypatch):
    rounds = 4 if method == "Late" else 2
    settings = {"rounds": rounds, "batch_size": 4, "clients": 3, "cohort": 3, "data.rows": 60, "model.hidden": 8}
    seconds, runs = itertools.cycle([1.0, 0.0]), []
    monkeypatch.setattr(step_cache, "shortest_s", lambda *_: next(seconds))  # every replay counts as faster
    monkeypatch.setattr(step_cache, "TRIALS", 5)
    for longest in (0.0, 1e9):  # never, and whenever it gives the same bits
        monkeypatch.setattr(step_cache, "SHORT_S", longest)
        made = CODES[method]() if method in CODES else method
        runs.append(left_by(make(experiment, made, "mlp", "sequential", **settings)))
    assert_same(*runs)


@pytest.fixture
def by_gram_matrix(monkeypatch):
    """Return a function that makes phases use the Gram matrix of input layers if possible, and that returns the list of these layers."""

    def begin():
        made, init = [], GramLayer.__init__
        monkeypatch.setattr(PhaseWork, "is_less_by_gram_matrix", lambda *_: True)
        monkeypatch.setattr(GramLayer, "__init__", lambda self, *given: made.append(given) or init(self, *given))
        return made

    return begin


WITHOUT_GRAM_LAYERS = {
    "Counting",
    "Perfed",
    "Secure",
    "Sharing",
    "apfl",
    "fedamp",
    "fedasam",
    "fedcross",
    "feddyn",
    "fedgamma",
    "fedmr",
    "fedmut",
    "fedpac",
    "fedrir_moments",
    "fedprox",
    "fedrir",
    "fedtype",
    "pfedme",
    "fedsam",
    "fedspeed",
    "scaffold",
}
"""Methods whose losses read weights, whose optimisers are not plain SGD, or that take no steps."""


@pytest.mark.parametrize("method", [*kinds_first(METHODS), *TOYS])
def test_input_layers_by_gram_matrix_change_nothing_but_rounding(experiment, reference, by_gram_matrix, mapped, method):
    plain, made = reference(method, "mlp"), by_gram_matrix()
    one = left_by(make(experiment, method, "mlp", "sequential"))
    assert_close(one, plain)
    assert bool(made) == (method not in WITHOUT_GRAM_LAYERS)
    if made:  # otherwise, the lanes are those of `test_all_engines_agree_bit_for_bit`
        assert_close(left_by(make(experiment, method, "mlp", "vectorised")), one)
    if method in ("fedavg", "Late"):
        assert_same(left_by(make(experiment, method, "mlp", "processes")), one)


def test_a_loss_recreated_in_every_local_update_is_traced_once(experiment, monkeypatch):
    traced, trace = [], step_cache.trace
    monkeypatch.setattr(step_cache, "trace", lambda *given: traced.append(given) or trace(*given))
    monkeypatch.setattr(step_cache, "SHORT_S", 1e9)
    monkeypatch.setattr(step_cache, "TRIALS", 3)
    make(experiment, Retuned(), "mlp", "sequential", rounds=12, batch_size=1000, clients=1, cohort=1).run()
    assert len(traced) == 4  # for training, and for the three phases of adaptation


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_features_computed_once_for_two_losses_give_the_same_weights(experiment, engine):
    settings = {**SETTINGS, "engine": engine, "batch_size": 8}
    methods = (TOYS["Sharing"](local_epochs=3, shares=shares) for shares in (True, False))
    once, twice = (left_by(experiment(method, **settings)) for method in methods)
    for one, other in zip([once.server, *once.clients], [twice.server, *twice.clients], strict=True):
        tree.map_tree(lambda p, q: torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10) or p, one, other)
    assert once.summary["flops_per_round"] < 0.8 * twice.summary["flops_per_round"]


@dataclass(frozen=True)
class Keeping(FedAvg):
    """FedAvg in which the server keeps an uplink of the first round unchanged."""

    def init_server(self, weights, task, round):
        return super().init_server(weights, task, round) | {"kept": self.travelling(weights)}

    def aggregate(self, server, uplinks, round):
        kept = server["kept"] if round.number else uplinks[0]["weights"]
        return super().aggregate(server, uplinks, round) | {"kept": kept}


def test_what_the_server_keeps_of_an_uplink_stays_as_it_came(experiment):
    runs = [left_by(make(experiment, Keeping(), "mlp", engine, cohort=5)) for engine in ("sequential", "processes")]
    assert_same(*runs)
    assert not tree.equal(runs[0].server["kept"], runs[0].server["weights"])


def test_class_means_have_a_known_answer(experiment):
    run = make(experiment, "ClassMeans", "mlp", "sequential", cohort=5, rounds=1)
    run.run()
    torch.set_default_dtype(torch.float64)
    try:
        rows = [run.data.train(i) for i in range(5)]
    finally:
        torch.set_default_dtype(torch.float32)
    x, y = torch.cat([x.flatten(1) for x, _ in rows]), torch.cat([y for _, y in rows])
    statistics = run.server["statistics"]
    assert statistics["count"].tolist() == torch.bincount(y, minlength=10).tolist()
    for c in range(10):
        torch.testing.assert_close(statistics["sum"][c], x[y == c].sum(0))


def test_a_set_phase_has_a_known_answer(experiment):
    run = make(experiment, "Counting", "mlp", "sequential", cohort=5, rounds=1)
    run.run()
    n = [run.data.n_train(i) for i in range(5)]
    expected = sum(k * k for k in n) / sum(n)
    for p in tree.leaves(run.server["weights"]["params"]):
        torch.testing.assert_close(p, torch.full_like(p, expected))


def test_the_closing_exchange_reaches_all_clients_and_each_predicts_with_its_own_message(experiment):
    """The last scores are those of each client's own message. Training and earlier scores are those of FedAvg."""
    run, plain = make(experiment, "Closing", "mlp", "sequential"), make(experiment, "fedavg", "mlp", "sequential")
    for one in (run, plain):
        one.run()
    assert (run.server["means"] > 0).all()
    assert run.rows[0] == run.rows[0] | {k: v for k, v in plain.rows[0].items() if "accuracy" in k or "loss" in k}
    nets = {name: module.double().eval() for name, module in run.problem.modules(0).items()}
    for i, (row,) in enumerate(
        [[r for r in run.client_rows if r["round"] == 2 and r["client"] == i] for i in range(5)]
    ):
        shifted = {n: p + run.server["means"][i] for n, p in run.server["weights"]["params"].items()}
        write_weights(nets, {"params": shifted, "buffers": {}})
        x, y = run.data.test(i)
        with torch.no_grad():
            right = (nets["model"](x.double()).argmax(1) == y).double().mean()
            torch.testing.assert_close(run.personal_model(i)(x), nets["model"](x.double()))
        assert row["personal_accuracy"] == pytest.approx(float(right))
    sizes = [run.ledger.kinds[way] for way in ("uplink", "downlink")]
    assert sizes[0]["mean"] == 5 * 8
    assert sizes[1]["weights"] / plain.ledger.kinds["downlink"]["weights"] == (2 * 3 + 5) / (2 * 3)


def test_phases_for_the_last_round_and_of_some_steps(experiment):
    run = make(experiment, "Meta", "mlp", "sequential", rounds=3)
    rows = left_by(run).rows
    assert ["last.loss" in row for row in rows] == [False, False, True]
    plan, rng = run.problem.plan, Stream(0)
    batches = {i: len(list(plan.batches(run.data.n_train(i), 1, None, rng))) for i in range(5)}
    for turn in run.client_rows:
        if "steps" in turn:
            assert turn["steps"] == 2 * batches[turn["client"]] + (2 if turn["round"] == 3 else 0)


@pytest.mark.parametrize("engine", [pytest.param(name, marks=marks_of(name)) for name in ENGINES])
def test_memory_holds_what_was_handed_on(experiment, engine):
    run = make(experiment, "Remembering", "mlp", engine, cohort=5)
    rounds = spied(run)
    left = left_by(run)
    seen = [{reply.client: reply.uplink["weights"]["params"] for reply in turns.replies} for turns in rounds]
    for i in range(5):
        assert tree.equal(left.clients[i]["memory"]["newer"], seen[1][i])
        assert tree.equal(left.clients[i]["memory"]["older"], seen[0][i])


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_a_single_example_cannot_train_a_batch_norm_on_any_engine(experiment, engine):
    with pytest.raises(ConfigError, match=r"client 0 trains on batches of one example.*BatchNorm cannot train"):
        experiment("fedavg", engine=engine, model="mobilenetv2", batch_size=1, rounds=1, **{"data.rows": 40})
    run = experiment("fedavg", engine=engine, model="resnet8", batch_size=1, rounds=1, **{"data.rows": 40})
    run.run()  # several values per channel
    assert run.rows[-1]["personal_accuracy"] is not None


@pytest.mark.parametrize("buffers", ["shared", "private"])
def test_without_running_statistics_the_server_has_no_model_to_score(experiment, buffers):
    run = experiment("fedavg", model="resnet8", rounds=1, **{"data.rows": 120, "method.buffers": buffers})
    run.run()
    assert (run.rows[-1]["server_accuracy"] is None) == (buffers == "private")


def test_adaptation_uses_the_learning_rate_of_the_last_round(experiment):
    """With a learning rate near 0 in the last round, fine-tuned models equal the server's."""
    run = experiment("fedavg_ft", rounds=3, **{"method.lr_decay": 1e-9, "data.rows": 120})
    run.run()
    tuned = dict(run.personal_model(0).nets["model"].named_parameters())
    for name, p in run.server["weights"]["params"].items():
        torch.testing.assert_close(tuned[name.removeprefix("model.")], p, rtol=1e-6, atol=1e-9)
