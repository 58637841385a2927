"""Data sets made from NumPy arrays, torch tensors or pandas tables, with one or several inputs, for every learning task."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedloom.data.dataset import Column, Dataset, describe, validated
from fedloom.data.preprocess import Part
from fedloom.data.targets import check_options, class_numbers, objective_for
from fedloom.errors import DataError, suggest
from fedloom.inputs import KINDS, Inputs, InputSpec, Kind, map_inputs, named_tensors, tensors_of
from fedloom.objectives import Language, Objective

log = logging.getLogger(__name__)

Array = Tensor | npt.NDArray[Any]
Given = Array | Mapping[str, Array] | tuple[Array, ...] | Any  # Any: a pandas table


def from_arrays(
    x: Given,
    y: Any,
    x_test: Given | None = None,
    y_test: Any = None,
    *,
    name: str = "arrays",
    task: Literal["classification", "multilabel", "regression", "language"] = "classification",
    classes: Sequence[str] | None = None,
    columns: Mapping[str, Sequence[Any] | Column] | None = None,
    kind: Kind | Mapping[str, Kind] | None = None,
    vocabulary: int | None = None,
    loss: Literal["mse", "huber"] = "mse",
    delta: float = 1.0,
) -> Dataset:
    """Return a data set made from NumPy arrays, torch tensors or pandas tables. The arrays are copied.

    Images with channels last, (N, H, W, C), are converted to channels first. Alpha channels are dropped. Float images with integer values
    from 0 to 255 are converted to uint8. Float images from 0 to 1 are scaled to [-1, 1] by default, like uint8 images. Each of these
    changes is logged.

    Args:
        x: inputs. A single array contains uint8 images (N, C, H, W), finite floats of any shape (N, ...), or integers (N, T), which are
            token ids (0 is padding). Several arrays are passed to the model by name if they are in a dictionary, and by position if they
            are in a tuple. The columns of a pandas table become `numbers` and `categories`, like those of a parquet file, unless `kind` is
            set; numbers are standardised by default. Texts (N,), such as a list of strings, become token ids;
            the vocabulary consists of words of the training texts.
        y: targets. For classification, an array (N,) of integers from 0, or of names. For multi-label classification, an array (N, L)
            of 0 and 1. For regression, an array of numbers of shape (N,) or (N, M). For language modelling, an array (N, T) with the
            next token id at every position, or -100 if there is none.
        x_test, y_test: official test examples. Pass both or neither.
        name: name of the data set, for listings and messages.
        task: the learning task.
        classes: names of the classes, labels or targets.
        columns: further columns by name, with one value for each example, training examples first.
        kind: `picture`, `number`, `token` or `category`, for all inputs or by name. By default, it is derived from type and shape.
        vocabulary: number V of different tokens. Default: one more than the largest token id in inputs and targets; for texts, at most
            10,000.
        loss: for regression, the squared error, or the Huber loss with threshold `delta`.
        delta: threshold of the Huber loss, in standard deviations of the target.

    Raises:
        DataError: arrays have the wrong shape or type, or labels run from 1 to K without `classes` (class 0 would have no examples).
    """
    if (x_test is None) != (y_test is None):
        raise DataError("from_arrays: x_test and y_test must be given together; one of them is missing")
    check_options(task, classes, vocabulary, loss, delta)
    if classes is None and task in ("multilabel", "regression"):
        classes = _column_names(y)
    targets = _array(y, "y")
    n_train, kinds, parts = len(targets), dict[str, Kind](), tuple[Part, ...]()
    normalise: str | None = None
    if hasattr(x, "columns") and kind is None:
        from fedloom.data.frames import read_frame  # pandas is slow to import

        (inputs, parts), normalise = read_frame(x, x_test), "standard"
        kinds = {part.name: part.kind for part in parts}
        targets = targets if x_test is None else _joined_targets(targets, _array(y_test, "y_test"))
    elif kind is None and (texts := _texts(x, "x")) is not None:
        inputs, part = _token_ids(texts, x_test, vocabulary)
        kinds, parts = {"": "token"}, (part,)
        targets = targets if x_test is None else _joined_targets(targets, _array(y_test, "y_test"))
    else:
        named = _kinds(kind, x)
        inputs, kinds = _inputs(x, "x", named)
        if x_test is not None:
            inputs = _with_test(inputs, _inputs(x_test, "x_test", named)[0])
            targets = _joined_targets(targets, _array(y_test, "y_test"))
        normalise = _usual_scale(inputs, kinds)
    if any(len(values) != len(targets) for values in tensors_of(inputs)):
        n = len(tensors_of(inputs)[0])
        raise DataError(f"from_arrays: {n} inputs and {len(targets)} labels; each input must have one label")
    if task == "classification":
        targets, classes = class_numbers(targets, classes)
    values, objective = objective_for(
        task, _tensor(targets, "y"), n_train, names=classes, vocabulary=vocabulary, loss=loss, delta=delta
    )
    if task == "language":
        _check_positions(inputs, kinds, values)
    pool = Dataset.described(
        name=name,
        inputs=inputs,
        targets=values,
        n_train=n_train,
        objective=objective,
        kinds=kinds,
        levels=_vocabularies(inputs, kinds, vocabulary, objective),
        columns={key: np.asarray(v) for key, v in (columns or {}).items()},
        normalise=normalise,
        parts=parts,
    )
    return validated(pool)


def _texts(values: Any, what: str) -> list[str] | None:
    """Return texts (N,) as a list, or None if the values are not texts."""
    found = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(found, list) or not found or not isinstance(found[0], str):
        return None
    if others := [value for value in found if not isinstance(value, str)]:
        raise DataError(f"from_arrays: {what} has texts, but also {others[0]!r}; give a text for every example")
    return found


def _token_ids(texts: list[str], x_test: Any, vocabulary: int | None) -> tuple[Tensor, Part]:
    """Return training and test texts as token ids, and a description of how they became token ids."""
    from fedloom.data.layouts import TextOptions
    from fedloom.data.text_sets import coded_texts

    tests = [] if x_test is None else _texts(x_test, "x_test")
    if tests is None:
        raise DataError("from_arrays: x has texts, but x_test has none; they must match")
    return coded_texts([(text,) for text in [*texts, *tests]], len(texts), TextOptions(vocabulary=vocabulary))


def _column_names(y: Any) -> Sequence[str] | None:
    """Return the names of the columns of a pandas table or series, or None if there are none."""
    if hasattr(y, "columns"):
        return [str(column) for column in y.columns]
    name = getattr(y, "name", None)
    return None if name is None else [str(name)]


def arrays_as_inputs(x: Given, spec: InputSpec) -> Inputs:
    """Return arrays of new examples in the stored form of a data set with this `spec`. Raise DataError if that is impossible."""
    fields = _fields(x)
    known = {part.name: part.kind for part in spec.fields}
    return _inputs(x, "inputs", {key: known[key] for key in fields if key in known})[0]


def _kinds(kind: Kind | Mapping[str, Kind] | None, x: Given) -> dict[str, Kind]:
    """Return the kind of each field, as specified by the caller."""
    fields = _fields(x)
    named = dict(kind) if isinstance(kind, Mapping) else dict.fromkeys(fields, kind) if kind else {}
    for key, value in named.items():
        if key not in fields:
            raise DataError(f"from_arrays: kind has the unknown input '{key}'{suggest(key, fields)}")
        if value not in KINDS:
            raise DataError(f"from_arrays: kind={value}: unknown{suggest(value, KINDS)}")
    return named


def _fields(x: Given) -> dict[str, Any]:
    """Return the inputs by name; a single array has the name ""."""
    if isinstance(x, Mapping):
        if not x or not all(isinstance(key, str) and key for key in x):
            raise DataError("from_arrays: the keys of a dictionary of inputs must be strings")
        return dict(x)
    return {str(i): values for i, values in enumerate(x)} if isinstance(x, tuple) else {"": x}


def _inputs(x: Given, what: str, kinds: Mapping[str, Kind]) -> tuple[Inputs, dict[str, Kind]]:
    """Return the inputs as tensors, and the kind of each input."""
    found, told = dict[str, Tensor](), dict[str, Kind]()
    for key, values in _fields(x).items():
        found[key], told[key] = _field(values, f"{what}['{key}']" if key else what, kinds.get(key))
    return (found[""] if list(found) == [""] else found), told


def _with_test(inputs: Inputs, more: Inputs) -> Inputs:
    """Return the inputs of the training examples, followed by those of the test examples."""
    if isinstance(inputs, dict) != isinstance(more, dict) or (
        isinstance(inputs, dict) and isinstance(more, dict) and inputs.keys() != more.keys()
    ):
        raise DataError("from_arrays: x and x_test must have the same inputs")

    def joined(a: Tensor, b: Tensor) -> Tensor:
        if a.is_floating_point() and b.dtype == torch.uint8:  # x was not converted: some pixels are not integers
            b = b.to(a.dtype)
        if a.shape[1:] != b.shape[1:] or a.is_floating_point() != b.is_floating_point():
            raise DataError(f"from_arrays: x_test is {_describe(b)} and x is {_describe(a)}; they must match")
        return torch.cat([a, b])

    return map_inputs(joined, inputs, more)


def _joined_targets(y: npt.NDArray[Any], y_test: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the targets of the training examples, followed by those of the test examples."""
    if y.shape[1:] != y_test.shape[1:]:
        raise DataError(f"from_arrays: y_test has shape {y_test.shape} and y has shape {y.shape}; they must match")
    if (y.dtype.kind in "OUS") != (y_test.dtype.kind in "OUS"):
        raise DataError(f"from_arrays: y_test has type {y_test.dtype} and y has type {y.dtype}; they must match")
    return np.concatenate([y, y_test])


