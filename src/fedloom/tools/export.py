"""Export of a client's personal model for a device: ONNX and safetensors files, compared with torch on the client's own examples."""

from __future__ import annotations

import copy
import inspect
import json
import logging
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
from fedloom.engines import process_memory
from fedloom.errors import FedloomError, RunFolderError, UsageError
from fedloom.experiment.build import arithmetic
from fedloom.experiment.loop import Experiment
from fedloom.experiment.personal_model import PersonalModel

BATCH = 32  # images in the timed batch
LEAST, MOST_S = 10, 0.5  # minimum number of runs of a latency measurement, and its duration in seconds
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
name, shape = session.get_inputs()[0].name, json.loads(sys.argv[2])
def seconds(n):
    x, found, end = numpy.zeros([n, *shape], numpy.float32), [], time.perf_counter() + float(sys.argv[4])
    while len(found) < int(sys.argv[3]) or time.perf_counter() < end:
        started = time.perf_counter()
        session.run(None, {name: x})
        found.append(time.perf_counter() - started)
    return sorted(found)[len(found) // 2]
one = seconds(1)
after = peak_process_bytes()
print(json.dumps({"one": one, "batch": seconds(int(sys.argv[5])), "before": before, "peak": after}))
"""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The facts of one exported model. Seconds are medians on one thread; memory is that of a fresh process for one image."""

    client: int
    file: str
    file_bytes: int
    parameters: int  # of the nets used for prediction
    rows: int  # number of test examples on which file and torch were compared
    own_rows: bool  # whether these are the client's own; if it has none, they are the common test set
    difference: float  # largest difference between logits
    same_class: int  # number of examples with the same predicted class
    accuracy: float | None  # accuracy of the file
    torch_seconds: float  # for one image
    onnx_seconds: float
    torch_batch_seconds: float  # for BATCH images
    onnx_batch_seconds: float
    peak_bytes: int  # of the process
    model_bytes: int  # part of it for the model: weights, buffers, and ONNX Runtime's working memory


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
    """Return the files to write, by client.

    Raises:
        RunFolderError: a file exists, or the folder cannot be created.
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
        ExportError: outputs of the file differ from torch's by more than rounding errors. Both files are removed, as after any other error.
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
    logits, own = _run_onnx(file, x), _torch_logits(model, x.float())
    difference = largest_difference(model, x, logits, f"client {i}")
    one, many = _torch_seconds(model, x)
    probe = _probe(file, x.shape[1:])
    return Exported(
        client=i,
        file=str(file),
        file_bytes=file.stat().st_size,
        parameters=sum(p.numel() for name, p in model.named_parameters() if name in used),
        rows=len(y),
        own_rows=experiment.data.n_test(i) > 0,
        difference=difference,
        same_class=int((logits.argmax(1) == own.argmax(1)).sum()),
        accuracy=float((logits.argmax(1) == y).double().mean()),
        torch_seconds=one,
        onnx_seconds=probe["one"],
        torch_batch_seconds=many,
        onnx_batch_seconds=probe["batch"],
        peak_bytes=int(probe["peak"]),
        model_bytes=int(probe["peak"] - probe["before"]),
    )


def write(experiment: Experiment, i: int, file: Path) -> tuple[PersonalModel, set[str]]:
    """Write both files without comparison. Return the model, and the names of the parameters and buffers that predictions use."""
    model, facts = experiment.personal_model(i).float(), described(experiment, i)
    used = _write_onnx(model, torch.zeros(2, *experiment.data.input_shape), file, facts)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in used}
    safetensors.torch.save_file(weights, file.with_suffix(".safetensors"), facts)
    return model, used


def described(experiment: Experiment, i: int) -> dict[str, str]:
    """Return the file's metadata: the origin of the model, and how to convert an image to its input. Values are text; lists are JSON."""
    data, problem = experiment.data, experiment.problem
    mean, std = data.normalisation
    stored = "pixel / 255" if data.is_picture else "value"
    return {
        "fedloom": __version__,
        "run": experiment.folder.path.resolve().name,
        "method": experiment.settings.method.name,
        "model": problem.archs[problem.arch_of[i]].name,
        "data": data.name,
        "client": str(i),
        "rounds": str(experiment.done),
        "classes": json.dumps([str(name) for name in data.dataset.classes]),
        "input": f"float32 (batch, {', '.join(map(str, data.input_shape))}), each channel ({stored} - mean) / std",
        "input_shape": json.dumps(list(data.input_shape)),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "output": f"float32 (batch, {data.n_classes}) logits, in the order of classes",
    }


def largest_difference(model: PersonalModel, x: Tensor, logits: Tensor, who: str) -> float:
    """Return the largest difference between `logits` and torch's on examples `x`.

    The tolerance is 1e-5 of the largest logit, or ten times the difference between torch in float32 and in float64 if that is larger,
    as in ill-conditioned networks.

    Raises:
        ExportError: the difference exceeds the tolerance.
    """
    own, exact = _torch_logits(model, x.float()), _torch_logits(copy.deepcopy(model).double(), x.double())
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


def _own_rows(experiment: Experiment, i: int) -> tuple[Tensor, Tensor]:
    """Return the client's test examples, or the common test set if it has none."""
    data = experiment.data
    return data.test(i) if data.n_test(i) else data.common()


def _write_onnx(model: PersonalModel, x: Tensor, file: Path, facts: Mapping[str, str]) -> set[str]:
    """Write the ONNX file. Return the names of the parameters and buffers that predictions use."""
    with _without_warnings():
        program = torch.onnx.export(
            model,
            (x,),
            dynamo=True,
            dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
            input_names=["input"],
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
    """Suppress the exporter's warnings. They concern its own code, and torchvision, which is not needed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _run_onnx(file: Path, x: Tensor) -> Tensor:
    """Return logits from ONNX Runtime, in batches of `BATCH`. The last batch is usually smaller, which tests other batch sizes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    parts = [session.run(None, {"input": part.float().numpy()})[0] for part in torch.split(x, BATCH)]
    return torch.cat([torch.from_numpy(part) for part in parts])


@torch.inference_mode()
def _torch_logits(model: PersonalModel, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in torch.split(x, BATCH)])


@torch.inference_mode()
def _torch_seconds(model: PersonalModel, x: Tensor) -> tuple[float, float]:
    """Return the seconds for one image and for a batch, on one thread."""
    with torch_threads(1):
        batch = x[torch.arange(BATCH) % len(x)].float()
        return _median(lambda: model(batch[:1])), _median(lambda: model(batch))


def _median(work: Callable[[], Any]) -> float:
    found: list[float] = []
    end = time.perf_counter() + MOST_S
    while len(found) < LEAST or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _probe(file: Path, shape: Sequence[int]) -> dict[str, float]:
    """Measure time and memory of ONNX Runtime in a separate process."""
    source = f"{inspect.getsource(process_memory)}\n{PROBE}"
    words = [str(file), json.dumps(list(shape)), str(LEAST), str(MOST_S), str(BATCH)]
    done = subprocess.run([sys.executable, "-P", "-c", source, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"{file} cannot be run: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found
