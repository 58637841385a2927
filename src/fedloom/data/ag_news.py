"""AG News: the topics of news items, from parquet files on the hub. The files are not part of the package; their licence is unknown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fedloom.data import hub
from fedloom.data.catalogue import SOURCES
from fedloom.data.dataset import Dataset
from fedloom.data.layouts import Request, TableOptions
from fedloom.data.tables import read_table
from fedloom.errors import DataError
from fedloom.objectives import Classification


def read_ag_news(asked: Request, folder: Path) -> Dataset:
    """Return the texts as token ids, with a vocabulary from the training texts.

    Raise DataError if files are missing, or if labels are not from 0 to 3.
    """
    files = hub.split_files(folder)
    if not files[0]:
        raise DataError(f"{folder} has neither train.parquet nor train-00000-of-00001.parquet")
    options, texts = TableOptions(label="label"), replace(asked.texts, text=("text",))
    pool = read_table(asked.name, files, options, task="classification", rows=asked.rows, texts=texts)
    names = SOURCES["ag-news"].classes or ()
    places = {name: i for i, name in enumerate(names)} | {str(i): i for i in range(len(names))}
    if unknown := [name for name in pool.classes if name not in places]:
        raise DataError(
            f"{folder}: label '{unknown[0]}' is not one of AG News, whose labels are 0 to 3: {', '.join(names)}"
        )
    labels = np.array([places[name] for name in pool.classes])[pool.labels.numpy()]
    return replace(pool, targets=pool.targets.new_tensor(labels), objective=Classification(names=names))
