"""A pool of examples, which contains first the official training examples and then the official test examples."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedloom.data.preprocess import NumberInput, Part, PictureInput, Preprocess, Scaling, TableFormat, array_part
from fedloom.errors import DataError
from fedloom.inputs import Field, Inputs, InputSpec, Kind, named_tensors, tensors_of
from fedloom.objectives import Classification, Objective, Strata

log = logging.getLogger(__name__)

Column = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A pool of N examples, training examples first.

    Examples 0 .. n_train-1 are the official training examples. The others are the official test examples; there may be none. `inputs` is
    one tensor (N, ...), or several tensors by name; `spec` describes them. Images are uint8 (N, C, H, W) with values from 0 to 255,
    numbers are floating point, and tokens and categories are integers. `targets` has the form that `objective` requires, such as int64
    class labels (N,). `columns` contains further values (N,), such as the domain or the writer of each example. `normalise` is the default
    for `Federation`. `overlaps` describes how examples of one owner overlap, such as windows of a text; random splits are then refused,
    because test data would leak into training data. `revision` is the commit of the hub's files, for `data=hub:OWNER/NAME`. `parts`
    describes how raw values become `inputs`, field by field; by default, inputs come from arrays. `table` describes how a table was read.
    `is_scaled` states whether `parts` already contains the scaling of the inputs. `factor` names the column with a known client factor, if
    there is one; `changed` contains the same images with another value of the factor.
    """

    name: str
    inputs: Inputs
    targets: Tensor
    n_train: int
    objective: Objective
    spec: InputSpec
    columns: dict[str, Column] = field(default_factory=dict)
    normalise: str | None = None
    overlaps: str = ""
    revision: str = ""
    parts: tuple[Part, ...] = ()
    table: TableFormat | None = None
    is_scaled: bool = False
    factor: str = ""
    changed: Tensor | None = None

    @classmethod
    def labelled(
        cls,
        *,
        name: str,
        images: Tensor,
        labels: Tensor,
        n_train: int,
        classes: Sequence[str],
        columns: Mapping[str, Column] | None = None,
    ) -> Dataset:
        """Return a pool of images (uint8) or numbers (floating point), with one class per example."""
        objective = Classification(names=tuple(classes))
        return cls.described(
            name=name, inputs=images, targets=labels, n_train=n_train, objective=objective, columns=columns
        )

    @classmethod
    def described(
        cls,
        *,
        name: str,
        inputs: Inputs,
        targets: Tensor,
        n_train: int,
        objective: Objective,
        kinds: Mapping[str, Kind] | None = None,
        levels: Mapping[str, tuple[int, ...]] | None = None,
        columns: Mapping[str, Column] | None = None,
        normalise: str | None = None,
        parts: tuple[Part, ...] = (),
        table: TableFormat | None = None,
    ) -> Dataset:
        """Return a pool whose inputs are described by `parts` or, as in `describe`, by `kinds` and `levels`."""
        return cls(
            name=name,
            inputs=inputs,
            targets=targets,
            n_train=n_train,
            objective=objective,
            spec=InputSpec(tuple(part.field for part in parts)) if parts else describe(inputs, kinds, levels),
            columns=dict(columns or {}),
            normalise=normalise,
            parts=parts,
            table=table,
        )

    @property
    def n_rows(self) -> int:
        """Number N of training and test examples."""
        return len(self.targets)

    @property
    def images(self) -> Tensor:
        """The inputs, if they are one tensor. Raise DataError if there are several."""
        if not isinstance(self.inputs, Tensor):
            raise DataError(f"data={self.name}: needs one input tensor, but the inputs are {self.spec}")
        return self.inputs

    @property
    def labels(self) -> Tensor:
        """The class of each example (N,), int64. Raise DataError if the task has no classes."""
        if not isinstance(self.objective, Classification):
            raise DataError(f"data={self.name}: needs classes, but the task is {self.objective.task}")
        return self.targets

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, labels or targets."""
        return self.objective.names

    @property
    def n_classes(self) -> int:
        """Number of classes, Y, including classes without examples. Raise DataError if the task has no classes."""
        return self.objective.n_classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example's input, such as (C, H, W) for images or (D,) for flat features.

        If there are several inputs, that of the first.
        """
        return self.spec.shape

    def preprocess(self, scaling: Mapping[str, Scaling] | None = None, own: int = 0) -> Preprocess:
        """Return the conversion of raw values to model inputs.

        `scaling` is the scaling of each image and number field, by name; by default, there is none. `own` is the number of its entries if
        each client has its own scaling.
        """
        parts = self.parts or tuple(map(array_part, self.spec.fields))
        given = scaling or {}
        scaled = tuple(
            part.scaled(given[part.name], own)
            if isinstance(part, PictureInput | NumberInput) and part.name in given
            else part
            for part in parts
        )
        return Preprocess(data=self.name, inputs=scaled, objective=self.objective, table=self.table)

    def strata(self, bins: int = 10) -> Strata:
        """Return groups of examples by target: classes, rarest labels or quantile bins. If the task has none, return one group."""
        found = self.objective.strata(self.targets.cpu(), self.n_train, bins)
        return Strata(np.zeros(self.n_rows, np.int64), ("examples",)) if found is None else found

    def __repr__(self) -> str:
        n_test = self.n_rows - self.n_train
        outputs = {"classification": "classes", "multilabel": "labels", "regression": "targets", "language": "tokens"}
        what = f"{self.objective.n_outputs} {outputs[self.objective.task]}"
        return f"<Dataset {self.name}: {self.spec}; {what}; {self.n_train} train + {n_test} test>"