def _usual_scale(inputs: Inputs, kinds: Mapping[str, Kind]) -> str | None:
    """Return "half" for float images from 0 to 1, so that they are scaled like uint8 images; otherwise return None."""
    if not isinstance(inputs, Tensor) or kinds[""] != "number" or inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
        return None
    if float(inputs.min()) < 0 or not 0 < float(inputs.max()) <= 1:
        return None
    log.warning(
        "from_arrays: x holds images with values from 0 to 1; they are scaled to [-1, 1], like uint8 images; to use them unchanged, set "
        "data.normalise=none"
    )
    return "half"


def _array(values: Any, what: str) -> npt.NDArray[Any]:
    """Return targets as an array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype is torch.bfloat16 else values).numpy()  # NumPy has no bfloat16
    found = _numpy(values, what)
    if found.dtype.kind == "S":
        found = np.char.decode(found, "utf-8", "replace")
    if found.ndim == 0 or len(found) == 0:
        raise DataError(f"from_arrays: {what} has shape {found.shape}; it must have one row per example")
    return found


def _numpy(values: Any, what: str) -> npt.NDArray[Any]:
    """Return an array, table or list as a NumPy array. Raise DataError if its rows have different lengths."""
    try:
        found: npt.NDArray[Any] = values.to_numpy() if hasattr(values, "to_numpy") else np.asarray(values)
    except ValueError:
        raise DataError(
            f"from_arrays: {what} has rows of different lengths; pad token ids with 0, and give labels as columns of 0 and 1"
        ) from None
    return found


def _tensor(values: Any, what: str) -> Tensor:
    """Return a copy as a tensor, so that later changes to the caller's array do not affect the data set, or vice versa."""
    try:
        if isinstance(values, Tensor):
            return values.detach().cpu().clone()
        values = _numpy(values, what)
        if values.dtype.kind in _CONTENT:
            raise DataError(
                f"from_arrays: {what} holds {_CONTENT[values.dtype.kind]}; convert tables of numbers with .astype(float), categories to "
                "integers (pandas: .astype('category').cat.codes), texts to token ids"
            )
        return torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"from_arrays: {what} cannot be converted to a tensor ({error})") from error


