"""`fedloom.data.with_factor`: the ground truth of client factors, and scores on examples with another value of a factor."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fedloom
from fedloom.data import load, with_factor
from fedloom.data.factors import hues
from fedloom.errors import DataError

DIGITS = load("digits")


@pytest.fixture(scope="module")
def pools():
    """Return the digits with each factor, for three clients."""
    return {kind: with_factor(DIGITS, kind, 3) for kind in ("code", "tint", "nuisance", "rotation")}


def colours_of(images):
    """Return the number of the colour of each background: the nearest of three or ten hues, measured in a corner without ink."""
    corner = images[:, :, 0, 0].double().numpy() / 255
    return lambda n: np.abs(corner[:, None] - hues(n)).sum(2).argmin(1)


@pytest.mark.parametrize("kind", ["code", "tint", "nuisance", "rotation"])
def test_clients_share_the_training_examples_equally_and_nothing_is_random_twice(pools, kind):
    pool = pools[kind]
    owners = pool.columns["client"]
    assert np.bincount(np.unique(owners[: pool.n_train], return_inverse=True)[1]).tolist() == [468, 467, 467]
    assert set(owners[pool.n_train :]) == {""}
    assert pool.n_rows - pool.n_train == round(0.22 * 1797)
    assert torch.equal(with_factor(DIGITS, kind, 3).images, pool.images)


@pytest.mark.parametrize(("kind", "n"), [("code", 10), ("tint", 3), ("nuisance", 10)])
def test_the_column_has_the_colour_that_is_seen(pools, kind, n):
    pool = pools[kind]
    values = pool.columns[pool.factor]
    assert (colours_of(pool.images)(n) == values).mean() > 0.97  # a few digits have ink in the corner
    assert (colours_of(pool.changed)(n) == values).mean() < 0.03


def test_a_code_differs_between_clients_and_holds_for_nine_in_ten(pools):
    pool = pools["code"]
    labels, colours = pool.labels.numpy(), pool.columns["colour"]
    codes = []
    for client in "012":
        mine = pool.columns["client"] == client
        usual = np.array([np.bincount(colours[mine & (labels == y)]).argmax() for y in range(10)])
        assert sorted(usual) == list(range(10))
        assert 0.86 < (colours[mine] == usual[labels[mine]]).mean() < 0.94
        codes.append(tuple(usual))
    assert len(set(codes)) == 3


@pytest.mark.parametrize("kind", ["tint", "rotation"])
def test_a_constant_factor_is_the_client(pools, kind):
    pool = pools[kind]
    trained = pool.columns["client"][: pool.n_train]
    assert (pool.columns[pool.factor][: pool.n_train] == trained.astype(int)).all()


def test_rotation_leaves_the_first_client_unchanged_and_turns_the_others(pools):
    pool, flat = pools["rotation"], {row.numpy().tobytes() for row in DIGITS.images}
    kept = np.array([row.numpy().tobytes() in flat for row in pool.images])
    assert (kept == (pool.columns["angle"] == 0)).all()


@pytest.mark.parametrize(
    ("pool", "kind", "n", "message"),
    [
        (load("coloured-digits"), "code", 3, "already has a client factor"),
        (load("diabetes"), "tint", 3, "needs images"),
        (replace(load("coloured-digits"), factor=""), "tint", 3, "colours greyscale images"),
        (DIGITS, "tint", 2000, "data.factor_clients=2000: must be from 2 to"),
    ],
)
def test_what_cannot_be_made_is_refused(pool, kind, n, message):
    with pytest.raises(DataError, match=message):
        with_factor(pool, kind, n)


class Corner(nn.Module):
    """A model that returns the colour of the corner, whatever the digit."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.hues = torch.tensor(hues(10)) * 2 - 1

    def forward(self, x):
        away = (x[:, :, 0, 0][:, None].to(self.hues) - self.hues).abs().sum(2)
        return -away.to(x.dtype) + self.unused


@pytest.mark.parametrize("engine", ["sequential", "vectorised", "processes"])
def test_a_model_that_reads_the_colour_fails_if_the_colour_changes(experiment, engine):
    # labels are colours here, so the model is right on own examples, and wrong on all examples with another colour
    pool = with_factor(DIGITS, "nuisance", 3)
    pool = replace(pool, targets=torch.tensor(pool.columns["colour"]))
    settings = {
        "partition": {"name": "natural", "merge": False, "test_fraction": 0.25},
        "clients": None,
        "rounds": 1,
        "model": "Corner",
    }
    run = experiment("fedavg", dataset=pool, module=Corner, engine=engine, **settings, **{"method.lr": 1e-9})
    run.run()
    assert run.rows[-1]["personal_accuracy"] > 0.97
    assert run.rows[-1]["changed_accuracy"] < 0.03
    assert run.client_rows[-1]["changed_accuracy"] < 0.05


def test_a_run_with_a_factor_divides_by_client(caplog, tmp_path):
    run = fedloom.run("local", model="mlp", rounds=1, progress=False, out=tmp_path / "run", **{"data.factor": "tint"})
    assert "partition=natural partition.merge=false: chosen" in caplog.text
    assert run.federation.n_clients == 4
    assert run.summary["changed_accuracy"]["final"] is not None
    with pytest.raises(fedloom.ConfigError, match=r"data.factor_clients=3: needs data.factor"):
        fedloom.run("local", **{"data.factor_clients": 3})


def test_mnist_can_be_coloured(shared_data):
    pool = with_factor(load("mnist", shared_data / "mnist", rows=60), "code", 2)
    assert (pool.n_train, pool.input_shape, pool.n_rows) == (60, (3, 28, 28), 10_060)
