"""Clients on a device, and messages and the server on the host. The numbers are the same as without a device, whatever fits in its memory.

`elsewhere` simulates a device. Tests marked `gpu` need a GPU: `pytest -m gpu`.
"""

import logging

import pytest
import torch
from elsewhere import ELSEWHERE, Elsewhere

from contract import TOYS, Left, assert_close, assert_same, left_by
from fedloom import accelerator, tree
from fedloom.accelerator import HOST, DeviceBudget
from fedloom.engines import vectorised
from fedloom.experiment.loop import Experiment
from fedloom.methods.registry import METHODS
from fedloom.training.fast import step_cache
from small import brief, interrupted_after

SETTINGS = {"clients": 3, "cohort": 2, "rounds": 2, "batch_size": 32, "data.rows": 120}
ROOMY, TIGHT = 1 << 40, 0
CASES = [(method, "mlp") for method in [*METHODS, *TOYS]]
LONG = pytest.mark.slow  # every operation is run in Python: a generator's convolutions take half a minute


@pytest.fixture
def elsewhere(monkeypatch):
    """Provide a simulated device with a memory budget for data and clients."""

    def arrive(budget):
        monkeypatch.setattr(accelerator, "place", lambda *_: DeviceBudget(ELSEWHERE, budget))
        return Elsewhere()

    return arrive


def make(experiment, method, model, engine, **settings):
    what = TOYS[method]() if method in TOYS else method
    return experiment(what, **{**SETTINGS, "engine": engine, "model": model, **brief(method), **settings})


@pytest.mark.parametrize(
    ("method", "model", "engine", "budget"),
    [
        *(pytest.param(*case, "vectorised", ROOMY, marks=LONG if case[0] == "fedvtc" else ()) for case in CASES),
        *((method, "mlp", "sequential", TIGHT) for method in ("fedavg", "scaffold", "fedmr", "fedproto", *TOYS)),
        pytest.param("fedvtc", "mlp", "sequential", TIGHT, marks=LONG),
        pytest.param("fedrir", "resnet8", "sequential", TIGHT, marks=LONG),
        pytest.param("fedrir", "resnet8", "vectorised", ROOMY, marks=LONG),
    ],
)
def test_a_device_changes_no_number(experiment, elsewhere, method, model, engine, budget):
    settings = {"rounds": 1} if method in METHODS and model == "mlp" else {}
    here = left_by(make(experiment, method, model, engine, **settings))
    with elsewhere(budget) as device:
        there = left_by(make(experiment, method, model, engine, **settings))
    assert device.copies > 0
    # torch steps differ if lanes of such tensors are vectorised, and without channels last
    exactly = engine == "sequential" and method not in ("fedrir", "fedvtc")
    (assert_same if exactly else assert_close)(there, here)


@pytest.mark.parametrize("augment", ["flip", "crop-flip", "resized-crop-flip"])
def test_augmented_batches_are_the_same_too(experiment, elsewhere, augment):
    settings = {"data.augment": augment, "rounds": 1}
    here = left_by(make(experiment, "fedavg", "mlp", "sequential", **settings))
    for engine in ("sequential", "vectorised"):
        with elsewhere(ROOMY):
            assert_close(left_by(make(experiment, "fedavg", "mlp", engine, **settings)), here)


def test_examples_and_clients_stay_on_the_device_within_its_budget(experiment, elsewhere, float64):
    def run_with(budget):
        with elsewhere(budget) as device:
            run = make(experiment, "fedper", "mlp", "sequential", cohort=3, rounds=3)
            left_by(run)
            copies = device.copies
            asked = [tree.leaves(run.engine.client(i)._asdict()) for i in range(3)]
        assert all(leaf.device == HOST for leaves in asked for leaf in leaves)
        kept = [tree.leaves(run.engine.store.get(i)._asdict()) for i in range(3)]
        sizes = run.data.n_bytes, tree.n_bytes(run.engine.store.get(0)._asdict())
        return copies, [all(leaf.device == ELSEWHERE for leaf in leaves) for leaves in kept], sizes

    few, kept, (rows, client) = run_with(ROOMY)
    assert kept == [True] * 3
    more, kept, _ = run_with(rows + 2 * client)
    assert sorted(kept) == [False, True, True]
    most, kept, _ = run_with(client - 1)
    assert kept == [False] * 3
    assert few < more < most


@pytest.mark.parametrize("method", ["fedrir", "scaffold"])
def test_a_run_is_resumed_on_another_device(experiment, elsewhere, monkeypatch, method):
    settings = {"rounds": 2, "checkpoint_every": 1}
    whole = left_by(make(experiment, method, "mlp", "sequential", **settings))
    with elsewhere(ROOMY):
        begun = make(experiment, method, "mlp", "sequential", **settings)
        path = interrupted_after(begun, 1)
    monkeypatch.undo()
    resumed = Experiment.resume(path)
    assert resumed.place.device == HOST
    assert_close(left_by(resumed), whole)