_CONTENT = {"O": "text or other objects", "U": "text", "S": "text", "M": "dates", "m": "time differences"}


def _field(x: Any, what: str, kind: Kind | None) -> tuple[Tensor, Kind]:
    """Return one input as a tensor, and its kind."""
    tensor = _tensor(x, what)
    if tensor.ndim < 2 or len(tensor) == 0:
        hint = "; for one value per example, reshape it to (N, 1)" if tensor.ndim == 1 and len(tensor) else ""
        raise DataError(
            f"from_arrays: {what} has shape {tuple(tensor.shape)}; it must be (N, ...) with N > 0 examples{hint}"
        )
    if tensor.is_complex():
        raise DataError(f"from_arrays: {what} is {_describe(tensor)}; split it into real and imaginary numbers")
    if kind in ("token", "category"):
        return _integers(tensor, what, kind), kind
    if kind == "number" and not tensor.is_floating_point():
        tensor = tensor.to(torch.float32)
    tensor = tensor if kind == "number" else _as_pictures(tensor, what)
    if tensor.dtype == torch.uint8:
        if tensor.ndim != 4 or tensor.shape[1] not in (1, 3):
            raise DataError(
                f"from_arrays: {what} is {_describe(tensor)}; uint8 images must be (N, C, H, W) with C = 1 or 3; "
                "for token ids, set kind='token'"
            )
    elif kind == "picture":
        raise DataError(f"from_arrays: {what} is {_describe(tensor)}; pictures must be uint8")
    elif not tensor.is_floating_point():
        if int(tensor.min()) >= 0:
            return _integers(tensor, what, "token"), "token"
        log.warning("from_arrays: %s is %s with negative values; it is used as numbers", what, _describe(tensor))
        return tensor.to(torch.float32), "number"
    elif not bool(torch.isfinite(tensor).all()):
        raise DataError(f"from_arrays: {what} contains NaN or infinite values; remove or replace them")
    return tensor, "picture" if tensor.dtype == torch.uint8 else "number"


