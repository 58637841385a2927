"""Loads a data set by name: embedded, from a folder of parquet files, from PFLlib's files, or from the hub."""

from __future__ import annotations

import re
from pathlib import Path

from fedloom.data import hub, pfllib
from fedloom.data.catalogue import SOURCES
from fedloom.data.dataset import Dataset
from fedloom.errors import DataError


def load(
    name: str,
    path: str | Path | None = None,
    *,
    image_size: int | None = None,
    rows: int | None = None,
    cache: str | Path | None = None,
) -> Dataset:
    """A data set, as one pool of rows.

    `name` is one of `SOURCES`, "pfllib", or any word for files of one's own (`-` and `_` are the same). `path` is a
    folder with `train.parquet` and perhaps `test.parquet` (or the hub's `train-00000-of-00002.parquet` ...); without
    it the folder is looked for in `$FEDLOOM_DATA`, then in the cache, then on the hub (extra `fedloom[hub]`). Decoded
    pictures are kept in `cache` (default `$FEDLOOM_CACHE`, else `~/.cache/fedloom`).

    `image_size` resizes pictures to a square of that edge. `rows=N` keeps N training rows: the first N of one fixed
    permutation, `Stream("rows", name)`, whatever their class, in file order; test rows all stay. Raises DataError.
    """
    if image_size is not None and not 1 <= image_size <= 1024:
        raise DataError(f"data.image_size={image_size}: allowed is 1 to 1024 (pixels)")
    name = name.lower().replace("_", "-")
    if not re.fullmatch(r"\w[\w.-]*", name):  # it becomes part of files' names
        raise DataError(f"data={name}: a name is made of letters, digits, '-', '_' and '.'")
    if name == "pfllib":
        if path is None or image_size is not None or rows is not None:
            raise DataError("data=pfllib needs data.path=FOLDER, and takes neither data.image_size nor data.rows")
        return pfllib.load_pfllib(path)
    source = SOURCES.get(name)
    if source and source.embedded and path is None:
        from fedloom.data import embedded

        return embedded.load_embedded(name, image_size, rows)
    from fedloom.data import parquet  # pyarrow takes long to load

    root = hub.cache_root(cache)
    files = hub.find_files(name, path, root)
    return parquet.read_parquet(name, files, source, image_size=image_size, rows=rows, cache_root=root)
