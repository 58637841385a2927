"""Models exported to files for devices: the same numbers as torch, for every method."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fedloom.config.settings import make_settings
from fedloom.data import from_arrays
from fedloom.data.preprocess import Preprocess
from fedloom.experiment.loop import Experiment, GivenObjects
from fedloom.method import predict_model
from fedloom.methods.registry import METHODS
from fedloom.tools.export import ExportError, described, export_client, largest_difference, write
from small import brief, changed

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def finished(tmp_path, method, model="fedavg_cnn", **settings):
    values = {
        "method": {"name": method},
        "model": {"name": model},
        "data": {"name": "digits", "rows": 120},
        "partition": {"name": "iid"},
        "clients": 2,
        "rounds": 1,
        "engine": {"name": "sequential"},
        "out": tmp_path / "run",
    }
    Experiment(make_settings(changed(values, **settings))).run()
    return Experiment.reopen(tmp_path / "run")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("fedloom.tools.export.MOST_S", 0.0)


def logits_of(file, x):
    return torch.from_numpy(onnxruntime.InferenceSession(str(file)).run(None, {"input": x.numpy()})[0])


OWN = [name for name, method in METHODS.items() if method().predictors()["personal"] is not predict_model]
"""Methods that do not predict with `model` alone."""
QUICK = ("fedproto", "fedrir", "fedrod")
"""Nearest prototypes, several nets and a sum of two heads. The others, which take seconds each, run with `pytest -m slow`."""
MODELS = {"fedbn": "fedrir_cnn", "fedvtc": "fedavg_cnn"}


@pytest.mark.parametrize(
    "method",
    ["fedavg", "fedbn", *(pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in OWN)],
)
def test_the_file_computes_what_torch_computes(method, tmp_path):
    run = finished(tmp_path, method, MODELS.get(method, "mlp"), width=16, **brief(method))
    file, x, model = tmp_path / "model.onnx", run.data.test(1)[0], run.personal_model(1)
    write(run, 1, file)
    assert torch.equal(logits_of(file, x[:1]).argmax(1), model(x[:1]).argmax(1))  # any number of examples
    assert largest_difference(model, x, logits_of(file, x), method) < 1e-3
    assert torch.equal(logits_of(file, x).argmax(1), model(x).argmax(1))


def test_a_model_of_several_inputs_is_exported_with_their_names(tmp_path):
    draws = np.random.default_rng(0)
    x = {"numbers": draws.normal(size=(60, 2)).astype("float32"), "categories": draws.integers(0, 4, (60, 3))}
    table = from_arrays(x, draws.normal(size=60), name="table", task="regression", kind={"categories": "category"})
    names = {"model": "table_mlp", "data": "table", "partition": "iid", "engine": "sequential"}
    values = {key: {"name": name} for key, name in names.items()} | {"clients": 2, "rounds": 1, "out": tmp_path / "run"}
    run = Experiment(make_settings(values), GivenObjects(dataset=table))
    run.run()
    file = tmp_path / "client-0.onnx"
    told = export_client(run, 0, file)  # compares outputs
    assert (told.metric, told.rows) == ("rmse", run.data.n_test(0))
    session = onnxruntime.InferenceSession(str(file))
    assert [given.name for given in session.get_inputs()] == ["numbers", "categories"]


def test_the_output_of_a_language_model_has_positions(tmp_path):
    ids = np.random.default_rng(0).integers(1, 9, (40, 5))
    texts = from_arrays(ids[:, :-1], ids[:, 1:], name="texts", task="language")
    names = {"model": "lm_lstm", "data": "texts", "partition": "iid", "engine": "sequential"}
    values = {key: {"name": name} for key, name in names.items()} | {"clients": 2, "rounds": 1, "out": tmp_path / "run"}
    run = Experiment(make_settings(values), GivenObjects(dataset=texts))
    assert described(run, 0)["output"] == "float32 (batch, positions, 9) logits of the next token, at every position"


def test_an_export_reports_its_results(tmp_path):
    run = finished(tmp_path, "fedproto", "mlp")
    file = tmp_path / "client-1.onnx"
    told = export_client(run, 1, file)
    assert told.rows == told.same_answers == run.data.n_test(1)
    assert told.value == pytest.approx(next(r["personal_accuracy"] for r in run.client_rows if r["client"] == 1))
    assert 0 < told.model_bytes < told.peak_bytes
    assert told.file_bytes == file.stat().st_size > 4 * told.parameters
    assert min(told.torch_seconds, told.onnx_seconds, told.torch_batch_seconds, told.onnx_batch_seconds) > 0


def test_only_the_nets_that_predict_go_into_the_file(tmp_path):
    from safetensors.torch import load_file

    run = finished(tmp_path, "fedrir")
    write(run, 0, tmp_path / "model.onnx")
    weights = load_file(tmp_path / "model.safetensors")
    assert {name.split(".")[1] for name in weights} == {"gfe", "csfe", "head"}
    own = run.personal_model(0).state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in weights.items())


def test_the_metadata_turn_a_picture_into_an_input(tmp_path):
    import onnxruntime

    run = finished(tmp_path, "fedproto", "mlp", data={"name": "digits", "rows": 120, "normalise": "standard"})
    write(run, 0, tmp_path / "model.onnx")
    facts = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).get_modelmeta().custom_metadata_map
    assert facts.items() >= described(run, 0).items()
    assert (facts["method"], facts["client"], json.loads(facts["input_shape"])) == ("fedproto", "0", [1, 8, 8])
    preprocess = Preprocess.parse(facts["preprocess.json"], "metadata")
    assert (preprocess.spec.shape, preprocess.objective.names) == ((1, 8, 8), tuple("0123456789"))
    assert json.loads(facts["classes"]) == [str(digit) for digit in range(10)]
    mean, std = (torch.tensor(json.loads(facts[key]))[:, None, None] for key in ("mean", "std"))
    pixels = run.data.dataset.images[torch.as_tensor(run.data.partition.test[0])] / 255
    assert torch.allclose((pixels - mean) / std, run.data.test(0)[0], atol=1e-5)


def test_a_run_in_double_precision_gives_a_file_in_single(tmp_path):
    run = finished(tmp_path, "fedproto", "mlp", precision="fp64")
    model, _ = write(run, 0, tmp_path / "model.onnx")
    x = run.data.test(0)[0].float()
    assert largest_difference(model, x, logits_of(tmp_path / "model.onnx", x), "client 0") < 1e-3


@pytest.mark.parametrize("where", ["onnxruntime.InferenceSession", "subprocess.run"])
def test_whatever_goes_wrong_leaves_no_files(tmp_path, monkeypatch, where):
    run = finished(tmp_path, "fedavg", "mlp")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_client(run, 0, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_file_that_computes_something_else_is_refused(tmp_path):
    run = finished(tmp_path, "fedavg", "mlp")
    model, x = run.personal_model(0), run.data.test(0)[0]
    with torch.no_grad():
        logits = model(x)
    assert largest_difference(model, x, logits, "client 0") == 0
    wrong = logits.clone()
    wrong[3, 2] += 1e-3
    with pytest.raises(ExportError, match="client 0: the file's logits differ"):
        largest_difference(model, x, wrong, "client 0")
    wrong[3, 2] = float("nan")
    with pytest.raises(ExportError, match="logits are not finite"):
        largest_difference(model, x, wrong, "client 0")
