"""Folders of images: class folders, split folders, metadata files and domain folders. Images are decoded once, to uint8."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import torch

from fedloom.data.cache import cache_key, cached
from fedloom.data.dataset import Dataset
from fedloom.data.layouts import SPLIT_WORDS
from fedloom.data.picture_layout import Layout, find_layout
from fedloom.data.picture_metadata import Metadata, Targets, counted, read_metadata
from fedloom.data.pictures import decode_picture
from fedloom.data.subset import choose_rows
from fedloom.data.targets import objective_for
from fedloom.errors import DataError

log = logging.getLogger(__name__)

_FORMAT = 2  # part of the cache key: increment it when decoding changes


def is_picture_folder(folder: Path) -> bool:
    """Return whether `folder` is a folder without parquet files in it or in the folders directly below it."""
    return folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet"))


def read_pictures(
    name: str,
    folder: Path,
    *,
    where: str,
    image_size: int | None,
    cache_root: Path,
    rows: int | None = None,
    task: str = "classification",
    owner: str | None = None,
    needs_every_class: bool = True,
) -> Dataset:
    """Return the pool of the images in a folder, or from the cache if they were decoded before.

    Args:
        name: name of the data set.
        folder: contains class folders, or split folders (`SPLIT_WORDS`) with class folders, or metadata.csv or metadata.jsonl.
        where: the folder as written in error messages, such as `data.path=FOLDER`.
        image_size, rows, task: see `fedloom.data.load`.
        cache_root: the cache folder.
        owner: with "folder", the upper folders are domains, which become the column `domain`, and the class folders are below them.
        needs_every_class: whether every class must have training images.

    Raises:
        DataError: the folder, its metadata or an image is invalid.
    """
    folder = folder.expanduser()
    metadata = read_metadata(folder, SPLIT_WORDS)
    layout = find_layout(folder, where, metadata, owner)
    targets = _targets(layout, metadata, task, owner)
    if needs_every_class and task == "classification":
        _check_classes(layout, targets)
    files = [folder.joinpath(*parts) for parts in layout.files]

    def read() -> Dataset:
        keep, n_train = choose_rows(name, np.ones(len(files), dtype=bool), layout.n_train, rows)
        chosen = [files[i] for i in np.flatnonzero(keep)]
        return _decoded(name, chosen, targets.chosen(keep), n_train=n_train, image_size=image_size, task=task)

    lists = metadata.files if metadata is not None else []
    key = cache_key([*lists, *files], ["pictures", _FORMAT, layout.n_train, image_size, rows, task, owner])
    pool = cached(cache_root, name, key, read)
    _log(pool, layout)
    return pool


def _decoded(
    name: str, files: list[Path], targets: Targets, *, n_train: int, image_size: int | None, task: str
) -> Dataset:
    images = torch.from_numpy(decode_picture(((str(file), _bytes(file)) for file in files), len(files), image_size))
    values, objective = objective_for(task, torch.from_numpy(targets.values), n_train, names=targets.names)
    return Dataset.described(
        name=name, inputs=images, targets=values, n_train=n_train, objective=objective, columns=targets.columns
    )


def _targets(layout: Layout, metadata: Metadata | None, task: str, owner: str | None) -> Targets:
    """Return the targets and columns from the metadata or the names of folders. Raise DataError if neither fits the task."""
    if metadata is not None:
        targets = metadata.targets(layout.files, task)
    elif task == "classification":
        targets = _folder_classes(layout, owner)
    else:
        raise DataError(
            f"data.task={task}: {layout.where} needs metadata.csv or metadata.jsonl, with file_name and the targets"
        )
    if owner is None:
        return targets
    if "domain" in targets.columns:
        raise DataError(f"data.owner={owner}: the metadata already have a column 'domain'; remove data.owner")
    domains = np.asarray([file[0] for file in layout.inner])
    return targets._replace(columns={"domain": domains, **targets.columns})


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from error


def _folder_classes(layout: Layout, owner: str | None) -> Targets:
    labels = [file[1 if owner else 0] for file in layout.inner]
    classes = sorted(set(labels))
    if owner and all(name.lower() in SPLIT_WORDS for name in classes):
        shown = ", ".join(classes)
        raise DataError(
            f"data.owner={owner}: {layout.where}: splits ({shown}) lie below the domains; move them to the top (train/DOMAIN/CLASS)"
        )
    places = {name: i for i, name in enumerate(classes)}
    return Targets(np.array([places[label] for label in labels], np.int64), tuple(classes), {})


def _check_classes(layout: Layout, targets: Targets) -> None:
    names = targets.names or ()
    missing = sorted(set(range(len(names))) - set(targets.values[: layout.n_train].tolist()))
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(
            f"{layout.where}: class '{names[missing[0]]}'{more} has no training pictures; add some, or remove the class from the test split"
        )


def _log(pool: Dataset, layout: Layout) -> None:
    """Log how the folder was interpreted, and whether test images are also training images."""
    task, names = pool.objective.task, pool.objective.names
    what = "in " + counted(len(names), "class", "classes")
    if task != "classification":
        what = f"with {counted(len(names), 'label' if task == 'multilabel' else 'target')} ({', '.join(names)})"
    line = f"{pool.name}: {counted(pool.n_rows, 'picture')} {what}"
    if "domain" in pool.columns:
        line += f" and {counted(len(np.unique(pool.columns['domain'])), 'domain')}"
    if pool.n_train < pool.n_rows:
        line += f", train {pool.n_train:,}, test {pool.n_rows - pool.n_train:,}"
    log.warning("%s", "; ".join([line, *layout.notes]))
    if repeated := _repeated(pool):
        log.warning("%s: %s with the same pixels as a training picture", pool.name, counted(repeated, "test picture"))


def _repeated(pool: Dataset) -> int:
    """Return the number of test images with the same pixels as a training image."""
    if pool.n_train == pool.n_rows:
        return 0
    hashes = [hashlib.blake2b(memoryview(picture.numpy()), digest_size=16).digest() for picture in pool.images]
    train = set(hashes[: pool.n_train])
    return sum(value in train for value in hashes[pool.n_train :])
