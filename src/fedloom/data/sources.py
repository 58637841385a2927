"""Load a data set by name: embedded data, a folder of parquet files or pictures, PFLlib's files, or a download from the hub."""

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
    task: str | None = None,
    owner: str | None = None,
    cache: str | Path | None = None,
) -> Dataset:
    """Return a data set as one pool of examples.

    Args:
        name: a name in `SOURCES`, "pfllib", or a name for the user's own files; `-` and `_` are equivalent.
        path: a folder with `train.parquet` and, optionally, `test.parquet` (or the hub's `train-00000-of-00002.parquet` ...).
            Default: search `$FEDLOOM_DATA`, then the cache, then the hub (extra `fedloom[hub]`). With a name of your own, also a folder of
            pictures (see `picture_folders`).
        image_size: resize images to this width and height in pixels.
        rows: number of training examples to keep. They are the first ones of a fixed permutation, `Stream("rows", name)`, which
            ignores classes. Their order in the files is kept, and so are all test examples.
        task: the learning task of the user's own files; default: classification. Other data sets have their own task.
        owner: "folder": the upper folders of a folder of pictures are domains; they become the column `domain`.
        cache: folder for decoded images; default: `$FEDLOOM_CACHE`, else `~/.cache/fedloom`.

    Raises:
        DataError: a value is invalid, or the data are missing or malformed.
    """
    if image_size is not None and not 1 <= image_size <= 1024:
        raise DataError(f"data.image_size={image_size}: must be from 1 to 1024 (pixels)")
    name = name.lower().replace("_", "-")
    if not re.fullmatch(r"\w[\w.-]*", name):  # the name becomes part of file names
        raise DataError(f"data={name}: a name may contain only letters, digits, '-', '_' and '.'")
    source = SOURCES.get(name)
    own = source.task if source else "classification"
    if task not in (None, own) and (source or name == "pfllib"):
        raise DataError(f"data.task={task}: data={name} is a {own} data set; remove data.task")
    if task == "language":
        raise DataError("data.task=language: files of text are not read yet; pass token ids with fedloom.from_arrays")
    if path is not None and source is None and name != "pfllib":
        from fedloom.data import picture_folders  # Pillow is slow to import

        if picture_folders.is_picture_folder(path):
            return picture_folders.read_pictures(
                name, Path(path), where=f"data.path={path}", image_size=image_size, cache_root=hub.cache_root(cache),
                rows=rows, task=task or own, owner=owner,
            )  # fmt: skip
    if owner is not None:
        raise DataError(
            f"data.owner={owner}: data={name} is not a folder of pictures of your own (data=mine data.path=FOLDER)"
        )
    if name == "pfllib":
        if path is None or image_size is not None or rows is not None:
            raise DataError("data=pfllib: needs data.path=FOLDER, and does not support data.image_size or data.rows")
        return pfllib.load_pfllib(path)
    if source and source.embedded and path is None:
        from fedloom.data import embedded

        return embedded.load_embedded(name, image_size, rows)
    from fedloom.data import parquet  # pyarrow is slow to import

    root = hub.cache_root(cache)
    files = hub.find_files(name, path, root)
    return parquet.read_parquet(
        name, files, source, image_size=image_size, rows=rows, cache_root=root, task=task or own
    )
