"""Convolutions of lanes: both forms equal torch's own convolution, and its gradients."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from fedloom.training.fast.convolutions import Convolutions

CASES = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    {"kernel": (1, 1)},
    {"kernel": (5, 3), "bias": False},
]


def lanes(kernel=(3, 3), bias=True, n_lanes=4, groups=1, **geometry):
    """Return a loss of weights and inputs, and the weights and inputs of several lanes."""
    draw = torch.Generator().manual_seed(0)
    x, weight, offset = (
        torch.randn(n_lanes, *shape, generator=draw)
        for shape in ((5, 6, 9, 8), (7, 6 // groups, *kernel) if groups == 1 else (6, 6 // groups, *kernel), (7,))
    )

    def loss(weight, x, offset):
        return F.conv2d(x, weight, offset if bias else None, groups=groups, **geometry).sin().sum()

    return loss, (weight, x, offset)


@pytest.mark.parametrize("form", ["columns", "tuned"])
@pytest.mark.parametrize("case", CASES)
def test_both_forms_are_convolutions(float64, case, form):
    loss, inputs = lanes(**case)
    work = vmap(grad(loss, argnums=(0, 1, 2) if case.get("bias", True) else (0, 1)))
    expected, book = work(*inputs), Convolutions(form)
    for _ in range(2):  # before and after the timing
        with book.of(4):
            found = work(*inputs)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert len(book.columns_faster) == (form == "tuned")


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_form_is_taken_from_then_on(monkeypatch, caplog, faster):
    loss, inputs = lanes()
    book, calls = Convolutions("tuned"), []
    seconds = iter([1.0, 0.5] if faster else [0.5, 1.0])
    monkeypatch.setattr("fedloom.training.fast.convolutions.shortest_s", lambda *_: next(seconds))
    unfold = F.unfold
    monkeypatch.setattr(F, "unfold", lambda *a: (calls.append(1), unfold(*a))[1])
    with caplog.at_level(logging.INFO), book.of(4):
        vmap(loss)(*inputs)
    assert not calls  # a new layer first runs in vmap's form
    assert list(book.columns_faster.values()) == [faster]
    assert "4 lanes of 5 examples (6, 9, 8), kernels (7, 6, 3, 3): grouped" in caplog.text
    with book.of(4):
        vmap(loss)(*inputs)
    assert bool(calls) is faster


def test_other_convolutions_are_left_alone():
    book = Convolutions("columns")
    loss, (weight, x, _) = lanes(bias=False, groups=6)
    with book.of(4):
        found = vmap(loss, in_dims=(0, 0, None))(weight, x, None)
        picture = F.conv2d(x[0, 0], weight[0], groups=6)  # without a batch dimension
    torch.testing.assert_close(found, torch.stack([loss(w, a, None) for w, a in zip(weight, x, strict=True)]))
    assert picture.shape == (6, 7, 6)
    assert not book.columns_faster


@pytest.mark.parametrize("form", ["columns", "tuned"])
@pytest.mark.parametrize("model", ["fedmr_cnn", "resnet8"])
def test_a_run_with_matrix_products_is_the_same_run(experiment, model, form):
    settings = {"clients": 3, "cohort": 3, "data.rows": 60, "rounds": 1, "batch_size": 8, "model": model}
    one = experiment("fedavg", engine="vectorised", **settings)
    other = experiment("fedavg", engine="vectorised", **settings, **{"engine.convolutions": form})
    for run in (one, other):
        run.run()
    for p, q in zip(*(run.server["weights"]["params"].values() for run in (one, other)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)