def with_classes(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """Return the data set with its classes in the order of `names`, which may include classes without examples.

    Raise DataError if the task is not a classification, a name occurs twice, or a class with examples is not among the names.
    """
    shown = f"data.classes={','.join(names)}"
    if not isinstance(dataset.objective, Classification):
        raise DataError(f"{shown}: data={dataset.name} has the task {dataset.objective.task}, not classes; remove it")
    places = {name: place for place, name in enumerate(names)}
    if len(places) < len(names):
        raise DataError(f"{shown}: a name occurs twice; remove one")
    known = [dataset.classes[label] for label in np.unique(dataset.labels.numpy()).tolist()]
    for name in known:
        if name not in places:
            raise DataError(f"{shown}: does not name '{name}', which is a class of data={dataset.name}; add it")
    if unused := [name for name in names if name not in known]:
        log.warning("%s: no example has the class %s", shown, ", ".join(unused))
    order = torch.tensor([places.get(name, -1) for name in dataset.classes])
    return replace(dataset, targets=order[dataset.labels], objective=Classification(names=tuple(names)))


def describe(
    inputs: Inputs, kinds: Mapping[str, Kind] | None = None, levels: Mapping[str, tuple[int, ...]] | None = None
) -> InputSpec:
    """Return the description of stored inputs.

    Args:
        kinds: the kind of each field (the name of a single tensor is ""). By default, it depends on the type: uint8 is an image, other
            integers are tokens, and floating point is numbers.
        levels: sizes of vocabularies and numbers of levels. Default: one more than the largest value.
    """
    fields = []
    for name, values in named_tensors(inputs).items():
        kind = (kinds or {}).get(name) or _kind(values)
        known = (levels or {}).get(name)
        if known is None and kind == "token":
            known = (int(values.max()) + 1,)
        if known is None and kind == "category":
            known = tuple((values.max(0).values + 1).tolist())
        fields.append(Field(name=name, shape=tuple(values.shape[1:]), kind=kind, levels=known or ()))
    return InputSpec(tuple(fields))


def _kind(values: Tensor) -> Kind:
    if values.is_floating_point():
        return "number"
    return "picture" if values.dtype == torch.uint8 else "token"


def validated(dataset: Dataset) -> Dataset:
    """Return the data set after checking that inputs, targets and columns match. Raise DataError if they do not."""
    n = len(dataset.targets)
    lengths = {len(values) for values in tensors_of(dataset.inputs)}
    if lengths != {n} or not 0 < dataset.n_train <= n:
        shown = " and ".join(map(str, sorted(lengths)))
        raise DataError(
            f"data={dataset.name}: {shown} inputs, {n} labels, {dataset.n_train} training examples; these numbers must match"
        )
    if problem := dataset.objective.checked(dataset.targets):
        raise DataError(f"data={dataset.name}: {problem}")
    for key, column in dataset.columns.items():
        if column.shape != (n,):
            raise DataError(f"data={dataset.name}: column '{key}' has shape {column.shape}; it must be ({n},)")
    _check_integers(dataset)
    return dataset


def _check_integers(dataset: Dataset) -> None:
    """Raise DataError if a token or a category is not below its number of levels."""
    named = named_tensors(dataset.inputs)
    for part in dataset.spec.fields:
        if not part.is_integer:
            continue
        values = named[part.name]
        if bool((values < 0).any()) or bool((values.to(torch.int64) >= torch.tensor(part.bounds)).any()):
            where = f"input '{part.name}'" if part.name else "inputs"
            raise DataError(
                f"data={dataset.name}: {where} run from {int(values.min())} to {int(values.max())}; "
                f"{part.kind} values must be from 0 to {max(part.bounds) - 1}"
            )
