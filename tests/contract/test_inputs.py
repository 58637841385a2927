"""Models for texts, sensor windows and tables, each with its kind of data, on every engine."""

import numpy as np
import pytest

from contract import assert_close, assert_same, left_by
from fedloom import ConfigError, from_arrays
from fedloom.rng import Stream

N, T, V, Y = 72, 10, 12, 3
MODELS = {
    "text_mean": {"dim": 4, "hidden": True},
    "text_cnn": {"dim": 4, "dropout": 0.0},
    "char_lstm": {"dim": 4, "hidden": 6},
    "text_transformer": {"dim": 8, "heads": 2, "depth": 1, "hidden": 8},
    "lm_lstm": {"dim": 4, "hidden": 6},
    "lm_transformer": {"dim": 8, "heads": 2, "depth": 1, "hidden": 8},
    "har_cnn": {},
    "table_mlp": {"hidden1": 8, "hidden2": 8},
}
WIDE = {"har_cnn": 8}


def ids():
    """Return texts of 1 to T tokens, padded with 0."""
    found = 1 + (Stream(1).uniform((N, T)).numpy() * (V - 1)).astype(np.int64)
    found[np.arange(T)[None, :] >= 1 + (np.arange(N) % T)[:, None]] = 0
    return found


def data(model):
    y = np.arange(N) % Y
    if model.startswith("lm_"):
        x = ids()
        following = np.roll(x, -1, axis=1)
        following[:, -1] = 0
        return from_arrays(
            x, np.where(following > 0, following, -100), name="texts", task="language", vocabulary=V, kind="token"
        )
    if model == "har_cnn":
        return from_arrays(Stream(0).normal((N, 2, 30)).numpy() + y[:, None, None], y, name="windows")
    if model == "table_mlp":
        x = {"numbers": Stream(0).normal((N, 2)).numpy(), "categories": np.stack([y, np.arange(N) % 5], 1)}
        return from_arrays(x, y, name="table", kind={"numbers": "number", "categories": "category"})
    x = ids()
    return from_arrays(x, np.where(x[:, 0] > 6, 2, y % 2), name="texts", vocabulary=V, kind="token")


@pytest.fixture
def run(experiment):
    def go(model, method="fedavg", **settings):
        chosen = {"data": "own", "partition": "iid", "clients": 3, **settings}
        table = {"name": model, **MODELS[model]}
        return experiment(method, dataset=data(model), **{"model": table, "width": WIDE.get(model), **chosen})

    return go


@pytest.mark.parametrize("model", MODELS)
def test_every_engine_gives_the_same_numbers(run, model, caplog):
    reference = left_by(run(model, "fedper"))
    for engine in ("vectorised", "processes", "bytes+sequential"):
        ended = left_by(run(model, "fedper", engine=engine))
        (assert_close if engine == "vectorised" else assert_same)(ended, reference)
    slow = [line for line in caplog.messages if "one after another" in line]
    assert bool(slow) == ("lstm" in model)


def test_data_that_no_built_in_model_takes_are_refused(experiment):
    x = {"text": ids(), "age": Stream(0).normal((N, 1)).numpy()}
    pool = from_arrays(x, np.arange(N) % Y, name="both", kind={"text": "token"}, vocabulary=V)
    for model, kind in (("mlp", "number"), ("table_mlp", "category")):
        message = (
            rf"model={model}: .*text: token .*age: number .* kind={{'text': '{kind}'}}\); use a model of your own "
            "whose forward takes text, age$"
        )
        with pytest.raises(ConfigError, match=message):
            experiment(dataset=pool, model={"name": model}, data="own", partition="iid", clients=3)


@pytest.mark.parametrize(
    ("model", "on", "words"),
    [
        (
            "mlp",
            "text_mean",
            "model=mlp: needs number inputs or picture inputs, but .* token .*; use text_mean, text_cnn",
        ),
        ("resnet8", "text_mean", "model=resnet8: needs picture inputs, but .*use text_mean"),
        ("text_mean", "har_cnn", "model=text_mean: needs token inputs, but .*use mlp, logistic, har_cnn"),
        ("mlp", "table_mlp", "model=mlp: .*use table_mlp, or a model of your own"),
        ("char_lstm", "lm_lstm", "per example, but the task language .*use lm_lstm, lm_transformer, or a model"),
        ("lm_lstm", "char_lstm", "per position, but the task classification .*use text_mean"),
    ],
)
def test_a_model_for_other_data_is_refused_with_those_that_fit(experiment, model, on, words):
    with pytest.raises(ConfigError, match=words) as caught:
        experiment(dataset=data(on), model={"name": model}, data="own", partition="iid", clients=3)
    assert "\n" not in str(caught.value)
