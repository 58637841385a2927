"""The conversion of raw values to model inputs, in one description of all inputs. Every run writes it to its folder as `preprocess.json`.

Each input has a part. A part converts raw values to stored values (as in `Dataset.inputs`), and stored values to model inputs, by `stored
* scale + shift`. `raw_inputs.py` reads files, tables and images for this conversion.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_serializer, field_validator
from pydantic import Field as Limits
from torch import Tensor

from fedloom._version import __version__
from fedloom.data.text import TextCoder
from fedloom.errors import DataError
from fedloom.inputs import Field, Inputs, InputSpec, named_tensors, shapes_of
from fedloom.objectives import OBJECTIVES, Objective, Regression

FORMAT: Final = 1
PREPROCESS: Final = "preprocess.json"
MOST_BYTES: Final = 256 * 2**20
LARGEST: Final = float(np.finfo(np.float32).max)

Text = Annotated[str, Limits(max_length=1_000_000)]
Texts = Annotated[tuple[Text, ...], Limits(max_length=10_000_000)]
Number = Annotated[float, Limits(allow_inf_nan=False)]
Numbers = Annotated[tuple[Number, ...], Limits(max_length=10_000_000)]
Shape = Annotated[tuple[Annotated[int, Limits(ge=1, le=2**31)], ...], Limits(min_length=1, max_length=16)]
Scaling = tuple[Tensor, Tensor]
"""Scale and shift of a field in float64: scalars, or tensors that can be broadcast over an example."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class NumberColumn(_Strict):
    """A table column that contains numbers.

    Attributes:
        name: name of the column.
        words: the words for 0 and 1, if the column contains words.
        fill: the number that replaces missing values; None means that no value may be missing.
        marked: whether an additional column of 0 and 1 marks missing values.
    """

    name: Text
    words: tuple[()] | tuple[Text, Text] = ()
    fill: Number | None = None
    marked: bool = False

    def filled(self, values: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float32]]:
        """Return the stored columns for float64 values (N,), in which NaN is a missing value."""
        lacking = np.isnan(values)
        if self.fill is not None:
            values = np.where(lacking, self.fill, values)
        found = [values.astype(np.float32)]
        return [*found, lacking.astype(np.float32)] if self.marked else found


class CategoryColumn(_Strict):
    """A table column that contains categories. Id 0 means a value that is not in `levels`; the level "" means a missing value."""

    name: Text
    levels: Annotated[Texts, Limits(min_length=1)]


class _Part(_Strict):
    name: Text = ""
    shape: Shape

    @property
    def field(self) -> Field:
        """The description of this input."""
        return Field(name=self.name, shape=self.shape, kind=self.kind, levels=self.sizes)  # type: ignore[attr-defined]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of vocabularies or the numbers of levels; empty for other inputs."""
        return ()


class _Scaled(_Part):
    """An input that is scaled with one scale and shift for all values, for each channel, or for each value of an example.

    If `own` is not 0, it is the number of scalings in `scale` and `shift`: first one for examples that belong to no client, then one per
    client.
    """

    scale: Numbers = (1.0,)
    shift: Numbers = (0.0,)
    own: Annotated[int, Limits(ge=0, le=2**24)] = 0

    def scaling(self, client: int | None = None) -> Scaling:
        """Return scale and shift as tensors, for the given client if each client has its own scaling."""
        place = 0 if client is None else client + 1
        return self._tensor(self.scale, place), self._tensor(self.shift, place)

    def scaled(self, scaling: Scaling, own: int = 0) -> Self:
        """Return the part with another scaling. With `own`, both tensors have that many entries."""
        scale, shift = (tuple(value.reshape(-1).tolist()) for value in scaling)
        return self.model_copy(update={"scale": scale, "shift": shift, "own": own})

    def _tensor(self, values: tuple[float, ...], place: int) -> Tensor:
        found = torch.tensor(values, dtype=torch.float64)
        found = found.reshape(self.own, -1)[place] if self.own else found
        if len(found) == 1:
            return found[0]
        return found.reshape(-1, 1, 1) if len(self.shape) == 3 else found.reshape(self.shape)


class PictureInput(_Scaled):
    """Images (C, H, W) of type uint8. `resize` states whether images of other sizes are resized, as in training."""

    kind: Literal["picture"] = "picture"
    resize: bool = False


class NumberInput(_Scaled):
    """Numbers. `columns` are the table columns from which they come; for arrays, there are none."""

    kind: Literal["number"] = "number"
    columns: Annotated[tuple[NumberColumn, ...], Limits(max_length=1_000_000)] = ()


class CategoryInput(_Part):
    """Categories. `levels` is the number of levels of each column. `columns` are the table columns from which they come, if any."""

    kind: Literal["category"] = "category"
    levels: Annotated[tuple[Annotated[int, Limits(ge=0, lt=2**31)], ...], Limits(max_length=1_000_000)]
    columns: Annotated[tuple[CategoryColumn, ...], Limits(max_length=1_000_000)] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.levels