def _as_pictures(tensor: Tensor, what: str) -> Tensor:
    """Return images with channels first, without an alpha channel, and pixel values from 0 to 255 as uint8."""
    if tensor.ndim == 3 and tensor.dtype == torch.uint8:
        log.warning("from_arrays: %s is %s; it is used as images with one channel", what, _describe(tensor))
        tensor = tensor[:, None]
    if tensor.ndim == 4 and tensor.dtype == torch.uint8 and 4 in (tensor.shape[1], tensor.shape[3]):
        if not {1, 3} & {tensor.shape[1], tensor.shape[3]}:
            log.warning("from_arrays: %s is %s; its fourth channel (alpha) is dropped", what, _describe(tensor))
            tensor = tensor[..., :3] if tensor.shape[3] == 4 else tensor[:, :3]
    if tensor.ndim == 4 and tensor.shape[3] in (1, 3) and tensor.shape[1] not in (1, 3):
        log.warning(
            "from_arrays: %s is %s; it is converted from channels last to channels first", what, _describe(tensor)
        )
        tensor = tensor.permute(0, 3, 1, 2).contiguous()
    if tensor.is_floating_point() and tensor.ndim == 4 and _are_bytes(tensor):
        log.warning(
            "from_arrays: %s holds integers from 0 to 255 as %s; they are converted to uint8", what, _describe(tensor)
        )
        tensor = tensor.to(torch.uint8)
    return tensor


def _integers(tensor: Tensor, what: str, kind: Kind) -> Tensor:
    """Return token ids or categories in the smallest integer type that can represent them."""
    if tensor.is_floating_point():
        raise DataError(f"from_arrays: {what} is {_describe(tensor)}; {kind} inputs must be integers")
    if kind == "category" and tensor.ndim != 2:
        raise DataError(f"from_arrays: {what} is {_describe(tensor)}; categories must have the shape (N, columns)")
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0:
        raise DataError(f"from_arrays: {what} contains the value {low}; {kind} inputs must be at least 0")
    small = next(t for t in (torch.uint8, torch.int16, torch.int32, torch.int64) if high <= torch.iinfo(t).max)
    return tensor.to(small)


def _vocabularies(
    inputs: Inputs, kinds: Mapping[str, Kind], vocabulary: int | None, objective: Objective
) -> dict[str, tuple[int, ...]] | None:
    """Return the size of the vocabulary for every field of tokens, or None for the default.

    Raise DataError if the given `vocabulary` is too small, or if neither inputs nor targets are tokens.
    """
    least = objective.vocabulary if isinstance(objective, Language) else 0
    if vocabulary is None and not least:
        return None
    named, spec = named_tensors(inputs), describe(inputs, kinds)
    sizes = {f.name: int(named[f.name].max()) + 1 for f in spec.fields if f.kind == "token"}
    if vocabulary is not None and not (sizes or least):
        raise DataError(
            f"from_arrays: vocabulary={vocabulary}: needs token inputs, but the inputs are {spec}; remove it"
        )
    most = max([least, *sizes.values()])
    if vocabulary is not None and most > vocabulary:
        raise DataError(f"from_arrays: vocabulary={vocabulary}: too small for token {most - 1}; set at least {most}")
    return {name: (max(size, least, vocabulary or 0),) for name, size in sizes.items()}


def _check_positions(inputs: Inputs, kinds: Mapping[str, Kind], targets: Tensor) -> None:
    """Raise DataError if the only input consists of tokens and the number of targets differs from the number of tokens."""
    if isinstance(inputs, Tensor) and kinds[""] == "token" and inputs.shape != targets.shape:
        raise DataError(
            f"from_arrays: x has shape {tuple(inputs.shape)} and y {tuple(targets.shape)}; task=language needs one next token per "
            "position, such as x=blocks[:, :-1] and y=blocks[:, 1:]"
        )


def _are_bytes(x: Tensor) -> bool:
    """Return whether images contain pixel values from 0 to 255 that are stored as floats."""
    return x.shape[1] in (1, 3) and 1.5 < float(x.max()) <= 255 and float(x.min()) >= 0 and bool((x == x.round()).all())


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
