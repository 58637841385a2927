"""Cache of data sets in the form in which they were read, as safetensors files.

The cache is optional. Files that cannot be read are treated as missing, and failures to write are ignored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedloom.data.dataset import Dataset, validated
from fedloom.data.preprocess import Preprocess
from fedloom.errors import DataError
from fedloom.inputs import named_tensors

log = logging.getLogger(__name__)


def cache_key(files: Iterable[Path], settings: Sequence[Any]) -> str:
    """Return a hash of the paths, sizes and modification times of a data set's files, and of the settings with which they are read.

    Raise DataError if a file does not exist.
    """
    facts = []
    for file in files:
        try:
            found = file.stat()
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror})") from error
        facts.append((str(file.absolute()), found.st_size, found.st_mtime_ns))
    text = json.dumps([facts, *map(repr, settings)])
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=12).hexdigest()


def cached(root: Path, name: str, key: str, read: Callable[[], Dataset]) -> Dataset:
    """Return the data set that is stored under `key`. If there is none, read it with `read`, and store it.

    Warnings that `read` logs are also stored, and are logged again whenever the data set comes from the cache.
    """
    stored = _load(root, name, key)
    if stored is not None:
        pool, lines = stored
        for line in lines:
            log.warning("%s", line)
        return pool
    with _logged_lines() as lines:
        pool = validated(read())
    _save(root, key, pool, lines)
    return pool


def _load(root: Path, name: str, key: str) -> tuple[Dataset, list[str]] | None:
    """Return the data set under `key` and the warnings that were logged when it was read, or None if it is missing or cannot be read."""
    try:
        with safe_open(_file(root, name, key), framework="pt") as stored:
            facts = json.loads(stored.metadata()["fedloom"])
            tensors = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118 (not a mapping)
        columns = {c: tensors["column." + c].numpy() for c in facts["columns"]}
        for column, values in facts["strings"].items():
            columns[column] = np.asarray(values)[columns[column]]
        how = Preprocess.parse(facts["preprocess"], name)
        inputs = {part.name: tensors["input." + part.name] for part in how.inputs}
        pool = Dataset.described(
            name=name,
            inputs=inputs[""] if how.spec.is_single else inputs,
            targets=tensors["targets"],
            n_train=facts["n_train"],
            objective=how.objective,
            columns=columns,
            normalise=facts["normalise"],
            parts=how.inputs,
            table=how.table,
        )
        return validated(replace(pool, overlaps=facts["overlaps"])), facts["lines"]
    except (OSError, SafetensorError, DataError, KeyError, TypeError, ValueError, IndexError, RuntimeError):
        return None


def _save(root: Path, key: str, dataset: Dataset, lines: list[str]) -> None:
    """Store a data set under `key`. The write is atomic: readers never see a partial file."""
    tensors = {"input." + name: values.contiguous() for name, values in named_tensors(dataset.inputs).items()}
    tensors["targets"] = dataset.targets
    strings: dict[str, list[str]] = {}
    for name, column in dataset.columns.items():
        if column.dtype.kind == "U":
            values, codes = np.unique(column, return_inverse=True)
            strings[name], column = values.tolist(), codes
        tensors["column." + name] = torch.from_numpy(np.ascontiguousarray(column))
    facts = {
        "n_train": dataset.n_train,
        "preprocess": dataset.preprocess().text(),
        "columns": list(dataset.columns),
        "strings": strings,
        "normalise": dataset.normalise,
        "overlaps": dataset.overlaps,
        "lines": lines,
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


class _Lines(logging.Handler):
    """Record the warnings of this thread. If there is no other handler, pass them on to Python's handler of last resort."""

    def __init__(self, *, is_alone: bool) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self.is_alone, self.owner = is_alone, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.owner:
            self.lines.append(record.getMessage())
        if self.is_alone and logging.lastResort is not None:
            logging.lastResort.handle(record)


@contextmanager
def _logged_lines() -> Iterator[list[str]]:
    """Yield a list to which the warnings that fedloom logs in this thread during the block are added."""
    logger = logging.getLogger("fedloom")
    handler = _Lines(is_alone=not logger.hasHandlers())
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