def test_newcomers_join_on_the_device(experiment, elsewhere):
    settings = {"clients": 4, "join.clients": 2, "join.turns": 2, "rounds": 1}
    here = left_by(make(experiment, "fedper", "mlp", "sequential", **settings))
    with elsewhere(ROOMY):
        there = left_by(make(experiment, "fedper", "mlp", "sequential", **settings))
    assert_same(there, here)


@pytest.mark.parametrize("fits", [4, 2, 1])
def test_lanes_that_do_not_fit_are_halved(experiment, monkeypatch, caplog, fits):
    def client_updates(method, gradients, clients, *rest, number):
        if len(clients) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        tried.append(len(clients))
        return mapped(method, gradients, clients, *rest, number=number)

    settings = {"clients": 5, "cohort": 5}
    plain = left_by(make(experiment, "fedper", "mlp", "vectorised", **settings))
    mapped, tried = vectorised.client_updates, []
    monkeypatch.setattr(vectorised, "client_updates", client_updates)
    with caplog.at_level(logging.WARNING):
        assert_close(left_by(make(experiment, "fedper", "mlp", "vectorised", **settings)), plain)
    assert set(tried) == ({2} if fits > 1 else set())
    assert (
        caplog.messages[0]
        == "5 clients side by side do not fit in memory; half as many are trained side by side from now on"
    )
    assert len(caplog.messages) == (1 if fits > 1 else 2)


# on a GPU

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
]


def on_gpu(experiment, method, model, engine, **settings) -> Left:
    return left_by(make(experiment, method, model, engine, **{"engine.device": "cuda", **settings}))


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
@pytest.mark.parametrize(
    ("method", "model"), [*CASES, *((m, "resnet8") for m in ("fedavg", "fedmr", "fedrir", "fedvtc"))]
)
class TestGpu:
    """The numbers of the CPU, up to rounding in float64."""

    pytestmark = GPU

    @pytest.mark.parametrize("budget", [None, 0])
    def test_a_gpu_gives_the_numbers_of_the_cpu(self, experiment, method, model, engine, budget):
        settings = {} if budget is None else {"engine.device_bytes": budget}
        here = left_by(make(experiment, method, model, "sequential"))
        assert_close(on_gpu(experiment, method, model, engine, **settings), here)

    def test_the_same_seed_gives_the_same_bits(self, experiment, method, model, engine):
        one, other = (on_gpu(experiment, method, model, engine, precision="fp32") for _ in range(2))
        assert_same(one, other)

    def test_graphs_give_the_bits_of_written_steps(self, experiment, method, model, engine, monkeypatch):
        long = {"rounds": 3, "batch_size": 8, "cohort": 3}
        monkeypatch.setattr(step_cache, "TRIALS", 1 << 30)
        written = on_gpu(experiment, method, model, engine, **long)
        monkeypatch.setattr(step_cache, "TRIALS", 3)
        assert_same(on_gpu(experiment, method, model, engine, **long), written)


class TestGpuArithmetic:
    """Properties that only a GPU can show."""

    pytestmark = GPU

    def test_float32_is_float32_unless_tf32_is_asked_for(self):
        device, draw = accelerator.find("cuda"), torch.Generator().manual_seed(0)
        a, b = torch.randn(2, 512, 512, generator=draw)
        x, w = torch.randn(4, 64, 16, 16, generator=draw), torch.randn(64, 64, 3, 3, generator=draw)
        for tf32 in (False, True):
            with accelerator.exact(device, tf32):
                found = [a.to(device) @ b.to(device), torch.conv2d(x.to(device), w.to(device))]
            exact = [a.double() @ b.double(), torch.conv2d(x.double(), w.double())]
            errors = [float((f.cpu() - e).abs().max() / e.abs().max()) for f, e in zip(found, exact, strict=True)]
            assert all(error < 1e-5 for error in errors) is not tf32, errors

    def test_short_steps_become_graphs(self, experiment, monkeypatch, caplog):
        made = []
        judge = step_cache.faster_replay
        monkeypatch.setattr(step_cache, "faster_replay", lambda *a: made.append(judge(*a)) or made[-1])
        settings = {"rounds": 3, "batch_size": 4, "data.rows": 400, "precision": "fp32"}
        on_gpu(experiment, "fedavg", "fedavg_cnn", "sequential", **settings)
        assert any(made), caplog.text

    def test_the_environment_names_the_gpu(self, experiment):
        run = make(experiment, "fedavg", "mlp", "sequential", **{"engine.device": "cuda:0"})
        assert torch.cuda.get_device_name(0) in (run.folder.path / "environment.json").read_text()
