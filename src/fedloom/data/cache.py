"""A cache of decoded data sets, as safetensors files.

The cache is optional. Files that cannot be read are treated as missing, and failures to write are ignored.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedloom.data.dataset import Dataset, validated
from fedloom.errors import DataError
from fedloom.objectives import from_content


def load_cached(root: Path, name: str, key: str) -> Dataset | None:
    """Return the pool stored under `key`, or None if it is missing or cannot be read."""
    try:
        with safe_open(_file(root, name, key), framework="pt") as stored:
            facts = json.loads(stored.metadata()["fedloom"])
            tensors = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118 (not a mapping)
        columns = {c: tensors["column." + c].numpy() for c in facts["columns"]}
        for column, values in facts["strings"].items():
            columns[column] = np.asarray(values)[columns[column]]
        return validated(
            Dataset.described(
                name=name,
                inputs=tensors["images"],
                targets=tensors["targets"],
                n_train=facts["n_train"],
                objective=from_content(facts["objective"]),
                columns=columns,
            )
        )
    except (OSError, SafetensorError, DataError, KeyError, TypeError, ValueError, IndexError, RuntimeError):
        return None


def save(root: Path, key: str, dataset: Dataset) -> None:
    """Store the pool under `key`. The write is atomic: readers never see a partial file."""
    tensors = {"images": dataset.images, "targets": dataset.targets}
    strings: dict[str, list[str]] = {}
    for name, column in dataset.columns.items():
        if column.dtype.kind == "U":
            values, codes = np.unique(column, return_inverse=True)
            strings[name], column = values.tolist(), codes
        tensors["column." + name] = torch.from_numpy(np.ascontiguousarray(column))
    facts = {
        "n_train": dataset.n_train,
        "objective": dataset.objective.content(),
        "columns": list(dataset.columns),
        "strings": strings,
    }
    file = _file(root, dataset.name, key)
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    with suppress(OSError, SafetensorError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, temporary, metadata={"fedloom": json.dumps(facts)})
            os.replace(temporary, file)  # noqa: PTH105 (atomic replacement, as elsewhere)
        finally:
            temporary.unlink(missing_ok=True)


def _file(root: Path, name: str, key: str) -> Path:
    return root / "decoded" / f"{name}-{key}.safetensors"
