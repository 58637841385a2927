"""Export of a client's personal model for a device, as ONNX and safetensors files that are compared with torch on the
client's examples.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fedloom._version import __version__
from fedloom.accelerator import torch_threads
from fedloom.data.preprocess import PREPROCESS
from fedloom.engines import process_memory
from fedloom.errors import FedloomError, RunFolderError, UsageError
from fedloom.experiment.build import arithmetic
from fedloom.experiment.loop import Experiment
from fedloom.experiment.personal_model import PersonalModel
from fedloom.inputs import Field, Inputs, map_inputs, n_examples
from fedloom.models.lora import merge_adapters

BATCH = 32  # number of examples in the timed batch
LEAST, MOST_S = 10, 0.5  # minimum number of runs in a latency measurement, and its duration in seconds
ROUNDING, TIMES_ROUNDING = (
    1e-5,
    10,
)  # tolerance, relative to the largest logit, and to the difference of float32 from float64
LOWEST = torch.finfo(torch.float32).max / 2  # FedProto's logit of a class without a prototype is larger in magnitude

PROBE = """
import json, sys, time
import numpy, onnxruntime
before = peak_process_bytes()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
inputs = json.loads(sys.argv[2])
def seconds(n):
    x = {name: numpy.zeros([n, *shape], kind) for name, (shape, kind) in inputs.items()}
    found, end = [], time.perf_counter() + float(sys.argv[4])
    while len(found) < int(sys.argv[3]) or time.perf_counter() < end:
        started = time.perf_counter()
        session.run(None, x)
        found.append(time.perf_counter() - started)
    return sorted(found)[len(found) // 2]
one = seconds(1)
after = peak_process_bytes()
print(json.dumps({"one": one, "batch": seconds(int(sys.argv[5])), "before": before, "peak": after}))
"""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The facts about an exported model.

    Times in seconds are medians with one thread; memory is that of a new process for one example.
    """

    client: int
    file: str
    file_bytes: int
    parameters: int  # number of parameters of the nets used for prediction
    rows: int  # number of test examples on which the file and torch were compared
    own_rows: bool  # whether these are the client's own examples, not the common test set
    difference: float  # largest difference between logits
    same_answers: int | None  # number of examples with the same predicted class; None for tasks without classes
    metric: str  # name of the primary metric
    value: float | None  # value of the primary metric for the file
    torch_seconds: float  # time for one example
    onnx_seconds: float
    torch_batch_seconds: float  # time for BATCH examples
    onnx_batch_seconds: float
    peak_bytes: int  # peak memory of the process
    model_bytes: int  # the part of it for the model: weights, buffers, and ONNX Runtime's working memory


class ExportError(FedloomError):
    """The file cannot be written or run, or its outputs differ from torch's."""


def needs() -> None:
    """Raise UsageError if ONNX is not installed."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as missing:
        raise UsageError(f"export needs {missing.name}: pip install 'fedloom[export]'") from None


def targets(folder: Path, clients: Sequence[int]) -> dict[int, Path]:
    """Return the files that will be written, by client.

    Raises:
        RunFolderError: one of the files exists, or the folder cannot be created.
    """
    files = {i: folder / f"client-{i}.onnx" for i in clients}
    for file in files.values():
        for there in (file, file.with_suffix(".safetensors")):
            if there.exists():
                raise RunFolderError(f"--out {folder}: {there.name} already exists; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"--out {folder}: {error.strerror}") from None
    return files


def export_client(experiment: Experiment, i: int, file: Path) -> Exported:
    """Write client `i`'s personal model to `file` (ONNX, float32, any batch size) and its weights to a safetensors file next to it.

    Raises:
        ExportError: outputs of the file differ from those of torch by more than rounding errors. Both files are removed, as after any
            error.
    """
    try:
        return _exported(experiment, i, file)
    except BaseException:  # keep only files that were compared with torch
        for written in (file, file.with_suffix(".safetensors")):
            written.unlink(missing_ok=True)
        raise


def _exported(experiment: Experiment, i: int, file: Path) -> Exported:
    model, used = write(experiment, i, file)
    with arithmetic(experiment.settings):
        x, y = _own_rows(experiment, i)
    logits, own = _run_onnx(file, x), _torch_logits(model, _single(x))
    objective = experiment.data.objective
    value = objective.value(objective.scores(logits, y, [len(y)])[0])
    difference = largest_difference(model, x, logits, f"client {i}")
    one, many = _torch_seconds(model, x)
    probe = _probe(file, {name: values[:1] for name, values in _named(x).items()})
    return Exported(
        client=i,
        file=str(file),
        file_bytes=file.stat().st_size,
        parameters=sum(p.numel() for name, p in model.named_parameters() if name in used),
        rows=len(y),
        own_rows=experiment.data.n_test(i) > 0,
        difference=difference,
        same_answers=int((logits.argmax(1) == own.argmax(1)).sum()) if objective.task == "classification" else None,
        metric=objective.primary.name,
        value=None if math.isnan(value) else value,
        torch_seconds=one,
        onnx_seconds=probe["one"],
        torch_batch_seconds=many,
        onnx_batch_seconds=probe["batch"],
        peak_bytes=int(probe["peak"]),
        model_bytes=int(probe["peak"] - probe["before"]),
    )


def write(experiment: Experiment, i: int, file: Path) -> tuple[PersonalModel, set[str]]:
    """Write both files without a comparison. Return the model, and the names of the parameters and buffers that are used for prediction.

    LoRA adapters are merged into the weights.
    """
    model, facts = merge_adapters(experiment.personal_model(i)).float(), described(experiment, i)
    used = _write_onnx(model, map_inputs(torch.zeros_like, _single(experiment.data.example())), file, facts)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in used}
    safetensors.torch.save_file(weights, file.with_suffix(".safetensors"), facts)
    return model, used


def described(experiment: Experiment, i: int) -> dict[str, str]:
    """Return the file's metadata: the origin of the model, and the conversion of an example to its input.

    Values are text; lists are JSON.
    """
    data, problem = experiment.data, experiment.problem
    inputs = [_described_field(part) for part in data.spec.fields]
    positions = "positions, " * (data.objective.output_ndim - 2)
    scaled = data.normalisation(i)
    mean, std = (scaled[""][k] if "" in scaled else {name: pair[k] for name, pair in scaled.items()} for k in (0, 1))
    return {
        "fedloom": __version__,
        "run": experiment.folder.path.resolve().name,
        "method": experiment.settings.method.name,
        "model": problem.archs[problem.arch_of[i]].name,
        "data": data.name,
        "client": str(i),
        "rounds": str(experiment.done),
        "task": json.dumps(data.objective.content()),
        "classes": json.dumps([str(name) for name in data.dataset.classes]),
        "input": "; ".join(inputs),
        "input_shape": json.dumps(list(data.input_shape)),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        PREPROCESS: data.preprocess.text(),
        "output": f"float32 (batch, {positions}{data.objective.n_outputs}) {OUTPUTS[data.objective.task]}",
    }


OUTPUTS = {
    "classification": "logits, in the order of classes",
    "multilabel": "logits, in the order of classes (here: labels); above 0 means present",
    "regression": "values in standard deviations from the mean of the training targets (see task)",
    "language": "logits of the next token, at every position",
}


def _described_field(part: Field) -> str:
    """Return a description of one input in words."""
    where = f"{part.name}: " if part.name else ""
    shape = ", ".join(("batch", *map(str, part.shape)))
    if part.is_integer:
        return f"{where}int64 ({shape}), {part.kind} ids below {max(part.bounds)}"
    stored = "pixel / 255" if part.kind == "picture" else "value"
    return f"{where}float32 ({shape}), each channel ({stored} - mean) / std"


def _named(x: Inputs) -> dict[str, Tensor]:
    """Return inputs in float32 by their names in the file."""
    single = _single(x)
    return {"input": single} if isinstance(single, Tensor) else single


def _single(x: Inputs) -> Inputs:
    """Return inputs with numbers in float32."""
    return map_inputs(lambda v: v.float() if v.is_floating_point() else v, x)


def largest_difference(model: PersonalModel, x: Inputs, logits: Tensor, who: str) -> float:
    """Return the largest difference between `logits` and those of torch on examples `x`.

    The tolerance is 1e-5 of the largest logit or, if it is larger, as in ill-conditioned networks, ten times the difference between torch
    in float32 and in float64.

    Raises:
        ExportError: the difference exceeds the tolerance.
    """
    double = map_inputs(lambda v: v.double() if v.is_floating_point() else v, x)
    own, exact = _torch_logits(model, _single(x)), _torch_logits(copy.deepcopy(model).double(), double)
    known = exact.abs() < LOWEST
    if not known.any() or not torch.equal(known, logits.abs() < LOWEST):
        raise ExportError(f"{who}: logits are not finite, or not for the same classes in the file and in torch")
    allowed = max(ROUNDING * exact[known].abs().max(), TIMES_ROUNDING * (own - exact)[known].abs().max())
    difference = float((logits - own)[known].abs().max())
    if difference > allowed:
        raise ExportError(
            f"{who}: the file's logits differ from torch's by {difference:.2g}, but rounding explains only {allowed:.2g}"
        )
    return difference


def _own_rows(experiment: Experiment, i: int) -> tuple[Inputs, Tensor]:
    """Return the client's test examples, or the common test set if the client has none."""
    data = experiment.data
    return data.test(i) if data.n_test(i) else data.common()


def _write_onnx(model: PersonalModel, x: Inputs, file: Path, facts: Mapping[str, str]) -> set[str]:
    """Write the ONNX file. Return the names of the parameters and buffers that are used for prediction."""
    named = _named(x)
    dims = {name: {0: torch.export.Dim("batch")} for name in named}
    with _without_warnings():
        program = torch.onnx.export(
            model,
            kwargs={"x": x},  # a positional dictionary would be interpreted as keyword arguments
            dynamo=True,
            dynamic_shapes={"x": dims if isinstance(x, dict) else dims["input"]},
            input_names=list(named),
            output_names=["logits"],
            verbose=False,
        )
        if program is None or program.exported_program is None:
            raise ExportError("torch.onnx.export returned no model")
        program.model.metadata_props.update(facts)
        program.save(str(file), external_data=False)
    graph, signature = program.exported_program.graph, program.exported_program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {names[node.name] for node in graph.find_nodes(op="placeholder") if node.name in names and node.users}


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress the exporter's warnings, which concern its own code, and torchvision, which is not needed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _run_onnx(file: Path, x: Inputs) -> Tensor:
    """Return logits from ONNX Runtime, in batches of `BATCH`. The last batch is usually smaller, so that other batch sizes are tested."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    wanted = {given.name for given in session.get_inputs()}  # the file lacks inputs that the model ignores
    named = {name: values for name, values in _named(x).items() if name in wanted}
    starts = range(0, n_examples(x), BATCH)
    parts = [session.run(None, {name: v[k : k + BATCH].numpy() for name, v in named.items()})[0] for k in starts]
    return torch.cat([torch.from_numpy(part) for part in parts])


@torch.inference_mode()
def _torch_logits(model: PersonalModel, x: Inputs) -> Tensor:
    starts = range(0, n_examples(x), BATCH)
    return torch.cat([model(map_inputs(lambda v, k=k: v[k : k + BATCH], x)) for k in starts])


@torch.inference_mode()
def _torch_seconds(model: PersonalModel, x: Inputs) -> tuple[float, float]:
    """Return the time in seconds for one example and for a batch, with one thread."""
    with torch_threads(1):
        batch = map_inputs(lambda v: v[torch.arange(BATCH) % len(v)], _single(x))
        one = map_inputs(lambda v: v[:1], batch)
        return _median(lambda: model(one)), _median(lambda: model(batch))


def _median(work: Callable[[], Any]) -> float:
    found: list[float] = []
    end = time.perf_counter() + MOST_S
    while len(found) < LEAST or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _probe(file: Path, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Measure time and memory of ONNX Runtime in a separate process."""
    source = f"{inspect.getsource(process_memory)}\n{PROBE}"
    kinds = {name: (list(v.shape[1:]), "float32" if v.is_floating_point() else "int64") for name, v in inputs.items()}
    words = [str(file), json.dumps(kinds), str(LEAST), str(MOST_S), str(BATCH)]
    done = subprocess.run([sys.executable, "-P", "-c", source, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"{file} cannot be run: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found
