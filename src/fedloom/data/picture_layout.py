"""Layouts of folders of images: which images belong to which split, and at which depth the folders name their classes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fedloom.data.layouts import SPLIT_WORDS, other_file
from fedloom.data.picture_metadata import Metadata, Parts
from fedloom.errors import DataError

_SKIPPED = ("__MACOSX",)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The content of a folder, before any image is decoded.

    `files` are paths relative to the folder, training images first. `inner` are the same paths relative to their split folders.
    """

    where: str
    files: list[Parts]
    inner: list[Parts]
    n_train: int
    notes: list[str]


def find_layout(folder: Path, where: str, metadata: Metadata | None, owner: str | None) -> Layout:
    """Return the images by split, after a check of their depth. Raise DataError for an invalid layout."""
    found, notes = _found(folder, where), list[str]()
    if not found:
        raise DataError(
            f"{where}: has neither train.parquet nor pictures in folders named by class, nor metadata.csv with pictures"
            + other_file(folder)
        )
    if metadata is not None:
        found = metadata.listed(found, notes)
    parts, depth = _splits(found, where, notes, is_listed=metadata is not None), 0
    if parts is None:
        parts = {"train": found, "test": []}
    else:
        depth = 1
        parts = _two_splits(parts, where, notes)
    files = parts["train"] + parts["test"]
    layout = Layout(
        where=where, files=files, inner=[file[depth:] for file in files], n_train=len(parts["train"]), notes=notes
    )
    _check_depth(layout, owner, is_listed=metadata is not None)
    if metadata is None:
        roots = {folder.joinpath(*file[:depth]) for file in files}
        notes += _unused_folders(roots, {file[0] for file in layout.inner})
        if len(layout.inner[0]) > (3 if owner else 2):
            notes.append(
                "folders below the classes are ignored" + ("" if owner else " (domains need data.owner=folder)")
            )
    return layout


def _found(folder: Path, where: str) -> list[Parts]:
    """Return the sorted paths of all images below the folder."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    try:
        return sorted(_walk(folder, suffixes, (), ()))
    except OSError as error:
        raise DataError(f"{where}: {error.filename} cannot be read ({error.strerror})") from error


def _walk(folder: Path, suffixes: set[str], parts: Parts, above: tuple[Path, ...]) -> Iterator[Parts]:
    place = folder.resolve()
    if place in above:
        raise DataError(f"{folder} is a link to a folder that contains it; remove the link")
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_skipped(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(folder / entry.name, suffixes, (*parts, entry.name), (*above, place))
            elif os.path.splitext(entry.name)[1].lower() in suffixes:  # noqa: PTH122 (faster than Path.suffix)
                yield (*parts, entry.name)


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or name in _SKIPPED


def _splits(files: list[Parts], where: str, notes: list[str], *, is_listed: bool) -> dict[str, list[Parts]] | None:
    """Return the images of each split, or None if the upper folders are not splits. Raise DataError if only some of them are splits."""
    tops = {file[0] if len(file) > 1 else "" for file in files}
    named = sorted(top for top in tops if top.lower() in SPLIT_WORDS)
    if not named:
        return None
    if len(named) < len(tops):
        if len(named) == 1 and not is_listed and all(len(file) == 2 for file in files):
            notes.append(f"'{named[0]}' is a class, not a split")
            return None
        other = min(tops - set(named))
        other = f"'{other}'" if other else "a picture without a folder"
        raise DataError(f"{where}: '{named[0]}' names a split, but {other} does not; use only splits there, or none")
    found: dict[str, list[Parts]] = {}
    for file in files:
        found.setdefault(SPLIT_WORDS[file[0].lower()], []).append(file)
    return found


def _two_splits(found: dict[str, list[Parts]], where: str, notes: list[str]) -> dict[str, list[Parts]]:
    """Return the training and test images. Without a test split, the validation split is the test set."""
    if "train" not in found:
        raise DataError(
            f"{where}: has no training pictures, only the splits {', '.join(sorted(found))}; add a folder 'train'"
        )
    if "test" in found and "valid" in found:
        notes.append(f"validation {len(found['valid']):,} not used")
    return {"train": found["train"], "test": found.get("test", found.get("valid", []))}


def _check_depth(layout: Layout, owner: str | None, *, is_listed: bool) -> None:
    """Raise DataError unless all images are at the same depth, below folders for the class and, if requested, for the domain."""
    pairs = list(zip(layout.inner, layout.files, strict=True))
    first = {len(inner) - 1: "/".join(file) for inner, file in reversed(pairs)}  # the first image at each depth
    shallow = min(first)
    needed = (owner is not None) + (not is_listed)
    if is_listed and shallow < needed:
        raise DataError(f"data.owner={owner}: {layout.where}: '{first[shallow]}' is not in a domain folder")
    if is_listed:
        return
    if len(first) > 1:
        raise DataError(
            f"{layout.where}: images are at different folder depths ('{first[shallow]}' and '{first[max(first)]}'); "
            "move them to the same depth, or list them in metadata.csv"
        )
    if shallow < needed:
        form = "DOMAIN/CLASS/PICTURE" if owner else "CLASS/PICTURE"
        key = f"data.owner={owner}: " if owner else ""
        raise DataError(
            f"{key}{layout.where}: '{first[shallow]}' is not of the form {form}; move the pictures, or add metadata.csv"
        )


def _unused_folders(roots: set[Path], used: set[str]) -> list[str]:
    names = {
        place.name for root in roots for place in root.iterdir() if place.is_dir() and not _is_skipped(place.name)
    } - used
    return [f"no pictures in {', '.join(sorted(names))}"] if names else []