class TokenInput(_Part):
    """Token ids below `vocabulary`. `text` describes how texts become ids; None means that the ids come from arrays."""

    kind: Literal["token"] = "token"
    vocabulary: Annotated[int, Limits(ge=1, lt=2**31)]
    text: TextCoder | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.vocabulary,)


Part = PictureInput | NumberInput | CategoryInput | TokenInput


class TableFormat(_Strict):
    """How the training table was read: its label columns, its other columns that are not inputs, and the settings `data.*`."""

    labels: Texts = ()
    others: Texts = ()
    missing_values: Texts = ()
    decimal: Literal[".", ","] | None = None
    encoding: Text | None = None


class Preprocess(_Strict):
    """The conversion of raw values to model inputs, and of outputs to predictions.

    Attributes:
        data: name of the data set.
        inputs: one part for each input.
        objective: the learning task, with the names of classes, labels or targets.
        table: how a table was read; None for other data.
    """

    data: Text
    inputs: Annotated[tuple[Annotated[Part, Limits(discriminator="kind")], ...], Limits(min_length=1, max_length=64)]
    objective: Objective
    table: TableFormat | None = None

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)

    @field_validator("objective", mode="before")
    @classmethod
    def _task(cls, value: Any) -> Any:
        return _objective(value) if isinstance(value, Mapping) else value

    @field_serializer("objective")
    def _content(self, value: Objective) -> dict[str, Any]:
        return value.content()

    @property
    def spec(self) -> InputSpec:
        """The description of the model's inputs."""
        return InputSpec(tuple(part.field for part in self.inputs))

    def encode(self, raw: Any, client: int | None = None) -> Inputs:
        """Return raw values of a client's new examples as model inputs. With `client=None`, the examples belong to no client.

        For `raw`, see `raw_inputs.stored_inputs`. Raise DataError if it does not match the description.
        """
        return self.prepared(self.stored(raw), client)

    def stored(self, raw: Any) -> Inputs:
        """Return raw values of new examples in the same stored form as the training examples."""
        from fedloom.data.raw_inputs import stored_inputs  # pandas and Pillow are slow to import

        return stored_inputs(self, raw)

    def prepared(self, stored: Inputs, client: int | None = None) -> Inputs:
        """Return stored inputs of a client's new examples as model inputs. With `client=None`, they belong to no client.

        Raise DataError if they do not match the description.
        """
        check_stored(self.spec, stored)
        named = named_tensors(stored)
        found = {part.name: model_input(part.field, named[part.name], _scaling(part, client)) for part in self.inputs}
        return found[""] if self.spec.is_single else found

    def differences(self, other: Preprocess) -> list[str]:
        """Return the keys in which two descriptions differ."""
        mine, theirs = (one.model_dump(mode="json") for one in (self, other))
        return [key for key in mine if mine[key] != theirs[key]]

    def text(self, indent: int | None = 1) -> str:
        """Return the content of the file. `indent` is the number of spaces per level; with None, the content is one line."""
        content = {"format": FORMAT, "fedloom": __version__, **self.model_dump(mode="json")}
        return json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"

    @property
    def coder(self) -> TextCoder | None:
        """The rules by which texts become token ids, or None if no input consists of texts."""
        return next((part.text for part in self.inputs if isinstance(part, TokenInput) and part.text), None)

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> Preprocess:
        """Return the description in the text of a file. Raise DataError, which starts with `where`, if it is malformed."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not a JSON file ({error})") from None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise DataError(f"{where} is not a {PREPROCESS} of format {FORMAT}; write it with this version of fedloom")
        content.pop("fedloom", None)
        try:
            found = cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{where}: '{place}' is malformed ({first['msg']})") from None
        for part in found.inputs:
            if problem := _problem(part):
                raise DataError(f"{where}: the input '{part.name}' {problem}")
        names = [part.name for part in found.inputs]
        if len(set(names)) < len(names) or ("" in names and len(names) > 1):
            raise DataError(f"{where}: two inputs have the same name, or one has none")
        return found

    @classmethod
    def read(cls, file: str | Path) -> Preprocess:
        """Return the description in a file. Raise DataError if it is missing or malformed."""
        place = Path(file).expanduser()
        try:
            if place.stat().st_size > MOST_BYTES:
                raise DataError(f"{place} is larger than {MOST_BYTES // 2**20} MiB; it is not a {PREPROCESS}")
            return cls.parse(place.read_bytes(), str(place))
        except OSError as error:
            raise DataError(f"{place} cannot be read ({error.strerror})") from None


@dataclass(frozen=True, kw_only=True)
class Given:
    """An existing description, by which data are read.

    Attributes:
        preprocess: the description.
        where: its name in messages, such as `data.preprocess=FILE`.
        accepts_unknown: whether values that are not levels of their column, and missing values without a level, become id 0. Otherwise,
            they are errors.
    """

    preprocess: Preprocess
    where: str
    accepts_unknown: bool = False


def array_part(field: Field, resize: bool = False) -> Part:
    """Return the part for an input that comes from arrays or images. For `resize`, see `PictureInput`."""
    name, shape = field.name, field.shape
    if field.kind == "picture":
        return PictureInput(name=name, shape=shape, resize=resize)
    if field.kind == "number":
        return NumberInput(name=name, shape=shape)
    if field.kind == "category":
        return CategoryInput(name=name, shape=shape, levels=field.levels)
    return TokenInput(name=name, shape=shape, vocabulary=field.levels[0])


def given_scaling(parts: Iterable[Part]) -> dict[str, Scaling]:
    """Return the scaling in the parts, by field. Raise DataError if each client has its own scaling."""
    scaled = [part for part in parts if isinstance(part, _Scaled)]
    if any(part.own for part in scaled):
        raise DataError(
            "data.preprocess: has a scaling for each client of another run; set data.normalise=own, or make it with fedloom preprocess"
        )
    return {part.name: part.scaling() for part in scaled}


def model_input(field: Field, values: Tensor, scaling: Scaling | None) -> Tensor:
    """Return a stored input tensor (N, ...) as a model input: int64 ids, or scaled numbers of the default dtype."""
    if scaling is None:
        return values.to(torch.int64)
    dtype = torch.get_default_dtype()
    scale, shift = scaling
    # expanded to the shape of an example: with broadcasting, addcmul gives identical results but takes four times as long
    shift, scale = (value.to(dtype).expand(field.shape).contiguous() for value in (shift, scale))
    return torch.addcmul(shift, values.to(dtype), scale)


def check_stored(spec: InputSpec, inputs: Inputs) -> None:
    """Raise DataError if stored inputs of new examples do not match the description."""
    named = named_tensors(inputs)
    if named.keys() != {part.name for part in spec.fields}:
        raise DataError(f"inputs: must be {spec}, but have {shapes_of(inputs)}")
    for part in spec.fields:
        values = named[part.name]
        if tuple(values.shape[1:]) != part.shape or (values.dtype == torch.uint8) < (part.kind == "picture"):
            raise DataError(f"inputs: must be {spec}, as in training, but have shape {shapes_of(inputs)}")
        if part.is_integer and bool((values.to(torch.int64) >= torch.tensor(part.bounds)).any()):
            raise DataError(
                f"inputs: {part.kind} values must be below {max(part.bounds)}, but one is {int(values.max())}"
            )


def _scaling(part: Part, client: int | None) -> Scaling | None:
    return part.scaling(client) if isinstance(part, _Scaled) else None


def _objective(content: Mapping[str, Any]) -> Objective:
    """Return the learning task that `Objective.content` describes. Raise ValueError if it is malformed."""
    values = {key: value for key, value in content.items() if key != "task"}
    kind = OBJECTIVES.get(str(content.get("task")))
    if kind is None:
        raise ValueError(f"unknown task {content.get('task')}")
    found: Objective = TypeAdapter(kind).validate_python(values)
    if found.content().keys() != content.keys():
        raise ValueError("unknown or missing keys")
    if isinstance(found, Regression):
        is_positive = all(0 < std < math.inf for std in found.std)
        if not len(found.names) == len(found.mean) == len(found.std) or not is_positive or not found.delta > 0:
            raise ValueError("names, mean and std must have the same length, and std must be above 0")
    return found


def _problem(part: Part) -> str:
    """Return what is wrong with a part that was read from a file, or ""."""
    if isinstance(part, _Scaled):
        size = math.prod(part.shape)
        each = {1, part.shape[0] if len(part.shape) == 3 else size}
        lengths = {n * max(part.own, 1) for n in each}
        if len(part.scale) not in lengths or len(part.shift) not in lengths:
            return f"has {len(part.scale)} scales and {len(part.shift)} shifts for the shape {part.shape}"
    if isinstance(part, PictureInput) and (len(part.shape) != 3 or part.shape[0] not in (1, 3)):
        return f"has the shape {part.shape}; pictures are (C, H, W) with C = 1 or 3"
    if isinstance(part, NumberInput) and part.columns:
        width = sum(1 + column.marked for column in part.columns)
        if part.shape != (width,):
            return f"has {width} columns for the shape {part.shape}"
    if (
        isinstance(part, TokenInput)
        and part.text
        and (part.vocabulary, part.shape) != (part.text.size, (part.text.length,))
    ):
        return "has another vocabulary or length than its texts"
    if isinstance(part, CategoryInput):
        if part.shape != (len(part.levels),):
            return f"has levels of {len(part.levels)} columns for the shape {part.shape}"
        if part.columns and tuple(len(column.levels) for column in part.columns) != part.levels:
            return "has other numbers of levels than its columns"
    return ""
