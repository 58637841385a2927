"""Batches and phases of a client's local update."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedloom import optim
from fedloom.errors import DataError, MethodError
from fedloom.inputs import InputSpec
from fedloom.losses import cross_entropy
from fedloom.method import Batch, Client, Interleave, Method, Sweep, Task, Train, Turn
from fedloom.nets import read_weights
from fedloom.objectives import Classification
from fedloom.rng import Stream
from fedloom.training.batches import GATHERED_BYTES, Plan, Rows, laid_out
from fedloom.training.context import ClientContext
from fedloom.training.gradients import Gradients
from fedloom.training.sweeps import predict
from fedloom.training.turn import client_update, run_phases

sizes = st.integers(1, 40)


@given(sizes, st.integers(1, 12), st.integers(1, 3))
def test_every_example_occurs_once_per_epoch(n, batch_size, epochs):
    batches = [b.tolist() for b in Plan(batch_size).batches(n, epochs, None, Stream(0))]
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == sorted(list(range(n)) * epochs)
    assert sorted(rows[:n]) == list(range(n))
    assert max(map(len, batches)) <= batch_size + 1
    if min(n, batch_size) > 1:
        assert min(map(len, batches)) > 1  # BatchNorm cannot train on one example


@given(sizes, st.integers(1, 12))
def test_drop_last_keeps_whole_batches_only(n, batch_size):
    batches = [b.tolist() for b in Plan(batch_size, drop_last=True).batches(n, 1, None, Stream(0))]
    size = min(n, batch_size)
    assert [len(b) for b in batches] == [size] * (n // size)
    assert len({row for b in batches for row in b}) == size * (n // size)


def test_a_last_single_example_joins_the_previous_batch():
    assert [len(b) for b in Plan(4).batches(9, 1, None, Stream(0))] == [4, 5]
    assert [len(b) for b in Plan(4).batches(10, 1, None, Stream(0))] == [4, 4, 2]
    assert [len(b) for b in Plan(4).batches(1, 2, None, Stream(0))] == [1, 1]


@given(sizes, st.integers(1, 12), st.integers(1, 30), st.booleans())
def test_steps_are_counted_over_epochs(n, batch_size, steps, drop_last):
    assert len(list(Plan(batch_size, drop_last).batches(n, 1, steps, Stream(0)))) == steps


def test_every_epoch_is_shuffled_afresh():
    first, second = Plan(20).batches(20, 2, None, Stream(0))
    assert first.tolist() != second.tolist()
    assert first.tolist() == next(iter(Plan(20).batches(20, 2, None, Stream(0)))).tolist()


# local updates

N_ROWS, TASK = (
    11,
    Task(
        n_clients=1, max_cohort=1, objective=Classification.numbered(2), spec=InputSpec.plain((3,)), width=3, rounds=5
    ),
)


def net(*layers: nn.Module) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"model": nn.Sequential(*(layers or (nn.Linear(3, 2),))), "other": nn.Linear(3, 2)}


def rows(n: int = N_ROWS) -> Rows:
    return Rows(Stream(0).normal((n, 3)), Stream(1).integers(2, (n,)))


CONTEXT = ClientContext(rows=rows(), plan=Plan(4), task=TASK, rng=Stream(0))


def work(*phases, modules=None, memory=None, opts=None, n=N_ROWS, turn=None, plan=None, down=None):
    modules = modules or net()
    client = Client(read_weights(modules), memory or {}, opts or {})
    context = ClientContext(rows=rows(n), plan=plan or Plan(4), task=TASK, rng=Stream(3))
    return client, run_phases(phases, Gradients(modules), client, down or {}, context, turn=turn or Turn(0, 4, n))


def loss(nets, batch, down, memory):
    return cross_entropy(nets.model(batch.x), batch.y)


SGD = optim.sgd(0.1)


def test_a_train_changes_what_it_trains_and_nothing_else():
    before, (after, steps, logs) = work(Train("fit", loss, ("model",), SGD, epochs=2))
    changed = {n for n, p in after.weights["params"].items() if not torch.equal(p, before.weights["params"][n])}
    assert changed == {"model.0.weight", "model.0.bias"}
    assert steps == {"fit": 6}
    assert set(logs) == {"fit.loss"}
    assert before.weights["params"]["model.0.weight"].equal(read_weights(net())["params"]["model.0.weight"])


def test_the_log_is_the_mean_over_steps():
    seen = []

    def logged(nets, batch, down, memory):
        seen.append(float(len(batch.y)))
        return loss(nets, batch, down, memory), {"rows": torch.tensor(seen[-1])}

    _, (_, _, logs) = work(Train("fit", logged, ("model",), SGD))
    assert seen == [4, 4, 3]
    assert logs["fit.rows"] == pytest.approx(11 / 3)


def test_a_phase_can_be_switched_off_and_counted_in_steps():
    phases = (
        Train("never", loss, ("model",), SGD, when=lambda turn: turn.number > 0),
        Train("fit", loss, ("model",), SGD, steps=7),
    )
    _, (_, steps, _) = work(*phases)
    assert steps == {"fit": 7}
    _, (_, steps, _) = work(*phases, turn=Turn(1, 4, N_ROWS))
    assert steps == {"never": 3, "fit": 7}


def test_members_of_an_interleave_see_the_same_batches_in_turn():
    seen = []

    def watched(name):
        def inner(nets, batch, down, memory):
            seen.append((name, batch.x.sum().item(), nets.model(batch.x)[0, 0].item()))
            return loss(nets, batch, down, memory)

        return inner

    members = (Train("a", watched("a"), ("model",), SGD, epochs=9), Train("b", watched("b"), ("model",), SGD))
    _, (_, steps, _) = work(Interleave("both", members, epochs=2))
    assert steps == {"a": 6, "b": 6}
    assert [name for name, _, _ in seen] == ["a", "b"] * 6
    assert all(a[1] == b[1] and a[2] != b[2] for a, b in zip(seen[::2], seen[1::2], strict=True))


def test_what_is_computed_once_has_a_known_gradient():
    """Compute two steps by hand: the first member fits b to the values s = w x; the second updates w by d/dw (s b)^2 with the new b."""
    modules = net(nn.Linear(1, 1, bias=False))
    modules["other"] = nn.Linear(1, 1, bias=False)
    nn.init.constant_(modules["model"][0].weight, 2.0)
    nn.init.constant_(modules["other"].weight, 3.0)
    calls = []

    def once(nets, batch, down, memory):
        calls.append(batch.draws)
        return {"s": nets.model(torch.ones(1, 1)), "half": torch.tensor(0.5)}

    def fit(nets, batch, down, memory):
        assert not batch.precomputed["s"].requires_grad
        return batch.precomputed["half"] * (nets.other(torch.ones(1, 1)) - batch.precomputed["s"]).square().sum()

    def use(nets, batch, down, memory):
        assert batch.precomputed["s"].requires_grad
        assert not batch.precomputed["half"].requires_grad
        return nets.frozen.other(batch.precomputed["s"]).square().sum()

    members = (Train("fit", fit, ("other",), SGD), Train("use", use, ("model",), SGD))
    _, (after, steps, _) = work(Interleave("both", members, steps=2, precompute=once), modules=modules)
    w, b, rate = 2.0, 3.0, 0.1
    for _ in range(2):
        s = w
        b -= rate * (b - s)
        w -= rate * 2 * s * b * b
    assert after.weights["params"]["other.weight"].item() == pytest.approx(b, rel=1e-5)
    assert after.weights["params"]["model.0.weight"].item() == pytest.approx(w, rel=1e-5)
    assert steps == {"fit": 2, "use": 2}
    assert calls == [{}, {}]


def test_only_the_last_member_may_train_what_is_computed_once():
    def once(nets, batch, down, memory):
        return {"s": nets.model(batch.x)}

    head = Train("head", loss, ("model.0.bias",), SGD)
    both = Interleave("both", (head, Train("fit", loss, ("model",), SGD)), precompute=once)
    with pytest.raises(MethodError, match=r"phase 'both': only its last member may train 'model\.0\.bias', because"):
        work(both)
    off = replace(both, members=(replace(head, when=lambda _: False), both.members[1]))
    work(off)
    work(replace(both, members=tuple(replace(m, when=lambda _: False) for m in both.members)))


def test_only_the_last_member_may_train_parameters_that_once_depends_on():
    modules = net(nn.Linear(1, 1, bias=False))
    modules["other"] = nn.Linear(1, 1, bias=False)

    def once(nets, batch, down, memory):
        return {"s": nets.other(nets.model(torch.ones(1, 1)))}

    def use(nets, batch, down, memory):
        return batch.precomputed["s"].square().sum()

    def fit(nets, batch, down, memory):
        return nets.other(torch.ones(1, 1)).square().sum()

    members = (Train("fit", fit, ("other",), SGD), Train("use", use, ("model",), SGD))
    with pytest.raises(MethodError, match="only its last member may train the parameters that `precompute` uses"):
        work(Interleave("both", members, steps=2, precompute=once), modules=modules)


def noise(batch, task, rng):
    return {"noise": rng.normal(())}


def test_draws_are_fresh_for_every_batch_and_member():
    seen = {"a": [], "b": []}

    def watched(name):
        def inner(nets, batch, down, memory):
            seen[name].append(batch.draws["noise"].item())
            return loss(nets, batch, down, memory)

        return Train(name, inner, ("model",), SGD, draw=noise)

    work(Interleave("both", (watched("a"), watched("b"))))
    assert len({*seen["a"], *seen["b"]}) == 6


def test_a_kept_state_lasts_and_another_starts_afresh():
    momentum = optim.sgd(0.1, 0.9)
    train = Train("fit", loss, ("model",), momentum, keep_state=True)
    opts = {"fit": momentum.init({k: v for k, v in read_weights(net())["params"].items() if k.startswith("model")})}
    _, (after, _, _) = work(train, opts=opts)
    assert after.opts["fit"]["velocity"]["model.0.bias"].abs().sum() > 0
    assert opts["fit"]["velocity"]["model.0.bias"].abs().sum() == 0
    _, (fresh, _, _) = work(Train("fit", loss, ("model",), momentum))
    assert fresh.opts == {}


def test_a_sweep_visits_every_example_once_in_evaluation_mode():
    def count(nets, batch, acc, down, memory):
        assert not torch.is_grad_enabled()
        right = batch.y[:, None] == torch.arange(2)
        nets.model(batch.x)
        return {"count": acc["count"] + right.sum(0), "sum": acc["sum"] + right.to(batch.x.dtype).T @ batch.x}

    memory = {"means": {"count": torch.full((2,), 99), "sum": torch.full((2, 3), 9.0)}}
    modules = net(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before, (after, _, _) = work(Sweep("means", count), memory=memory, n=1200, modules=modules)
    every = rows(1200)
    assert after.memory["means"]["count"].tolist() == torch.bincount(every.y).tolist()
    torch.testing.assert_close(
        after.memory["means"]["sum"], torch.stack([every.x[every.y == c].sum(0) for c in (0, 1)])
    )
    assert after.weights["buffers"]["model.1.num_batches_tracked"].item() == 0
    assert before.memory["means"]["count"].tolist() == [99, 99]
    assert not after.memory["means"]["sum"].is_inference()


def test_a_sweep_without_memory_is_an_error():
    with pytest.raises(MethodError, match="sweep 'means' needs memory"):
        work(Sweep("means", loss))


BATCH_NORM = (nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_running_statistics_move_in_training_and_stay_the_clients_own():
    modules = net(*BATCH_NORM)
    before, (after, _, _) = work(Train("fit", loss, ("model",), SGD), modules=modules)
    assert after.weights["buffers"]["model.1.num_batches_tracked"].item() == 3
    assert before.weights["buffers"]["model.1.num_batches_tracked"].item() == 0
    assert modules["model"][1].num_batches_tracked.item() == 0
    _, (frozen, _, _) = work(Train("fit", loss, ("model",), SGD, train_mode=()), modules=net(*BATCH_NORM))
    assert frozen.weights["buffers"]["model.1.num_batches_tracked"].item() == 0


def test_a_single_example_cannot_train_a_batch_norm():
    with pytest.raises(DataError, match="BatchNorm cannot train on a batch of one example"):
        work(
            Train("fit", loss, ("model",), SGD),
            modules={"model": net(*copy.deepcopy(BATCH_NORM))["model"].train()},
            n=1,
        )
    work(Train("fit", loss, ("model",), SGD), n=1)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.ones(2), r"0-d tensor, not .*\(2,\)"),
        (1.0, "0-d tensor, not float"),
    ],
)
def test_a_loss_that_is_not_a_scalar_is_an_error(bad, words):
    with pytest.raises(MethodError, match=words):
        work(Train("fit", lambda *_: bad, ("model",), SGD))


def test_a_train_without_parameters_is_an_error():
    with pytest.raises(MethodError, match=r"trains \('model',\), which has no parameters"):
        work(Train("fit", loss, ("model",), SGD), modules=net(nn.BatchNorm1d(3, affine=False)))


def test_errors_say_where_they_happened():
    def fails(nets, batch, down, memory):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError) as caught:
        work(Train("fit", loss, ("model",), SGD), Train("break", fails, ("model",), SGD))
    assert "in phase 'break', after 3 steps in earlier phases; examples of shape (11, 3)" in caught.value.__notes__


def test_a_local_update_reports_steps_and_keeps_its_inputs():
    modules = net()
    client = Client(read_weights(modules), {}, {})
    down = {"weights": {"params": {n: p + 1 for n, p in client.weights["params"].items()}, "buffers": {}}}
    done = client_update(Method(), Gradients(modules), client, down, CONTEXT, number=2)
    assert done.turn == Turn(2, 4, N_ROWS, {"train": 3})
    assert client.weights["params"]["model.0.bias"].equal(read_weights(net())["params"]["model.0.bias"])
    assert set(done.uplink["weights"]["params"]) == {"model.0.weight", "model.0.bias"}


def test_a_downlink_that_lacks_a_tensor_is_an_error():
    modules = net()
    with pytest.raises(
        MethodError,
        match=r"the downlink must contain all shared weights, but lacks 1 of them, such as params/model\.0\.weight",
    ):
        client_update(
            Method(),
            Gradients(modules),
            Client(read_weights(modules), {}, {}),
            {"weights": {"params": {"model.0.bias": torch.zeros(2)}, "buffers": {}}},
            CONTEXT,
            number=0,
        )


def test_prediction_does_not_depend_on_the_batch():
    modules = net(*BATCH_NORM)
    client, x = Client(read_weights(modules), {}, {}), rows().x

    def logits(nets, part, down, memory):
        return nets.model(part)

    whole = predict(logits, Gradients(modules), client, x, {})
    assert whole.shape == (N_ROWS, 2)
    torch.testing.assert_close(predict(logits, Gradients(modules), client, x, {}, batch=3), whole)


def test_recalls_count_examples_by_class():
    logits = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [float("nan"), 0.0]])
    score = Classification.numbered(3).scores(logits, torch.tensor([0, 1, 0, 0]), [4])[0]
    assert score["right"].tolist() == [1, 1, 0]
    assert score["rows"].tolist() == [3, 1, 0]


def test_examples_of_several_clients_are_counted_by_client():
    logits, labels, sizes = Stream(0).normal((9, 3)), Stream(1).integers(3, (9,)), [4, 0, 5]
    logits[2, 1] = float("inf")
    task = Classification.numbered(3)
    together = task.scores(logits, labels, sizes)
    apart = zip(logits.split(sizes), labels.split(sizes), strict=True)
    for one, (mine, own) in zip(together, apart, strict=True):
        assert one == task.scores(mine, own, [len(own)])[0]
        assert one["rows"].tolist() == torch.bincount(own, minlength=3).tolist()


def test_batches_are_augmented_with_a_stream_of_their_own():
    twice = Rows(*rows()[:2], augment=lambda x, rng: x + rng.normal((1,)))
    stream = Stream(4)
    first, second = (twice.batch(torch.arange(3), stream) for _ in range(2))
    assert isinstance(first, Batch)
    assert not torch.equal(first.x, second.x)
    assert torch.equal(rows().batch(torch.arange(3), stream).x, rows().x[:3])


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_that_are_gathered_together_are_those_gathered_one_by_one(channels_last):
    x = laid_out({"x": torch.randn(60, 3, 8, 8)}, channels_last)["x"]
    cut = Rows(x, torch.arange(60))
    order = torch.randperm(60).split([7, 1, 30, 22])
    room = GATHERED_BYTES // x[:1].nbytes
    assert len(order[0]) < room  # some are gathered together
    stream = Stream(5)
    found = list(cut.batches(order, stream))
    assert [len(batch.y) for batch in found] == [7, 1, 30, 22]
    for batch, index in zip(found, order, strict=True):
        alone = cut.batch(index, stream)
        assert torch.equal(batch.x, alone.x)
        assert batch.x.stride() == alone.x.stride()
        assert batch.y.tolist() == index.tolist()
