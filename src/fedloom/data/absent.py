"""The clients of a finished run without their examples, as used for predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import torch

from fedloom.data.dataset import Dataset
from fedloom.data.federation import Federation
from fedloom.data.partition import Partition
from fedloom.data.preprocess import Preprocess
from fedloom.errors import DataError
from fedloom.inputs import Field, Inputs


class AbsentData(Federation):
    """A federation that contains numbers of examples and the conversion of raw values to model inputs, but not the examples themselves."""

    has_examples = False

    def __init__(self, preprocess: Preprocess, partition: Partition) -> None:
        rows = [*partition.train, *partition.valid, *partition.test, partition.common]
        n = max((int(part.max()) + 1 for part in rows if len(part)), default=1)
        fields = {field.name: _zeros(field, n) for field in preprocess.spec.fields}
        self.dataset = Dataset(
            name=preprocess.data,
            inputs=fields[""] if preprocess.spec.is_single else fields,
            targets=torch.zeros(1, dtype=torch.int64).expand(n),
            n_train=n,
            objective=preprocess.objective,
            spec=preprocess.spec,
            parts=preprocess.inputs,
            table=preprocess.table,
        )
        self.partition, self._preprocess = partition, preprocess
        self.is_picture = "picture" in preprocess.spec.kinds
        self.normalise, self.augment = "none", "none"

    @property
    def preprocess(self) -> Preprocess:
        return self._preprocess

    def example(self) -> Inputs:
        """Return two artificial inputs, for dry runs (see `Federation.example`)."""
        fields = {field.name: torch.ones(2, *field.shape).to(_stored_type(field)) for field in self.spec.fields}
        return self._preprocess.prepared(fields[""] if self.spec.is_single else fields)

    def rows(self, index: Any) -> NoReturn:
        """Raise DataError, because there are no examples."""
        raise DataError(f"needs the examples of data={self.name}; open the run with data=...")


def absent_data(folder: Path) -> AbsentData:
    """Return the clients of the run in a folder, from `preprocess.json` and `partition.json`. Raise DataError if a file is malformed."""
    file = folder / "partition.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        n = 1 + max(max(rows) for split in ("train", "valid", "test") for rows in content[split] if rows)
        partition = Partition.load(file, max(n, 1 + max(content["common"], default=0)))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file} cannot be read ({type(error).__name__})") from error
    return AbsentData(Preprocess.read(folder / "preprocess.json"), partition)


def _stored_type(field: Field) -> torch.dtype:
    return torch.uint8 if field.kind == "picture" else torch.int32 if field.is_integer else torch.float32


def _zeros(field: Field, n: int) -> torch.Tensor:
    return torch.zeros(1, *field.shape, dtype=_stored_type(field)).expand(n, *field.shape)
